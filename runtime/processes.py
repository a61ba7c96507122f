"""The processes of a run: their environment, jax.distributed, and SIGTERM."""

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

HUGE_PAGES = "glibc.malloc.hugetlb=1"


class Preempted(Exception):
    """SIGTERM arrived; the message names the checkpoint and how to resume."""


def set_environment() -> None:
    """Sets up huge pages and quiet TensorFlow; may restart the interpreter.

    Must run before jax or TensorFlow is imported, which is why this module imports
    jax inside its functions. XLA:CPU allocates its temporaries anew in every step, and
    the kernel maps them in 4 KB pages: DenseNet-40-24 with batch 64 took 322,000 page
    faults and 0.6 s of system time per step, with huge pages 900 and 0.1 s
    (docs/speed.md). glibc reads the setting only when a process starts. Set
    GLIBC_TUNABLES yourself, even to the empty string, to prevent the restart.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # else it logs a paragraph
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def join() -> None:
    """Joins the other processes of a run; call before anything touches a device.

    Slurm, Open MPI, Kubernetes and TPU pods are detected. Elsewhere set
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, and on CPUs JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo.
    """
    import jax
    from absl import logging

    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    try:
        count, index = (int(os.environ[x]) if x in os.environ else None for x in names)
        jax.distributed.initialize(num_processes=count, process_id=index)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--distributed: {error}. If no cluster manager sets them, set "
            "JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error
    if jax.process_index() != 0:
        logging.set_verbosity(logging.WARNING)  # process 0 logs for all


@contextlib.contextmanager
def sigterm() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether the run should save and stop.

    Call it between dispatches, in every process equally often: all processes get the
    same answer.
    """
    import jax

    if jax.process_count() > 1:
        yield _agreed_preemption()
    elif threading.current_thread() is not threading.main_thread():
        yield lambda: False  # a notebook's thread receives no signals
    else:
        received = threading.Event()
        previous = signal.signal(signal.SIGTERM, lambda *_: received.set())
        try:
            yield received.is_set
        finally:
            signal.signal(signal.SIGTERM, previous)


def _agreed_preemption() -> Callable[[], bool]:
    """Returns a function that turns true at the same call in all processes.

    The distributed service picks a call number that no process has reached yet. It
    must be asked with consecutive numbers, which steps are not if a dispatch runs
    several of them.
    """
    from jax.experimental import multihost_utils

    calls, reached = itertools.count(), []

    def stopped():
        if not reached and multihost_utils.reached_preemption_sync_point(next(calls)):
            reached.append(True)
        return bool(reached)

    return stopped
