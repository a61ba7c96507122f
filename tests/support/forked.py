"""Many short runs of main.py: everything is imported once, each run is a fork."""

import json
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback

RUN_SECONDS = 60


def run(arguments: list[str]) -> dict:
    """Exit code, standard output, standard error and seconds of one run."""
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os._exit(main(arguments))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [file.seek(0) or file.read() for file in (out, err)]
    seconds = time.monotonic() - started
    return {"code": code, "out": texts[0], "err": texts[1], "seconds": seconds}


def main(arguments: list[str]) -> int:
    """What the interpreter does with main.py, down to the exit code."""
    signal.alarm(RUN_SECONDS)
    sys.argv = ["main.py", *arguments]
    os.environ["GLIBC_TUNABLES"] = ""  # else main.py starts itself over
    try:
        runpy.run_path("main.py", run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
        if isinstance(code, str):
            code = print(code, file=sys.stderr) or 1
    except BaseException:
        code = traceback.print_exc() or 1
    if "tensorflow" in sys.modules:
        print("TensorFlow was imported", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    sys.path.insert(0, "")
    # None of these may touch a device: a fork would not survive it.
    import sklearn.datasets  # noqa: F401

    import train  # noqa: F401

    runs = json.load(sys.stdin)
    json.dump({name: run(arguments) for name, arguments in runs.items()}, sys.stdout)
