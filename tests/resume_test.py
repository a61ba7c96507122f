"""A run that is killed, stopped or short of disk ends as if nothing had happened."""

import os
import pathlib
import resource
import signal

import pytest

from runtime import checkpoints
from tests.conftest import UNOPTIMISED
from tests.support import launch
from tests.support.launch import (
    TOTAL,
    arguments,
    assert_same_end,
    complete,
    kill_when,
    start,
)
from tests.support.mini_imagenet import write_folders

WRITING = checkpoints.WRITING


@pytest.fixture(scope="module")
def reference(cache):
    """The uninterrupted run."""
    return launch.reference(cache)


def kill(workdir, ready, cache, **fields):
    """Kills a run as soon as ready() holds, which must be before its end."""
    process = start(arguments(workdir, **fields), cache)
    killed = kill_when(process, ready)
    _, err = launch.finish(process)[1:]
    assert killed, err


def last(workdir):
    return max(launch.steps(workdir), default=0)


def after_steps(workdir, count):
    """Holds once checkpoints have advanced by this many steps."""
    first = last(workdir)
    return lambda: last(workdir) >= first + count


def drafts(workdir):
    folder = workdir / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return {name for name in names if WRITING in name}


def after_changes(workdir, count):
    """Holds once `count` changes to the folder of checkpoints have been seen."""
    folder = workdir / "checkpoints"
    seen = [set(os.listdir(folder))]

    def changed():
        now = set(os.listdir(folder))
        if now != seen[-1]:
            seen.append(now)
        return len(seen) > count

    return changed


def while_writing(workdir):
    """Holds while orbax writes a checkpoint."""
    old = drafts(workdir)
    return lambda: bool(drafts(workdir) - old)


def after_row(workdir):
    """Holds just after an evaluation, when its checkpoint is not written yet."""

    def changed():
        path = workdir / "metrics.csv"
        return path.stat().st_ino if path.exists() else None

    old = changed()
    return lambda: changed() != old


@pytest.mark.slow
def test_kills_at_any_time_do_not_change_the_result(tmp_path, cache, reference):
    """Also damages the newest checkpoint before the last run."""
    workdir = tmp_path / "run"
    kill(workdir, (workdir / "config.json").exists, cache)  # starting up
    kill(workdir, after_steps(workdir, 9), cache)
    for _ in range(5):
        kill(workdir, while_writing(workdir), cache)
        if drafts(workdir):
            break
    assert drafts(workdir), "never killed in the middle of a checkpoint"
    kill(workdir, after_row(workdir), cache)
    for count in (2, 5):
        kill(workdir, after_changes(workdir, count), cache)
    assert 0 < last(workdir) < TOTAL
    newest = workdir / "checkpoints" / str(last(workdir))
    files = filter(pathlib.Path.is_file, newest.rglob("*"))
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    said = complete(arguments(workdir), cache)
    assert f"checkpoint {newest} is damaged" in said
    assert f"resuming {workdir} from step" in said
    assert_same_end(workdir, reference)
    assert not drafts(workdir)


def assert_resumes(tmp_path, cache, at=18, total=TOTAL, env=None, **fields):
    """Asserts that a run resumed from a copy of another ends like that other run.

    The copy holds the files that a kill would leave. Returns the workdir of the resumed
    run and what it said.
    """
    options = dict(env=env or {})
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    process = start(arguments(whole, **fields), cache, **options)
    copied = launch.copy_when(process, after_steps(whole, at), whole, workdir)
    code, _, err = launch.finish(process)
    assert copied, err
    assert code == 0, err
    assert at <= last(workdir) < total
    said = complete(arguments(workdir, **fields), cache, **options)
    assert f"resuming {workdir} from step" in said
    assert_same_end(workdir, whole, total)
    return workdir, said


@pytest.mark.slow
def test_several_steps_a_dispatch_and_accumulated_gradients(tmp_path, cache):
    """Checkpoints follow every ninth step, updates every fourth."""
    assert_resumes(
        tmp_path,
        cache,
        train__steps_per_dispatch=4,
        optimizer__name="adamw",
        optimizer__clip_norm=1.0,
        optimizer__accumulate_steps=4,
    )


