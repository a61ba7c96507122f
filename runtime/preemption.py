"""SIGTERM: a run saves itself before it ends, all of its processes at the same step."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):
    """SIGTERM came; the message says where the run was saved and how it goes on."""


@contextlib.contextmanager
def sigterm() -> Iterator[Callable[[], bool]]:
    """Yields a function, asked between dispatches, of whether to save and stop."""
    if jax.process_count() > 1:
        yield _agreed_preemption()
    elif threading.current_thread() is not threading.main_thread():
        yield lambda: False  # a notebook's thread gets no signals
    else:
        received = threading.Event()
        previous = signal.signal(signal.SIGTERM, lambda *_: received.set())
        try:
            yield received.is_set
        finally:
            signal.signal(signal.SIGTERM, previous)


def _agreed_preemption() -> Callable[[], bool]:
    """True from the same call on in all processes, soon after one got a SIGTERM.

    The distributed service names a call that none has made yet, once: it must be asked
    with consecutive numbers, which steps are not when a dispatch makes several.
    """
    calls, reached = itertools.count(), []

    def terminated():
        if not reached and multihost_utils.reached_preemption_sync_point(next(calls)):
            reached.append(True)
        return bool(reached)

    return terminated
