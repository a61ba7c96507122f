"""Trains or evaluates: python main.py --config=configs/xdensenet.py --workdir=/tmp/run

Only the flags are here; the work is in train.py, which a notebook can call.
"""

import os
import sys

from runtime import processes

if __name__ == "__main__":
    processes.set_environment()  # before jax is imported

import jax
from absl import app, flags, logging
from ml_collections import config_flags

import train
from runtime import command_line, dispatch, reporting
from runtime.workdir import runs

config_flags.DEFINE_config_file(
    "config", None, "configs/FAMILY.py:VARIANT,DATA,RECIPE, or the config.json of a run"
)
flags.DEFINE_string("workdir", None, "directory of the run; an existing run resumes")
flags.DEFINE_enum("mode", "train", ["train", "eval"], "train, or evaluate a checkpoint")
flags.DEFINE_bool("distributed", False, "whether this is one of several processes")
FLAGS = flags.FLAGS
FLAGS["config"].parser = command_line.ConfigParser()


def main(_):
    _log_plainly()
    work = dict(train=train.train_and_evaluate, eval=train.evaluate_checkpoint)
    try:
        if FLAGS.distributed:
            processes.join()
        if FLAGS.config.train.compilation_cache:
            dispatch.use_compilation_cache()
        results = []
        for config, workdir in runs(FLAGS.config, FLAGS.workdir):
            results.append(work[FLAGS.mode](config, workdir))
            if logging.level_info():  # process 0 alone prints
                print(reporting.final_summary(results[-1], workdir))
        if len(results) > 1 and logging.level_info():
            print(reporting.summarize_seeds(results))
    except (ValueError, FloatingPointError, OverflowError, OSError) as error:
        logging.debug("traceback", exc_info=True)
        sys.exit(f"error: {error}\n(--verbosity=1 shows where it was raised)")
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = (str(error) or "MemoryError").splitlines()[0]
        sys.exit(
            "error: out of memory; choose a smaller --config.train.batch_size or "
            ".eval.batch_size, or --config.train.dtype=bfloat16, or leave the images "
            f"on the host with --config.data.pipeline=tf.data ({reason})"
        )
    except processes.Preempted as message:
        print(message, file=sys.stderr)
        sys.exit(128 + 15)  # as a shell reports SIGTERM
    except KeyboardInterrupt:
        sys.exit("interrupted; run the same command to resume")


def _log_plainly():
    """Shows our progress lines and all warnings, without absl's prefix."""
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.INFO)
    here, handler = os.path.dirname(train.__file__), logging.get_absl_handler()

    def wanted(record):
        path = record.pathname
        ours = path.startswith(here) and "site-packages" not in path
        return ours or record.levelno >= logging.logging.WARNING

    handler.addFilter(wanted)
    handler.python_handler.setFormatter(logging.logging.Formatter("%(message)s"))


if __name__ == "__main__":
    app.run(main, flags_parser=command_line.parse)
