"""The rooms of the house: who may import whom, and how long a file may be."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if not {".venv", "runs", ".git"} & set(path.relative_to(ROOT).parts)
)
LEAVES = {"augment", "data_sources", "metrics", "optimizers", "environment"}
# Our own modules that each module may import. A name stands for all below it.
ALLOWED = {
    "main": {"environment", "preflight", "reporting", "train"},
    "train": {"evaluate", "input_pipeline", "preflight", "reporting", "checkpoints"}
    | {"augment", "metrics", "nets", "optimizers"},
    "evaluate": {"augment", "metrics", "nets", "input_pipeline"},
    "preflight": {"checkpoints", "input_pipeline", "nets", "reporting"},
    "reporting": {"checkpoints", "input_pipeline", "metrics"},
    "checkpoints": {"metrics"},
    "input_pipeline": {"augment", "data_sources"},
    "configs": {"configs.common"},
    "nets.layers": {"nets.layers", "nets.connectivity"},
    "nets.connectivity": set(),
    "nets.cost": set(),
    "nets": {"nets"},
    **{leaf: set() for leaf in LEAVES},
}
# These may import everything; nothing but themselves and tests imports them.
OUTER = ("analysis", "benchmarks", "importers", "tests")


def name_of(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in FILES} - {""}
TOPS = {name.partition(".")[0] for name in NAMES}


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def imports(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the room"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in NAMES else node.module


def violations(name: str, source: str) -> list[str]:
    ours = [x for x in imports(ast.parse(source)) if x.partition(".")[0] in TOPS]
    if name.partition(".")[0] in OUTER:
        return []
    room = max((room for room in ALLOWED if within(name, room)), key=len, default=None)
    assert room, f"{name} has no room: give it one in the design and in this test"
    allowed = ALLOWED[room]
    return [x for x in ours if not any(within(x, room) for room in allowed)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    assert not violations(name_of(path), path.read_text())


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("nets.densenet", "import train"),
        ("nets.layers.conv", "from nets import densenet"),
        ("nets.connectivity", "from nets.layers.conv import Conv"),
        ("configs.cfmz", "from nets.layers import norm"),
        ("metrics", "from configs import common"),
        ("train", "from importers import cfmz"),
        ("evaluate", "from train import TrainState"),
    ],
)
def test_wrong_directions_are_seen(name, source):
    assert violations(name, source)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_readable(path):
    assert len(path.read_text().splitlines()) <= 400
    relative = path.relative_to(ROOT)
    assert len(relative.parts) <= 3, "two levels of folders, nets/layers the only third"


def test_main_holds_flags_only():
    assert len((ROOT / "main.py").read_text().splitlines()) < 80


def test_training_and_nets_import_without_tensorflow():
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('tensorflow', 'tensorboard'):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import main, analysis.wiring, configs.xdensenet, nets.cost
assert 'tensorflow' not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
