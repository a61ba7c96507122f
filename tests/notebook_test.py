"""The notebook's cells, in their order, as plain Python."""

import json
import pathlib
import subprocess
import sys

import pytest

NOTEBOOK = pathlib.Path(__file__).parents[1] / "notebooks" / "tour.ipynb"
MAGIC = "%"  # IPython's own lines
CHECKS = """
assert layer.kernel.shape == (1, 1, len(outputs)) and max(outputs) == 31
assert all(result["test_accuracy"] > 0.85 for result in results.values()), results
assert (logits.argmax(-1) == examples.labels[:10]).sum() > 7
assert sorted(groups) == ["densenet dense, digits", "densenet expander, digits"]
"""


@pytest.fixture(scope="module")
def code():
    """The code cells."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_no_results_are_stored(code):
    assert all(not cell["outputs"] and not cell["execution_count"] for cell in code)


@pytest.mark.slow
def test_the_tour_runs(code, tmp_path):
    lines = [line for cell in code for line in [*cell["source"], "\n"]]
    program = tmp_path / "tour.py"
    plain = "".join(line for line in lines if not line.startswith(MAGIC))
    program.write_text(plain + CHECKS)
    subprocess.run([sys.executable, program], cwd=NOTEBOOK.parent, check=True)
