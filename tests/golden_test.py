"""Equality with the original codes: every golden file below a folder.

pytest tests/golden_test.py --golden=DIR

Files are discovered, never listed. Networks (format 2) run through convert.build and
load; layer, optimizer and trajectory files through the reader that knows their form;
what has no importer or reader yet is skipped with that reason. All in float64.
"""

import json
import pathlib

import jax
import pytest

import convert
from convert import golden
from tests.conftest import SHARED
from tests.support import golden_checks, golden_layers

OWN = pathlib.Path(__file__).parent / "golden"


def pytest_generate_tests(metafunc):
    given = metafunc.config.getoption("golden")
    if given and not given.is_dir():
        raise pytest.UsageError(f"--golden={given}: there is no such folder")
    roots = [given.resolve()] if given else [SHARED / "golden", OWN]
    # The same bytes in two folders are one fact; our own copy wins, it is never slow.
    unique = {}
    for root in roots:
        for path in sorted([*root.rglob("*.json"), *root.rglob("*.npz")]):
            unique[path.relative_to(root), path.read_bytes()] = (root, path)
    networks, others = [], []
    for root, path in unique.values():
        facts = json.loads(path.read_text()) if path.suffix == ".json" else {}
        if isinstance(facts, dict) and facts.get("format") == golden.FORMAT:
            networks.append(_parameter(root, path, _marks(root, facts)))
        elif golden_layers.is_golden(path, facts):
            others.append(_parameter(root, path))
    if given and not networks and not others:
        raise pytest.UsageError(f"--golden={given}: there is no golden file below it")
    if "network" in metafunc.fixturenames:
        metafunc.parametrize("network", networks)
    if "recorded" in metafunc.fixturenames:
        metafunc.parametrize("recorded", others)


def _marks(root, facts):
    try:
        convert.find(facts["system"], facts["net"])
    except convert.NoImporter as error:
        return pytest.mark.skip(str(error).partition(":")[0])
    return () if root == OWN else pytest.mark.slow


def _parameter(root, path, marks=()):
    name = path.relative_to(root).with_suffix("").as_posix()
    return pytest.param(path, id=name, marks=marks)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def test_network(network, record_property):
    comparison = golden_checks.network(golden.Golden.read(network))
    record_property("golden", comparison.summary())
    comparison.check()


def test_recorded(recorded, record_property):
    reader = golden_layers.reader(recorded)
    if reader is None:
        pytest.skip(f"no reader yet for {'/'.join(recorded.parts[-3:])}")
    comparison = reader(recorded)
    record_property("golden", comparison.summary())
    comparison.check()
