"""Trains or evaluates: python main.py --config=configs/xdensenet.py --workdir=/tmp/run

Flags only; the work is in train.py, which a notebook can call.
"""

import os
import sys

from runtime import environment

if __name__ == "__main__":
    environment.settle()  # before jax is imported

import jax
from absl import app, flags, logging
from ml_collections import config_flags

import train
from runtime import preflight, reporting

config_flags.DEFINE_config_file("config", None, "configs/FAMILY.py:VARIANT,DATA,RECIPE")
flags.DEFINE_string("workdir", None, "where the run lives; an existing one resumes")
flags.DEFINE_enum("mode", "train", ["train", "eval"], "train, or evaluate a checkpoint")
flags.DEFINE_bool("distributed", False, "this is one of several processes of a run")
flags.mark_flags_as_required(["config", "workdir"])
FLAGS = flags.FLAGS


def main(_):
    _log_plainly()
    work = dict(train=train.train_and_evaluate, eval=train.evaluate_checkpoint)
    try:
        if FLAGS.distributed:
            preflight.join_processes()
        preflight.use_compilation_cache(FLAGS.config)
        for config, workdir in preflight.runs(FLAGS.config, FLAGS.workdir):
            result = work[FLAGS.mode](config, workdir)
            if logging.level_info():  # not in the other processes of several
                print(reporting.final_summary(result, workdir))
    except (ValueError, FloatingPointError, OverflowError, OSError) as error:
        logging.debug("traceback", exc_info=True)
        sys.exit(f"error: {error}\n(--verbosity=1 shows where it was raised)")
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = (str(error) or "MemoryError").splitlines()[0]
        sys.exit(
            "error: out of memory; choose a smaller --config.train.batch_size or "
            f".eval.batch_size, or --config.train.dtype=bfloat16 ({reason})"
        )
    except train.Preempted as message:
        print(message, file=sys.stderr)
        sys.exit(128 + 15)  # as a shell reports SIGTERM
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from the last checkpoint")


def _log_plainly():
    """Our progress lines and everybody's warnings, without absl's prefix."""
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.INFO)
    here, handler = os.path.dirname(train.__file__), logging.get_absl_handler()

    def wanted(record):
        ours = record.pathname.startswith(here)
        return ours or record.levelno >= logging.logging.WARNING

    handler.addFilter(wanted)
    handler.python_handler.setFormatter(logging.logging.Formatter("%(message)s"))


if __name__ == "__main__":
    app.run(main, flags_parser=preflight.parsed)
