"""The dependencies, their lock and the citation."""

import ast
import functools
import pathlib
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DISTRIBUTIONS = {"PIL": "pillow", "absl": "absl-py", "orbax": "orbax-checkpoint"}
PEERS = {"torch"}  # benchmarks compare with it if it is installed
ARXIV = ["1711.08757", "1707.02725", "1611.05552", "1711.09280", "1512.03385"]
PLATFORMS = [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")]


def _locked(name: str, python: str, platform: str, machine: str):
    """Returns {distribution: version} of a requirements file on one platform."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "sys_platform": platform,
        "platform_machine": machine,
    }
    lines = (ROOT / name).read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and line[0] not in "#-"]
    return {
        canonicalize_name(pin.name): str(pin.specifier).removeprefix("==")
        for pin in pins
        if pin.marker is None or pin.marker.evaluate(environment)
    }


@functools.cache
def _imports():
    """Returns the names of the modules imported outside the standard library."""
    ours = {path.stem for path in ROOT.glob("*.py")}
    ours |= {path.name for path in ROOT.iterdir() if path.is_dir()}
    files = [*ROOT.glob("*.py")]
    for room in ROOT.iterdir():
        if room.is_dir() and room.name != "tests" and not room.name.startswith("."):
            files += room.rglob("*.py")
    names = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
    return names - ours - PEERS - set(sys.stdlib_module_names)


def test_every_import_is_a_declared_dependency():
    texts = PROJECT["project"]["dependencies"]
    declared = {canonicalize_name(Requirement(text).name) for text in texts}
    imported = {DISTRIBUTIONS.get(name, name) for name in _imports()}
    assert {canonicalize_name(name) for name in imported} <= declared


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize(("platform", "machine"), PLATFORMS)
def test_the_lock_meets_the_declared_dependencies(python, platform, machine):
    locked = _locked("requirements.txt", python, platform, machine)
    for text in PROJECT["project"]["dependencies"]:
        requirement = Requirement(text)
        marker = requirement.marker
        machine_facts = {"sys_platform": platform, "platform_machine": machine}
        if marker is None or marker.evaluate(machine_facts):
            version = locked[canonicalize_name(requirement.name)]
            assert version in requirement.specifier, text
    tensorflows = {name for name in locked if name in ("tensorflow", "tensorflow-cpu")}
    assert len(tensorflows) == 1


def test_test_tools_are_in_the_dev_lock_only():
    extra = PROJECT["project"]["optional-dependencies"]["dev"]
    tools = {canonicalize_name(Requirement(text).name) for text in extra}
    assert tools <= set(_locked("requirements-dev.txt", "3.11", "linux", "x86_64"))
    assert not tools & set(_locked("requirements.txt", "3.11", "linux", "x86_64"))
    assert "-r requirements.txt" in (ROOT / "requirements-dev.txt").read_text()


def test_an_installation_adds_no_modules():
    """A module named train or metrics in site-packages would shadow others."""
    assert PROJECT["tool"]["setuptools"] == {"packages": [], "py-modules": []}


def test_the_papers_are_cited():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    urls = [reference["url"] for reference in citation["references"]]
    assert urls == [f"https://arxiv.org/abs/{number}" for number in ARXIV]
    readme = (ROOT / "README.md").read_text()
    assert all(url in readme for url in urls)
