"""Compiles the C++ kernels for this machine, once, and registers them with XLA.

The library is in $XDG_CACHE_HOME/wirings or ~/.cache/wirings, under a name that changes
with the sources, the compiler, the processor and jaxlib. Without a C++ compiler, or if
the build fails (as on x86-64 without AVX), `load` returns None and the lowerings in
plain JAX are used.
$CXX selects the compiler, with arguments if need be ("ccache g++"); CXX=none turns the
kernels off.
"""

import ctypes
import hashlib
import importlib.metadata
import os
import pathlib
import shlex
import shutil
import subprocess
import tempfile
import threading
import time

import jax
from absl import logging

SOURCES = pathlib.Path(__file__).parent
CALLS = (
    "convolve",
    "kernel_gradient",
    "sparse_convolve",
    "values_gradient",
    "weighted_sum",
    "weights_gradients",
    "map_moments",
    "gradient_moments",
)
COMPILERS = ("c++", "g++", "clang++")
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared"),
    # No function that takes vectors is called from outside, so their ABI is free.
    *("-Wall", "-Wextra", "-Werror", "-Wno-psabi"),
)
# Of the build: ValueError for a $CXX with an open quotation mark, AttributeError for a
# library without our functions.
FAILURES = OSError, subprocess.SubprocessError, AttributeError, ValueError
DRAFT = "build-"  # prefix of the folder of a build
OLD_SECONDS = 24 * 3600.0  # a build takes ten
_lock, _loaded = threading.Lock(), {}


def load(flags: tuple[str, ...] = ()) -> str | None:
    """Returns the prefix of the registered XLA calls, or None without kernels.

    The first call in a process may compile, which takes about ten seconds. flags: added
    to FLAGS.
    """
    with _lock:
        if "prefix" not in _loaded:
            try:
                _loaded["prefix"] = register(build(flags))
            except FAILURES as error:
                reason = getattr(error, "stderr", None) or str(error)
                logging.info(
                    "no C++ kernels, convolutions are slower on CPU: %s",
                    reason.strip().splitlines()[0] if reason.strip() else repr(error),
                )
                _loaded["prefix"] = None
        return _loaded["prefix"]


def reset() -> None:
    """Makes the next `load` look for the compiler and the library again.

    Also makes jax trace all functions again, because they may call the library.
    """
    with _lock:
        _loaded.clear()
    jax.clear_caches()


def build(flags: tuple[str, ...] = ()) -> pathlib.Path:
    """Returns the library, compiled now unless it is in the cache.

    flags: added to FLAGS. Raises OSError without a compiler, ValueError if $CXX is no
    command, and SubprocessError if the compiler fails.
    """
    compiler = find_compiler()
    command = [*compiler, *FLAGS, *flags]
    # The compiler's own macros name its version and the processor's instructions.
    macros = _run([*command, "-dM", "-E", "-x", "c++", os.devnull])
    files = [*sorted(SOURCES.glob("*.h")), SOURCES / "kernels.cc"]
    digest = hashlib.sha256(
        f"{importlib.metadata.version('jaxlib')} {command} {macros}".encode()
    )
    for file in files:
        digest.update(file.read_bytes())
    library = _folder() / f"kernels-{digest.hexdigest()[:16]}.so"
    if _is_whole(library):
        return library
    started = time.perf_counter()
    library.parent.mkdir(parents=True, exist_ok=True)
    _remove_old_drafts(library.parent)
    # Renaming a finished draft, so that the final name is always a whole library's,
    # even if processes build at the same time or are killed.
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=DRAFT) as folder:
        output = pathlib.Path(folder) / library.name
        headers = f"-isystem{jax.ffi.include_dir()}"  # no warnings from there
        _run([*command, headers, str(SOURCES / "kernels.cc"), "-o", str(output)])
        if not output.is_file():
            name = shlex.join(compiler)
            raise OSError(f"{name} wrote no library: is it a C++ compiler?")
        with output.open("ab") as file:
            file.write(_digest(output.read_bytes()))
        os.replace(output, library)
    seconds = time.perf_counter() - started
    logging.info("compiled C++ kernels for this CPU in %.1f s: %s", seconds, library)
    return library


def find_compiler() -> list[str]:
    """Returns the command of the C++ compiler.

    Raises OSError if there is none, and ValueError if $CXX is no command.
    """
    chosen = os.environ.get("CXX", "").strip()
    commands = [chosen] if chosen else COMPILERS
    for command in commands:
        name, *arguments = shlex.split(command)
        if path := shutil.which(name):
            return [path, *arguments]
    raise OSError(f"no C++ compiler found ({', '.join(commands)})")


def register(library: pathlib.Path) -> str:
    """Registers the calls of a library; returns their prefix."""
    functions = ctypes.CDLL(str(library))
    # Unique, because XLA's compilation cache knows a call only by its name.
    prefix = f"wirings_{library.stem.replace('-', '_')}_"
    for name in CALLS:
        capsule = jax.ffi.pycapsule(getattr(functions, name))
        jax.ffi.register_ffi_target(f"{prefix}{name}", capsule, platform="cpu")
    return prefix


def _is_whole(library: pathlib.Path) -> bool:
    """Returns whether the library ends with its digest.

    Loading a truncated one, which a full disk or a power cut can leave, may crash.
    """
    try:
        content = library.read_bytes()
    except OSError:
        return False
    return content[-32:] == _digest(content[:-32])


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _remove_old_drafts(folder: pathlib.Path) -> None:
    """Removes what killed builds have left behind."""
    for path in folder.glob(f"{DRAFT}*"):
        try:
            if time.time() - path.stat().st_mtime > OLD_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
        except FileNotFoundError:  # another process has just finished
            pass


def _run(command: list[str]) -> str:
    options = dict(check=True, capture_output=True, text=True, errors="replace")
    return subprocess.run(command, **options).stdout


def _folder() -> pathlib.Path:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(home).expanduser() / "wirings"
