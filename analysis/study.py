"""Compares wirings at equal price: trains every net of a study and tabulates them.

python -m analysis.study configs/studies/xnets.py:small --workdir=/tmp/xnets
python -m analysis.study configs/studies/xnets.py --workdir=/tmp/xnets --dry-run
python -m analysis.study configs/studies/xnets.py --workdir=/tmp/xnets --shard=0/4

A study file defines get_config(form), which returns the fields of study_plan.Study.
Each run is an ordinary one in WORKDIR/RUN/seedN, where RUN is BACKBONE-WIRING-WIDTH.
The same command resumes, and skips finished runs. Every process writes study.csv,
table.md and figure.png over all runs that have finished in WORKDIR, whichever process
trained them. Fields of every run are set by --config.FIELD=VALUE.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import pathlib
import re
import sys
import time
from collections.abc import Callable, Sequence

from runtime import processes

if __name__ == "__main__":
    processes.set_environment()  # before jax is imported

import jax
from absl import logging
from ml_collections import ConfigDict

import train
from analysis import study_results
from analysis.study_plan import EQUAL, Contestant, Run, Study, expand, load, make_runs
from runtime import checks, dispatch, resume
from runtime.clock import Clock
from runtime.devices import make_mesh, place
from runtime.workdir import changes


def shard(runs: Sequence[Run], which: str) -> Sequence[Run]:
    """Returns every N-th run for "I/N", with I from 0 to N - 1; all for ""."""
    if not which:
        return runs
    match = re.fullmatch(r"(\d+)/(\d+)", which)
    index, count = map(int, match.groups()) if match else (0, 0)
    if not index < count:
        raise ValueError(
            f"--shard={which}: expected I/N with I from 0 to N - 1, such as 0/4"
        )
    return runs[index::count]


def is_finished(run: Run) -> bool:
    """Whether the workdir holds this very run, complete."""
    old = resume.find(run.workdir)
    return bool(old) and old.complete and not changes(run.config, run.workdir)


def train_all(runs: Sequence[Run], log: Callable[[str], None] = print) -> list[str]:
    """Trains the runs that have not finished; returns one line for each that failed."""
    failures = []
    for number, run in enumerate(runs, start=1):
        head = f"[{number}/{len(runs)}] {run.name}"
        started = time.perf_counter()
        try:
            if is_finished(run):
                log(f"{head}: finished earlier")
                continue
            result = train.train_and_evaluate(run.config, run.workdir)
        except processes.Preempted:
            raise
        except Exception as error:  # must not stop the other runs
            logging.debug("traceback", exc_info=True)
            reason = f"{type(error).__name__}: {error}"
            failures.append(f"{run.name}: {reason}")
            log(f"{head} failed: {reason}")
            continue
        final, best = result["test_accuracy"], result["best_test_accuracy"]
        log(
            f"{head}: test error {1 - final:.2%}, best {1 - best:.2%} "
            f"({time.perf_counter() - started:.0f} s)"
        )
    return failures


def collect(runs: Sequence[Run]) -> list[study_results.Row]:
    """Returns one row per run, with results if it has finished."""
    fields = [x.name for x in dataclasses.fields(study_results.Row)]
    rows = []
    for run in runs:
        net, finished = run.contestant, is_finished(run)
        row = {name: getattr(net, name) for name in fields if hasattr(net, name)}
        row |= dict(seed=run.config.seed, finished=finished)
        if finished:
            row |= study_results.measure(run.workdir, run.config.train.batch_size)
        rows.append(study_results.Row(**row))
    return rows


def write_results(study: Study, runs: Sequence[Run], workdir: pathlib.Path) -> None:
    """Writes the results of all runs, whichever process trained them."""
    options = {x: getattr(study, x) for x in ("claim", "equal", "reference", "columns")}
    rows, written = collect(runs), None
    while rows != written:  # another process may have finished a run meanwhile
        study_results.write(workdir, rows, **options)
        rows, written = collect(runs), rows


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The measured duration of a step, and the duration of a run derived from it."""

    seconds_per_step: float
    steps: int
    seconds: float


