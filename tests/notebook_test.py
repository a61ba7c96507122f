"""Each notebook runs from top to bottom; its first cell prepares a Colab runtime."""

import importlib.metadata
import json
import pathlib
import shutil
import subprocess
import sys
import types

import nbclient
import nbformat
import pytest

NOTEBOOKS = pathlib.Path(__file__).parents[1] / "notebooks"
NAMES = ["inside", "tour", "weights", "wirings", "your_data"]
MAGIC = "%"  # IPython's own lines
CHECKS = {
    "inside": """
assert maps["blocks.0.2.conv2"].shape == (4, 32, 32, 8)
assert 0 < graph.sum() < graph.size
assert (jacobian[~graph] == 0).all() and (jacobian[graph] != 0).all()
assert ((influence > 0) == (paths > 0)).all()
assert 0 < (paths == 0).sum()
assert fields["stem"].sum() <= 9 < fields["blocks.0.2.conv2"].sum() < 32 * 32
""",
    "tour": """
assert after_three[0] == 0.25 and 0.94 < after_three[1] < 0.96, after_three
assert layer.kernel.shape == (1, 1, len(outputs)) and max(outputs) == 31
assert all(result["test_accuracy"] > 0.85 for result in results.values()), results
assert (logits.argmax(-1) == examples.labels[:10]).sum() > 5  # 8 when stored
assert sorted(groups) == ["DenseNet dense, digits", "X-DenseNet expander, digits"]
""",
    "weights": """
assert result["test_accuracy"] > 0.8, result
assert (logits["imported"] == logits["trained"]).all()
assert sorted(equal) == sorted(original) == sorted(again)
""",
    "wirings": """
assert totals["expander"].parameters == totals["grouped"].parameters == 5322
assert totals["dense"].parameters == 9630
assert all(result["test_accuracy"] > 0.75 for result in results.values()), results
names = ["DenseNet dense", "DenseNet grouped", "X-DenseNet expander"]
assert sorted(groups) == [f"{name}, digits" for name in names]
""",
    "your_data": """
assert results["finetuned"]["test_accuracy"] > 0.85, results
assert [row.split(",")[0] for row in per_class.split()] == ["class", "even", "odd"]
assert sum(predicted) > 6, predicted
""",
}


def _read(name: str) -> list[dict]:
    """Returns the code cells of a notebook."""
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def cells():
    """Returns the code cells of the tour."""
    return _read("tour")


def _plain(cell) -> str:
    lines = [line for line in cell["source"] if not line.startswith(MAGIC)]
    return "".join([*lines, "\n"])


def test_every_notebook_is_listed():
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_notebook_begins_with_the_same_cell(cells, name):
    assert _read(name)[0]["source"] == cells[0]["source"]


@pytest.mark.parametrize("name", NAMES)
def test_the_results_of_one_complete_run_are_stored(name):
    cells = _read(name)
    counts = [cell["execution_count"] for cell in cells]
    assert counts == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    assert not any(output["output_type"] == "error" for output in outputs)


@pytest.fixture
def colab(cells, tmp_path, monkeypatch):
    """Runs the first cell as on Colab and returns what it asks pip for.

    The runtime has an accelerator, as nvidia-smi or the environment reports it, and a
    version of jax. The process sees only the CPU.
    """

    def run(version: str, smi: str = "", tpu: bool = False) -> str:
        commands = []

        def fake_run(command, **_):
            commands.append(command)
            if command[0] == "git":
                (tmp_path / "wirings").mkdir()
                shutil.copy(NOTEBOOKS.parent / "pyproject.toml", "wirings")
            return types.SimpleNamespace(stdout=smi)

        found = importlib.metadata.version
        monkeypatch.setattr(
            importlib.metadata, "version", lambda x: version if x == "jax" else found(x)
        )
        monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("colab"))
        monkeypatch.setattr(subprocess, "run", fake_run)
        monkeypatch.setattr(shutil, "which", lambda name: name if smi else None)
        monkeypatch.setattr("glob.glob", lambda _: ["/dev/accel0"] if tpu else [])
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.chdir(tmp_path)
        source = _plain(cells[0]).replace('REPOSITORY = ""', 'REPOSITORY = "here"')
        failure = ""
        try:
            exec(compile(source, "cell", "exec"), {})
        except RuntimeError as error:
            failure = str(error)
        (pip,) = [command for command in commands if command[1:3] == ["-m", "pip"]]
        assert not any("tensorflow" in text for text in pip)  # Colab has its own
        return " ".join(text for text in pip if text.startswith("jax")), failure

    return run


@pytest.mark.parametrize(
    ("runtime", "extra"),
    [
        ({"smi": "Driver Version: 550.54  CUDA Version: 12.4 |"}, "cuda12"),
        ({"smi": "Driver Version: 580.82  CUDA Version: 13.0 |"}, "cuda13"),
        ({"tpu": True}, "tpu"),
    ],
)
def test_an_old_jax_is_replaced_together_with_its_plugin(colab, runtime, extra):
    pip, failure = colab("0.7.2", **runtime)
    assert pip.startswith(f"jax[{extra}]")
    assert f"jax does not see the {extra} device" in failure  # here is only a CPU


def test_a_runtime_without_accelerator_gets_plain_jax(colab):
    pip, failure = colab("0.7.2")
    assert pip.startswith(("jax<", "jax>"))
    assert not failure


def test_a_new_enough_jax_is_left_alone(colab):
    assert colab("0.11.2", tpu=True)[0] == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_runs(name, monkeypatch):
    """In a kernel, as a reader runs it: compiled in full, with the C++ kernels."""
    for variable in ("XLA_FLAGS", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(CHECKS[name]))
    resources = {"metadata": {"path": str(NOTEBOOKS)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
