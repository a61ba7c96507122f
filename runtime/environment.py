"""What must be settled in the process before jax or TensorFlow is imported."""

import os
import sys

HUGE_PAGES = "glibc.malloc.hugetlb=1"


def settle() -> None:
    """Quiet TensorFlow, and huge pages for the CPU; may start the program over.

    XLA:CPU asks for its temporaries anew in every step, and the kernel hands them out
    in pages of 4 KB: DenseNet-40-24, batch 64, took 322,000 page faults and 0.6 s of
    system time a step; with glibc's huge pages 900 and 0.1 s (docs/speed.md). glibc
    reads the setting only when a process starts. Set GLIBC_TUNABLES to anything,
    the empty string included, to have it your way.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # else it explains it at length
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
