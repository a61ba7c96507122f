"""Equality with the original codes, for every golden file in a directory.

pytest tests/golden_test.py --golden=DIR

Files are discovered, not listed. Networks (format 2) go through convert.build and
convert.load; layer, optimizer and trajectory files go to the reader of their form.
Files without a converter or reader are skipped. Everything runs in float64.
"""

import functools
import json
import pathlib

import jax
import pytest

import convert
from tests.conftest import SHARED
from tests.support import golden_checks, golden_layers
from tests.support.golden_files import FORMAT, Golden

OWN = pathlib.Path(__file__).parent / "golden"
# Compile time grows with the number of tensors: larger networks are slow tests.
MAX_FAST_TENSORS = 80


@functools.cache
def discover(given: pathlib.Path | None) -> dict[str, list]:
    """Returns the test parameters of all networks and of all other golden files.

    given: the value of --golden; None: ../shared/golden and tests/golden.
    """
    if given and not given.is_dir():
        raise pytest.UsageError(f"--golden={given}: no such directory")
    roots = [given.resolve()] if given else [SHARED / "golden", OWN]
    # Our own copy replaces an identical file in ../shared.
    unique = {}
    for root in roots:
        for path in sorted([*root.rglob("*.json"), *root.rglob("*.npz")]):
            unique[path.relative_to(root), path.read_bytes()] = (root, path)
    found = {"network": [], "recorded": []}
    for root, path in unique.values():
        facts = json.loads(path.read_text()) if path.suffix == ".json" else {}
        if isinstance(facts, dict) and facts.get("format") == FORMAT:
            parameter = _parameter(root, path, _marks(root, facts))
            found["network"].append(parameter)
        elif golden_layers.is_golden(path, facts):
            # A file with steps trains a whole net, which takes long to compile.
            marks = pytest.mark.slow if "steps" in facts else ()
            found["recorded"].append(_parameter(root, path, marks))
    if given and not any(found.values()):
        raise pytest.UsageError(f"--golden={given}: no golden file in this directory")
    return found


def pytest_generate_tests(metafunc):
    for name, parameters in discover(metafunc.config.getoption("golden")).items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, parameters)


def _marks(root, facts):
    try:
        convert.find(facts["system"], facts["net"])
    except convert.UnknownReference as error:
        return pytest.mark.skip(str(error).partition(":")[0])
    fast = root == OWN and len(facts["tensors"]) <= MAX_FAST_TENSORS
    return () if fast else pytest.mark.slow


def _parameter(root, path, marks=()):
    name = path.relative_to(root).with_suffix("").as_posix()
    return pytest.param(path, id=name, marks=marks)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def test_network(network, record_property):
    comparison = golden_checks.network(Golden.read(network))
    record_property("golden", comparison.summary())
    comparison.check()


def test_recorded(recorded, record_property):
    reader = golden_layers.reader(recorded)
    if reader is None:
        pytest.skip(f"no reader for {'/'.join(recorded.parts[-3:])}")
    comparison = reader(recorded)
    record_property("golden", comparison.summary())
    comparison.check()


@pytest.mark.parametrize(
    ("directory", "message"),
    [("absent", "no such directory"), ("empty", "no golden file")],
)
def test_a_directory_without_golden_files_is_rejected(tmp_path, directory, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(pytest.UsageError, match=f"--golden=.*{directory}: {message}"):
        discover(tmp_path / directory)
