"""Many short runs of main.py: imports everything once and forks for each run."""

import json
import os
import runpy
import signal
import sys
import tempfile
import traceback

RUN_SECONDS = 300  # ends what hangs


def run(arguments: list[str]) -> dict:
    """Returns the exit code, standard output and standard error of one run."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os._exit(main(arguments))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [file.seek(0) or file.read() for file in (out, err)]
    return {"code": code, "out": texts[0], "err": texts[1]}


def main(arguments: list[str]) -> int:
    """Runs main.py as the interpreter does and returns its exit code."""
    signal.alarm(RUN_SECONDS)
    sys.argv = ["main.py", *arguments]
    os.environ["GLIBC_TUNABLES"] = ""  # prevents the restart
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
    # Must not touch a device: a fork would not survive it.
    import train  # noqa: F401

    runs = json.load(sys.stdin)
    json.dump({name: run(arguments) for name, arguments in runs.items()}, sys.stdout)
