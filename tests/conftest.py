"""Eight CPU devices for every test, and the location of the reference material."""

import importlib.metadata
import os
import pathlib

import pytest

# Before anything imports jax. Tests of one device use the first. Tests spend most of
# their time compiling, so LLVM's optimizations are off. They are on in the runs of
# main.py that tests start, except where a run has too few steps.
UNOPTIMISED = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # The older emitters compile these nets 2.5 times faster. An unknown flag would end
    # the process, and some day they will be removed.
    UNOPTIMISED.append("--xla_cpu_use_fusion_emitters=false")
    # Splitting a program costs more than it gains when every core is busy anyway.
    UNOPTIMISED.append("--xla_cpu_parallel_codegen_split_count=1")
FLAGS = ["--xla_force_host_platform_device_count=8", *UNOPTIMISED]
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))

# In this process, only the tests of nets/layers/cpu use the C++ kernels.
os.environ["CXX"] = "none"

SHARED = pathlib.Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of reference material beside the checkout; skips without it."""
    if not SHARED.is_dir():
        pytest.skip("reference material ../shared not found")
    return SHARED


@pytest.fixture(scope="session")
def cache(tmp_path_factory, pytestconfig) -> pathlib.Path:
    """The cache directory of all workers and of all processes that tests start."""
    if given := pytestconfig.getoption("--shared-cache"):
        return given.resolve()
    folder = tmp_path_factory.getbasetemp()
    in_worker = "PYTEST_XDIST_WORKER" in os.environ
    return (folder.parent if in_worker else folder) / "cache"


@pytest.fixture(scope="session", autouse=True)
def compile_once(cache) -> None:
    """Compiles each program and the C++ kernels once per cache, over all workers."""
    import jax

    os.environ["XDG_CACHE_HOME"] = str(cache)
    jax.config.update("jax_compilation_cache_dir", str(cache / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def pytest_addoption(parser):
    parser.addoption(
        "--shared-cache",
        type=pathlib.Path,
        metavar="DIR",
        help="cache of programs, kernels and results that sessions of the same code "
        "share: at first an empty directory; default: a new one for each session",
    )
    parser.addoption(
        "--golden",
        type=pathlib.Path,
        metavar="DIR",
        help="directory of golden files; default: tests/golden and ../shared/golden",
    )


def pytest_terminal_summary(terminalreporter):
    """Prints the largest relative errors of each golden file."""
    passed = terminalreporter.stats.get("passed", [])
    rows = [
        (report.nodeid.partition("[")[2].rstrip("]"), value)
        for report in sorted(passed, key=lambda report: report.nodeid)
        for name, value in report.user_properties
        if name == "golden"
    ]
    if rows:
        terminalreporter.section("golden: largest relative error")
        for row in rows:
            terminalreporter.write_line("{:<60} {}".format(*row))