def estimate(config: ConfigDict, steps: int = 3) -> Estimate:
    """Trains a few steps and extrapolates to the whole run.

    Counts an evaluated image as a third of a trained one, which computes a backward
    pass of twice the cost too. Compilation and checkpoints are not included.
    """
    mesh = make_mesh()
    _, data_set = checks.check_config(config, mesh)
    train_split, test_split, facts, _ = resume.load_data(data_set, config, None)
    checks.check_data(config, mesh, facts, test_split)
    program, state = train.create_train_state(config, facts)
    state, step = place(state, mesh), functools.partial(train.train_step, program)
    advance = dispatch.make_advance(config, step, mesh, train_split, facts, state, 0)
    clock = Clock.of(config, facts.num_train)
    sizes = [chunk.steps for chunk in itertools.islice(clock.chunks(0), steps + 1)]
    state, totals, _ = advance(state, sizes[0])  # not timed: includes start-up
    jax.block_until_ready(totals)
    started = time.perf_counter()
    for size in sizes[1:]:
        state, totals, _ = advance(state, size)
    jax.block_until_ready(totals)
    seconds = (time.perf_counter() - started) / max(sum(sizes[1:]), 1)
    images = len(test_split) * math.ceil(config.train.epochs / config.eval.every_epochs)
    evaluation = images / config.train.batch_size * seconds / 3
    return Estimate(seconds, clock.total, clock.total * seconds + evaluation)


def dry_run(runs: Sequence[Run]) -> None:
    """Prints the runs with their prices and an estimate of the remaining time."""
    print(f"{HEADER} {'s/step':>8} {'steps':>9} {'minutes':>9}")
    estimates, total = {}, 0.0
    for run in runs:
        line = describe(run.name, run.contestant)
        if is_finished(run):
            print(f"{line} {'finished':>28}")
            continue
        if run.contestant.run not in estimates:
            estimates[run.contestant.run] = estimate(run.config)
        cost = estimates[run.contestant.run]
        total += cost.seconds
        times = f"{cost.seconds_per_step:8.3f} {cost.steps:9,} {cost.seconds / 60:9.1f}"
        print(f"{line} {times}", flush=True)
    print(f"{len(runs)} runs, {total / 3600:.2f} hours left on this machine")


HEADER = f"{'run':40} {'parameters':>12} {'multiply-adds':>16} {'off by':>8}"


def describe(name: str, net: Contestant) -> str:
    """Returns a line under HEADER."""
    return f"{name:40} {net.parameters:12,} {net.macs:16,} {net.remainder:+8.2%}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("study", metavar="configs/studies/NAME.py[:FORM]")
    add("--workdir", required=True)
    add("--equal", choices=EQUAL, help="instead of the study's own")
    add("--seeds", type=int, help="instead of the study's own")
    add("--dry-run", action="store_true", help="print the runs and their time")
    add("--shard", default="", metavar="I/N", help="run I, I + N, ...; I from 0")
    options, overrides = parser.parse_known_args()
    if not options.workdir:
        parser.error("--workdir must not be empty")
    workdir = pathlib.Path(options.workdir).expanduser()
    try:
        given = {k: getattr(options, k) for k in ("equal", "seeds")}
        given = {k: value for k, value in given.items() if value is not None}
        study = dataclasses.replace(load(options.study), **given)
        shard([], options.shard)  # before the nets are counted
        contestants = expand(study, overrides)
        runs = make_runs(contestants, study.seeds, workdir)
        mine = shard([*{run.workdir: run for run in runs}.values()], options.shard)
        if options.dry_run:
            dry_run(mine)
            return
        lines = [HEADER, *(describe(net.run, net) for net in contestants)]
        print("\n".join(lines), flush=True)
        if contestants[0].config.train.compilation_cache:
            dispatch.use_compilation_cache()
        failures = train_all(mine, functools.partial(print, flush=True))
        write_results(study, runs, workdir)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except processes.Preempted as message:
        print(message, file=sys.stderr)
        sys.exit(128 + 15)  # as a shell reports SIGTERM
    except KeyboardInterrupt:
        sys.exit("interrupted; run the same command to resume")
    print((workdir / "table.md").read_text(), end="")
    print(f"results in {workdir}: study.csv, table.md, figure.png")
    if failures:
        sys.exit("\n".join([f"error: {len(failures)} runs failed:", *failures]))


if __name__ == "__main__":
    main()
