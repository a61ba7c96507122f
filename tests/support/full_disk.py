"""Simulates a full disk."""

import contextlib
import resource


@contextlib.contextmanager
def files_no_larger_than(size):
    """Makes writing more bytes to a file an OSError, also in threads of C++."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
