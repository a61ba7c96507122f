"""The rooms of the code and the imports allowed between them, from syntax trees."""

import ast
import fnmatch
import graphlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

LIBRARY = (
    "train evaluate optimizers runtime input_pipeline "
    "data_sources augment nets configs metrics"
)
TOOLS = "convert analysis benchmarks notebooks"
# Files and rooms, and what they may import besides themselves and other projects.
TABLE = [
    ("main", "train runtime"),
    ("train", "evaluate input_pipeline augment nets optimizers metrics runtime"),
    ("evaluate", "input_pipeline augment nets metrics runtime.devices"),
    ("optimizers", "runtime.clock"),
    ("runtime", "input_pipeline augment.check nets.cost metrics"),
    ("input_pipeline", "data_sources augment.geometry"),
    ("data_sources augment nets configs metrics", ""),
    (TOOLS, LIBRARY),
    ("tests", f"main {LIBRARY} {TOOLS}"),
]
MAY_IMPORT = {room: names for rooms, names in TABLE for room in rooms.split()}
# What a file may import from its own room; the first pattern that matches counts.
INSIDE = {
    "nets/layers/*": "nets.layers nets.connectivity",
    "nets/connectivity.py": "nets.ramanujan",
    "nets/ramanujan.py": "",
    "nets/__init__.py": "nets",
    "nets/cost.py": "nets",
    "nets/*": "nets.layers",
    "configs/*": "configs.common configs.data_sets",
    "tests/*": "tests.support tests.conftest",
}
ROOT_FILES = {"main", "train", "input_pipeline", "evaluate", "optimizers", "metrics"}
ROOMS = {*MAY_IMPORT, "docs"} - ROOT_FILES
FILES = sorted(
    path.relative_to(ROOT)
    for pattern in ["*.py", *(f"{room}/**/*.py" for room in ROOMS)]
    for path in ROOT.glob(pattern)
)
TENSORFLOW = {"tensorflow", "tensorflow_datasets", "tensorboard", "clu"}


def test_the_root_has_six_files_and_eleven_rooms():
    assert {path.stem for path in ROOT.glob("*.py")} == ROOT_FILES
    folders = {path.parent.name for path in ROOT.glob("[!.]*/*.py")}
    assert folders | {"docs", "notebooks"} == ROOMS
    assert all((ROOT / room).is_dir() for room in ROOMS)
    assert len(ROOMS) == 11
    deep = {path.parent.as_posix() for path in FILES if len(path.parts) > 3}
    assert deep == {"nets/layers/cpu"}  # elsewhere, two levels of folders


def test_imports_follow_the_table():
    refused = [(str(p), x) for p in FILES for x in ours(p) if not allowed(p, x)]
    assert refused == []


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("main.py", "nets"),
        ("evaluate.py", "runtime.clock.Clock"),
        ("optimizers.py", "runtime.devices"),
        ("runtime/checks.py", "nets.create"),
        ("nets/vgg.py", "configs.common"),
        ("nets/vgg.py", "nets.resnet.ResNet"),
        ("nets/layers/conv.py", "nets.vgg"),
        ("configs/xvgg.py", "configs.xdensenet"),
        ("train.py", "convert"),
        ("convert/xnets.py", "analysis"),
        ("tests/train_test.py", "tests.resume_test"),
    ],
)
def test_the_table_rejects(path, name):
    assert not allowed(pathlib.Path(path), name)


def test_no_import_is_relative():
    relative = [(str(p), x) for p in FILES for x in imports(p) if x.startswith(".")]
    assert relative == []


def test_no_imports_between_rooms_are_circular():
    graph = {name: set() for name in MAY_IMPORT}
    for path in FILES:
        graph[room(path)] |= {first(name) for name in ours(path)} - {room(path)}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_tensorflow_is_imported_late():
    on_import = [(str(p), x) for p in FILES for x in imports(p, in_functions=False)]
    assert [(p, x) for p, x in on_import if first(x) in TENSORFLOW] == []


def test_a_run_is_importable_without_tensorflow():
    code = f"""
import sys
for name in {sorted(TENSORFLOW)}:
    sys.modules[name] = None  # importing it raises ImportError
import main
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def imports(path: pathlib.Path, in_functions: bool = True) -> set[str]:
    """Returns the dotted names that a file imports, optionally inside functions too."""
    nodes = [ast.parse((ROOT / path).read_text())]
    names = set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {f"{module}.{alias.name}" for alias in node.names}
        functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
        if in_functions or not isinstance(node, functions):
            nodes += ast.iter_child_nodes(node)
    return names


def ours(path: pathlib.Path) -> set[str]:
    return {name for name in imports(path) if first(name) in MAY_IMPORT}


def allowed(path: pathlib.Path, name: str) -> bool:
    if first(name) != room(path):
        return within(name, MAY_IMPORT[room(path)])
    for pattern, names in INSIDE.items():
        if fnmatch.fnmatch(path.as_posix(), pattern):
            return within(name, names)
    return True


def room(path: pathlib.Path) -> str:
    return path.parts[0].removesuffix(".py")


def first(name: str) -> str:
    return name.partition(".")[0]


def within(name: str, modules: str) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules.split())
