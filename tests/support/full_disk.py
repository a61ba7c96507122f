"""Simulates a full disk."""

import contextlib
import resource


@contextlib.contextmanager
def files_no_larger_than(size):
    """Writing more bytes to a file is an OSError, also in threads of C++."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
