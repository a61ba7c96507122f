"""Real runs of main.py for the tests: a tiny net on the embedded digits."""

import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np

from runtime.checkpoints import Checkpoints

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = "configs/xdensenet.py:22-8-2,digits"
TINY = {
    "net.depth": 7,
    "net.growth": 4,
    "net.bottleneck": False,
    "data.pipeline": "device",
    "train.batch_size": 16,
    "train.epochs": 1.6,
    "train.log_every_steps": 10,
    "train.tensorboard": False,
    "optimizer.learning_rate": 0.001,  # small, so that rounding errors do not grow
    "optimizer.min_learning_rate": 0.0,
    # After the first kills, and early enough for runs of 0.4 epochs: a later drop would
    # be moved to their end, and they would compile another program.
    "optimizer.drop_epochs": "(0.3,0.4)",
    "eval.every_epochs": 0.4,
    "checkpoint.every_steps": 9,
}
TOTAL = 144  # steps: 1.6 epochs of 1,437 images in batches of 16


def arguments(workdir, config=CONFIG, *more, **fields) -> list[str]:
    """Command line of main.py; `fields` as data__pipeline='tf.data' go over TINY."""
    fields = TINY | {k.replace("__", "."): v for k, v in fields.items()}
    overrides = [f"--config.{k}={v}" for k, v in fields.items()]
    return [f"--config={config}", f"--workdir={workdir}", *overrides, *more]


def start(arguments, cache, command=("main.py",), **popen) -> subprocess.Popen:
    """A process of one CPU device that shares compiled programs with the others.

    Unlike the tests themselves, it uses the C++ kernels and, unless popen's `env` sets
    XLA_FLAGS, optimises its programs.
    """
    env = {k: v for k, v in os.environ.items() if k not in ("CXX", "XLA_FLAGS")}
    env |= {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"}
    popen = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | popen
    env |= popen.pop("env", {})
    line = [sys.executable, *command, *arguments]
    return subprocess.Popen(line, cwd=ROOT, env=env, text=True, **popen)


def finish(process, timeout=240) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def complete(arguments, cache, **options) -> str:
    """Runs to the end, which must be a good one: standard error."""
    code, _, err = finish(start(arguments, cache, **options))
    assert code == 0, err
    return err


def kill_when(process, ready, timeout=120, number=signal.SIGKILL) -> bool:
    """Signals as soon as `ready()` holds; False if the process ended before."""
    deadline = time.monotonic() + timeout
    while process.poll() is None:
        assert time.monotonic() < deadline, "the moment to kill never came"
        if ready():
            process.send_signal(number)
            return True
        time.sleep(0.001)
    return False


def copy_when(process, ready, source, target) -> bool:
    """Copies a workdir once `ready()` holds, with the files that a kill would leave.

    The process is stopped meanwhile. Returns False if it ended before.
    """
    stopped = kill_when(process, ready, number=signal.SIGSTOP)
    if stopped:
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        shutil.copytree(source, target)
        process.send_signal(signal.SIGCONT)
    return stopped


def once(folder: pathlib.Path, make) -> pathlib.Path:
    """The folder after make(folder) has succeeded once, over all users of a cache."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    done = folder.with_name(f"{folder.name}.done")
    with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            make(folder)
            done.touch()
    return folder


def reference(cache: pathlib.Path) -> pathlib.Path:
    """The workdir of one uninterrupted run, for everybody: copy it to change it."""
    return once(cache / "whole", lambda folder: complete(arguments(folder), cache))


def steps(workdir: pathlib.Path) -> list[int]:
    """Committed checkpoints, without opening them."""
    folder = workdir / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def arrays(workdir: pathlib.Path, which="last") -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path, digests verified; 'step' among them."""
    folder = workdir / "checkpoints" / str(steps(workdir)[-1])
    table = json.loads((folder / "table" / "table.json").read_text())["table"]
    template = {}
    for path, (form, _) in table["arrays"].items():
        dtype, _, shape = form.rstrip("]").partition("[")
        shape = [int(n) for n in shape.split(",") if n]
        template[path] = np.empty(shape, dtype)
    with Checkpoints(workdir) as checkpoints:
        return checkpoints.restore(template, which)[0]


def assert_same_end(workdir: pathlib.Path, reference: pathlib.Path, total=TOTAL):
    """Parameters, statistics, wiring, optimizer, totals, rows: the same to the bit."""
    ours, wanted = arrays(workdir), arrays(reference)
    assert wanted["step"] == total
    kinds = {path.partition("/")[0] for path in wanted}
    assert kinds >= {"params", "stats", "wiring", "opt_state", "totals", "bad_step"}
    assert ours.keys() == wanted.keys()
    different = [k for k in wanted if ours[k].tobytes() != wanted[k].tobytes()]
    assert not different
    for name in ("metrics.csv", "best.json"):
        assert (workdir / name).read_bytes() == (reference / name).read_bytes(), name
