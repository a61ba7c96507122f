"""Which room of the house may enter which, read from the syntax trees."""

import ast
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
ROOMS = ("analysis", "benchmarks", "configs", "convert", "nets", "tests")
FILES = sorted(
    path.relative_to(ROOT)
    for folder in (".", *ROOMS)
    for path in (ROOT / folder).glob("*.py" if folder == "." else "**/*.py")
)
OURS = {path.stem for path in FILES if len(path.parts) == 1} | set(ROOMS)

# What a module at the top may import of ours; the other rooms have rules below.
MAY_IMPORT = {
    "main": {"environment", "evaluate", "preflight", "reporting", "train"},
    "train": {
        *("augment", "checkpoints", "devices", "evaluate", "input_pipeline"),
        *("metrics", "nets", "optimizers", "preemption", "preflight", "reporting"),
    },
    "devices": {"input_pipeline"},
    "preflight": {
        *("augment", "cache", "checkpoints", "input_pipeline", "nets", "reporting")
    },
    "reporting": {"checkpoints", "input_pipeline", "metrics"},
    "evaluate": {"augment", "devices", "input_pipeline", "metrics", "nets"},
    "checkpoints": {"metrics"},
    "input_pipeline": {"augment", "crops", "data_sources", "photographs"},
    "augment": {"color", "mixing", "policies"},
    "mixing": set(),
    "policies": set(),
    "data_sources": {
        *("archives", "cache", "crops", "downloads", "folders", "tfrecords")
    },
    "photographs": {"cache", "crops", "data_sources", "folders", "tfrecords"},
    "archives": set(),
    "cache": set(),
    "color": set(),
    "crops": set(),
    "downloads": set(),
    "folders": {"crops"},
    "tfrecords": set(),
    "environment": set(),
    "metrics": set(),
    "optimizers": set(),
    "preemption": set(),
}
TENSORFLOW = {"tensorflow", "tensorflow_datasets", "tensorboard", "clu"}


def imported(path: pathlib.Path, anywhere=True) -> set[str]:
    """Dotted names of the modules that a file imports; or only when it is imported."""
    nodes = [ast.parse((ROOT / path).read_text())]
    names = set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if anywhere or not inside:
            nodes += ast.iter_child_nodes(node)
    return names


def ours(path: pathlib.Path) -> set[str]:
    return {name for name in imported(path) if name.partition(".")[0] in OURS}


def within(name: str, *packages: str) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def allowed(path: pathlib.Path, name: str) -> bool:
    room, first = path.parts[0], name.partition(".")[0]
    if len(path.parts) == 1:
        return first in MAY_IMPORT[path.stem]
    if room == "configs":
        return within(name, "configs.common", "configs.data_sets")
    if path == pathlib.Path("nets/connectivity.py"):
        return False
    if path.parts[:2] == ("nets", "layers"):
        return within(name, "nets.layers", "nets.connectivity")
    if path in (pathlib.Path("nets/__init__.py"), pathlib.Path("nets/cost.py")):
        return within(name, "nets")
    if room == "nets":
        return within(name, "nets.layers")
    return room == "tests" or first in {room, "configs", "nets", *MAY_IMPORT} - {"main"}


def test_imports_go_one_way():
    refused = [(str(p), x) for p in FILES for x in ours(p) if not allowed(p, x)]
    assert not refused


def test_every_module_has_its_rules():
    assert {path.stem for path in FILES if len(path.parts) == 1} == MAY_IMPORT.keys()


def test_tensorflow_is_imported_late():
    at_once = [(str(p), x) for p in FILES for x in imported(p, anywhere=False)]
    assert [(p, x) for p, x in at_once if within(x, *TENSORFLOW)] == []


def test_files_stay_small():
    lines = {str(p): len((ROOT / p).read_text().splitlines()) for p in FILES}
    assert {name: n for name, n in lines.items() if n > 400} == {}
    assert lines["main.py"] < 80
    assert max(len(path.parts) for path in FILES) == 3


def test_a_run_is_importable_without_tensorflow():
    code = f"""
import sys
for name in {sorted(TENSORFLOW)}:
    sys.modules[name] = None  # what imports it fails
import train
assert not any(name.partition(".")[0] in {TENSORFLOW} for name in sys.modules
               if sys.modules[name] is not None)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