@pytest.mark.slow
def test_tf_data_without_the_cpp_kernels(tmp_path, cache):
    # Without the kernels, optimising the programs takes longer than the few steps.
    env = {"CXX": "none", "XLA_FLAGS": " ".join(UNOPTIMISED)}
    fields = dict(
        data__pipeline="tf.data",
        train__tensorboard=True,
        train__epochs=0.4,
        eval__every_epochs=0.2,
    )
    workdir, said = assert_resumes(tmp_path, cache, total=36, env=env, **fields)
    assert "no C++ kernels" in said
    assert list(workdir.glob("events.out.tfevents.*"))


@pytest.mark.slow
def test_sigterm_saves_first(tmp_path, cache, reference):
    workdir = tmp_path / "run"
    process = start(arguments(workdir, checkpoint__every_steps=0), cache)
    row = workdir / "metrics.csv"
    assert kill_when(process, row.exists, number=signal.SIGTERM)
    code, _, err = launch.finish(process)
    assert code == 128 + signal.SIGTERM
    *_, message = err.strip().splitlines()
    step = last(workdir)
    assert message.startswith(f"SIGTERM: saved step {step} in {workdir}")
    assert "AsyncError" not in err
    assert 0 < step < TOTAL
    complete(arguments(workdir), cache)
    assert_same_end(workdir, reference)


def test_complete_run_is_not_repeated(cache, reference):
    before = {p: p.stat().st_mtime_ns for p in reference.rglob("*")}
    code, out, err = launch.finish(start(arguments(reference), cache))
    assert code == 0, err
    assert f"{reference} already holds this run, complete" in err
    assert f"(step {TOTAL})" in out
    assert {p: p.stat().st_mtime_ns for p in reference.rglob("*")} == before


@pytest.mark.slow
def test_no_second_process_and_no_room_for_the_next_checkpoint(
    tmp_path, cache, reference
):
    workdir = tmp_path / "run"
    process = start(arguments(workdir), cache)
    assert kill_when(process, after_steps(workdir, 9), number=signal.SIGSTOP)
    code, _, err = launch.finish(start(arguments(workdir), cache))
    assert code == 1
    assert f"error: another process is training in {workdir}" in err
    # From here on it can write no file of more than a kilobyte.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, 1000))
    process.send_signal(signal.SIGCONT)
    refused(process, workdir)
    complete(arguments(workdir), cache)
    assert_same_end(workdir, reference)


@pytest.mark.slow
def test_full_disk(tmp_path, cache, reference):
    if os.system(f"mount -t tmpfs -o size=200k tmpfs {tmp_path} 2>/dev/null"):
        pytest.skip("a small file system cannot be mounted here")
    try:
        workdir = tmp_path / "run"
        # Neither do TensorBoard's events, which come late, hide the reason.
        run = arguments(workdir, train__tensorboard=True)
        refused(start(run, cache), workdir)
        os.system(f"mount -o remount,size=9m {tmp_path}")
        complete(arguments(workdir), cache)
        assert_same_end(workdir, reference)
    finally:
        os.system(f"umount {tmp_path}")


def refused(process, workdir):
    """The run ends with one error, and the last checkpoint before it is intact."""
    code, _, err = launch.finish(process)
    assert code == 1, err
    assert err.count("error: ") == 1
    assert "could not be written" in err
    assert "AsyncError" not in err
    assert 0 < last(workdir) < TOTAL
    assert launch.arrays(workdir)["step"] == last(workdir)  # intact


@pytest.mark.slow
def test_photographs_resume_exactly(tmp_path, cache):
    """With threads, smaller last batches, averaged weights, ghost groups, colours."""
    fields = dict(
        data__name=write_folders(tmp_path),
        data__crop="inception",
        data__image_size=32,
        data__pipeline="threads",
        net__num_classes=4,
        train__batch_size=24,  # the ninth of 200 images has 8
        train__epochs=4.0,
        train__last_batch="partial",
        train__batch_norm_groups=2,
        train__ema=0.9,
        augment__jitter=0.4,
        augment__lighting=0.1,
        augment__mixup=0.2,
        eval__every_epochs=1.0,
        checkpoint__every_steps=6,
        optimizer__drop_epochs="(2.0,3.0)",
    )
    env = {"XLA_FLAGS": " ".join(UNOPTIMISED)}  # few steps, many operations
    assert_resumes(tmp_path, cache, at=12, total=36, env=env, **fields)
