"""Simulates a full disk."""

import contextlib
import resource


@contextlib.contextmanager
def files_no_larger_than(size):
    """Makes writes of more bytes to a file fail with OSError, also in C++ threads."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
