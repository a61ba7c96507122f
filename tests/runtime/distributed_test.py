"""One run of two real processes with one device each, connected by gloo."""

import shutil
import signal
import socket

import numpy as np
import pytest

from runtime.workdir import read_rows
from tests.conftest import UNOPTIMISED
from tests.support import launch
from tests.support.launch import CONFIG, arguments, finish, kill_when, start

SHORTER = dict(train__epochs=0.8)
STEPS = 72  # of 1,437 images in batches of 16


def start_both(workdir, cache, **fields):
    """Starts both processes. A list gives one value per process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = []
    for index in range(2):
        own = {k: v[index] if isinstance(v, list) else v for k, v in fields.items()}
        where = workdir[index] if isinstance(workdir, list) else workdir
        flags = arguments(where, CONFIG, "--distributed", **own)
        env = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
            "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            # JAX caches only what process 0 compiles; process 1 compiles in each run.
            "XLA_FLAGS": " ".join(UNOPTIMISED),
        }
        processes.append(start(flags, cache, env=env))
    return processes


def finish_both(processes):
    results = [finish(process) for process in processes]
    return [code for code, _, _ in results], [err for _, _, err in results]


def complete(workdir, cache, **fields):
    codes, errors = finish_both(start_both(workdir, cache, **SHORTER | fields))
    assert codes == [0, 0], errors
    assert "step" not in errors[1]  # only process 0 logs


@pytest.fixture(scope="module")
def together(cache):
    """The uninterrupted run of two processes."""
    return launch.once(cache / "together", lambda folder: complete(folder, cache))


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["device", "tf.data"])
def test_two_processes_equal_one(tmp_path, cache, together, pipeline):
    """The one process takes its batches from the images on the device.

    Its programs are optimised, so the results are equal up to rounding.
    """
    folder = together
    if pipeline == "tf.data":
        folder = tmp_path
        complete(folder, cache, data__pipeline=pipeline)
    two, one = (
        read_rows(workdir / "metrics.csv")[:2]
        for workdir in (folder, launch.reference(cache))
    )
    assert len(two) == 2
    for ours, wanted in zip(two, one, strict=True):
        assert ours.keys() == wanted.keys()
        for loss in ("train_loss", "test_loss"):
            np.testing.assert_allclose(ours[loss], wanted[loss], rtol=1e-4)


@pytest.mark.slow
def test_sigterm_to_either_and_a_kill_do_not_change_the_result(
    tmp_path, cache, together
):
    def last():
        return max(launch.steps(tmp_path), default=0)

    def start_and_kill(target, **options):
        before, processes = last(), start_both(tmp_path, cache, **SHORTER)
        killed = kill_when(processes[target], lambda: last() > before, **options)
        return killed, processes

    for target in range(2):
        killed, processes = start_and_kill(target, number=signal.SIGTERM)
        codes, errors = finish_both(processes)
        assert killed, errors
        assert codes == [128 + signal.SIGTERM] * 2, errors
        assert f"SIGTERM: saved step {last()}" in errors[0]
    killed, processes = start_and_kill(0)
    assert killed
    processes[1].kill()
    finish_both(processes)
    assert last() < STEPS
    complete(tmp_path, cache)
    launch.assert_same_end(tmp_path, together, STEPS)


@pytest.mark.slow
def test_separate_workdirs_are_an_error(tmp_path, cache, together):
    folders = [shutil.copytree(together, tmp_path / "mine"), tmp_path / "other"]
    codes, errors = finish_both(start_both(folders, cache, train__epochs=3.0))
    assert codes == [1, 1], errors
    for err in errors:
        assert "Traceback" not in err
        assert f"last steps [-1, {STEPS}" in err
        assert "one shared directory" in err


@pytest.mark.slow
def test_different_flags_are_an_error(tmp_path, cache):
    codes, errors = finish_both(start_both(tmp_path, cache, seed=[1, 2]))
    assert codes == [1, 1], errors
    assert all("need the same --config" in err for err in errors)


def test_no_step_compares_values_across_processes():
    """jax.device_put compares all values: each step would wait for collectives."""
    for name in (
        "runtime/devices.py",
        "runtime/dispatch.py",
        "train.py",
        "evaluate.py",
    ):
        assert "jax.device_put(" not in (launch.ROOT / name).read_text(), name


@pytest.mark.slow
def test_a_missing_coordinator_is_named(tmp_path, cache):
    flags = arguments(tmp_path, CONFIG, "--distributed")
    code, _, err = finish(start(flags, cache))
    assert code == 1
    assert "Traceback" not in err
    assert "JAX_COORDINATOR_ADDRESS" in err
