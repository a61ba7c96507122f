import functools
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import metrics
from runtime.checkpoints import (
    DELETED,
    REPLACED,
    WRITING,
    CheckpointError,
    Checkpoints,
)
from tests.support.checkpoints_saver import abstract, assert_same, make_state
from tests.support.full_disk import files_no_larger_than

# Orbax awaits one of several failing reads or writes; the others find its loop closed.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


def save_steps(workdir, steps, keep=2):
    """Saves make_state(step) at each step."""
    with Checkpoints(workdir, keep) as saved:
        for step in steps:
            saved.save(step, make_state(step))


def restored(workdir, which="last", template=None):
    with Checkpoints(workdir) as saved:
        return saved.restore(template or abstract(make_state()), which)


def files_below(folder):
    return sorted(str(path) for path in pathlib.Path(folder).rglob("*"))


def test_any_pytree_is_restored_bit_for_bit(tmp_path):
    state = make_state(4)
    wide = {"wide": np.arange(3, dtype=np.float64) / 3, "count": np.int64(1 << 40)}
    with Checkpoints(tmp_path) as saved:
        saved.save(4, state)
        got, step = saved.restore(abstract(state))
        saved.save(5, wide)
        got_wide, _ = saved.restore(wide)
    assert step == 4
    assert_same(got, state)
    assert isinstance(got.step, jax.Array)
    assert_same(got_wide, wide)  # numpy stays numpy; jax would truncate to 32 bits
    assert isinstance(got_wide["wide"], np.ndarray)


def test_state_may_be_overwritten_as_soon_as_save_returns(tmp_path):
    advance = jax.jit(lambda w: w * 3 + 1, donate_argnums=0)
    state, seen = {"w": jnp.arange(50_000.0), "host": np.zeros(50_000)}, {}
    with Checkpoints(tmp_path, keep=9) as saved:
        for step in range(1, 6):
            seen[step] = jax.tree.map(lambda x: np.array(x, copy=True), state)
            saved.save(step, state)
            given, state["w"] = state["w"], advance(state["w"])
            assert given.is_deleted()
            state["host"] += 1
        for step, wanted in seen.items():
            assert_same(saved.restore(wanted, step)[0], wanted)


def test_partial_restore_reads_only_the_wanted_arrays(tmp_path):
    state = make_state(4)
    wanted = {"params": abstract(state.params), "wiring": abstract(state.wiring)}
    with Checkpoints(tmp_path) as saved:
        saved.save(4, state)
        got, step = saved.restore(wanted, partial=True)
        with pytest.raises(CheckpointError, match=r"momentum/.*absent"):
            saved.restore(wanted)  # not by default
        wanted["more"] = jax.ShapeDtypeStruct((3,), jnp.float32)
        with pytest.raises(CheckpointError, match=r"more: absent, here float32\[3\]"):
            saved.restore(wanted, partial=True)
    assert step == 4
    assert_same(got, {"params": state.params, "wiring": state.wiring})


def mesh_of_eight():
    if jax.device_count() < 8:
        pytest.skip("needs 8 (simulated) devices")
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def test_restored_state_can_be_donated_on_many_devices(tmp_path):
    """Eight devices must hold copies of a host array, not views of it."""
    mesh = mesh_of_eight()
    everywhere = NamedSharding(mesh, PartitionSpec())
    template = jax.ShapeDtypeStruct((4096,), jnp.float32, sharding=everywhere)
    with Checkpoints(tmp_path) as saved:
        saved.save(1, {"w": jnp.ones(4096)})
        state, _ = saved.restore({"w": template})
    assert state["w"].sharding == everywhere
    add = jax.jit(lambda w: w + 1, donate_argnums=0)
    for shard in add(add(state["w"])).addressable_shards:
        np.testing.assert_array_equal(shard.data, np.full(4096, 3.0))


def test_moves_between_one_device_and_eight(tmp_path):
    mesh = mesh_of_eight()
    values = np.arange(16.0, dtype=np.float32).reshape(8, 2)
    one = jax.device_put(values, jax.devices()[0])
    with Checkpoints(tmp_path, keep=5) as saved:
        saved.save(0, {"w": one})
        for step, spec in enumerate([PartitionSpec(), PartitionSpec("data")]):
            sharding = NamedSharding(mesh, spec)
            template = jax.ShapeDtypeStruct((8, 2), np.float32, sharding=sharding)
            state, _ = saved.restore({"w": template}, step)
            assert state["w"].sharding == sharding
            np.testing.assert_array_equal(state["w"], values)
            saved.save(step + 1, state)  # from eight devices
        state, step = saved.restore({"w": one})
    assert step == 2
    assert state["w"].devices() == {jax.devices()[0]}
    np.testing.assert_array_equal(state["w"], values)


def test_retains_the_last_and_the_best(tmp_path):
    scores = {1: 0.2, 2: 0.9, 3: 0.9, 4: float("nan"), 5: 0.1, 6: None, 7: 0.8}
    with Checkpoints(tmp_path, keep=2) as saved:
        for step, score in scores.items():
            saved.save(step, make_state(step), score and {metrics.BEST_METRIC: score})
        saved.wait()
        assert saved.steps() == [2, 6, 7]
    assert_same(restored(tmp_path, "best")[0], make_state(2))  # the earliest of equals
    assert restored(tmp_path, "last")[1] == 7
    assert restored(tmp_path, 6)[1] == restored(tmp_path, "6")[1] == 6


@pytest.mark.parametrize("which", [3, "newest"])
def test_a_missing_checkpoint_error_lists_the_available_ones(tmp_path, which):
    save_steps(tmp_path, [1, 2])
    with pytest.raises(CheckpointError, match=f"{which}.*available: last, best, 1, 2"):
        restored(tmp_path, which)
    with pytest.raises(CheckpointError, match=r"checkpoint 'last' .*: none"):
        restored(tmp_path / "empty")


def test_without_an_evaluation_the_last_is_the_best(tmp_path):
    save_steps(tmp_path, [1, 2])
    assert restored(tmp_path, "best")[1] == 2


def test_equal_step_is_replaced(tmp_path):
    with Checkpoints(tmp_path) as saved:
        saved.save(1, make_state(1))
        saved.save(1, make_state(7), {metrics.BEST_METRIC: 0.5})
        best = saved.restore(abstract(make_state()), "best")[0]  # with its new row
        assert_same(best, make_state(7))
        assert os.listdir(saved.directory) == ["1"]


def test_kill_while_replacing_loses_nothing_and_is_cleaned_up(tmp_path):
    save_steps(tmp_path, [1, 2])
    folder = tmp_path / "checkpoints"
    (folder / "2").rename(folder / "2.replaced")
    shutil.copytree(folder / "1", folder / "2.orbax-checkpoint-tmp")
    shutil.copytree(folder / "1", folder / "0.deleted")
    before = files_below(tmp_path)
    got, step = restored(tmp_path)
    assert step == 2
    assert_same(got, make_state(2))
    assert files_below(tmp_path) == before  # reading changes nothing
    save_steps(tmp_path, [3])
    assert sorted(os.listdir(folder)) == ["2", "3"]
    assert restored(tmp_path, 2)[1] == 2


def flip(path, position):
    """Flips a bit at a relative position, 0 to 1."""
    data = bytearray(path.read_bytes())
    data[round(position * (len(data) - 1))] ^= 16
    path.write_bytes(data)


DAMAGES = {
    "first byte": functools.partial(flip, position=0),
    "a byte": functools.partial(flip, position=0.4),
    "last byte": functools.partial(flip, position=1),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "removed": pathlib.Path.unlink,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_in_any_file_never_gives_wrong_numbers(tmp_path, kind):
    """Restores either the newest checkpoint intact or the previous one."""
    save_steps(tmp_path / "good", [1, 2])
    newest = tmp_path / "good/checkpoints/2"
    files = [path for path in newest.rglob("*") if path.stat().st_size]
    files = [path.relative_to(newest) for path in files if path.is_file()]
    fallen_back = set()
    for file in files:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "run")
        DAMAGES[kind](tmp_path / "run/checkpoints/2" / file)
        got, step = restored(tmp_path / "run")
        assert_same(got, make_state(step))
        fallen_back |= {file.parts[0]} if step == 1 else set()
    assert fallen_back >= {"arrays", "table"}


def test_flipped_bit_in_an_array_is_named(tmp_path, caplog):
    """Only our digest detects it: orbax returns the wrong number."""
    noise = np.random.default_rng(0).bytes(4096)  # incompressible: stored as it is
    state = {"noise": np.frombuffer(noise, np.uint8), "other": np.zeros(9)}
    with Checkpoints(tmp_path) as saved:
        saved.save(1, state)
        saved.save(2, state)
    newest = tmp_path / "checkpoints/2"
    files = [path for path in newest.rglob("*") if path.is_file()]
    holders = [path for path in files if noise in path.read_bytes()]
    assert holders
    for path in holders:
        data = bytearray(path.read_bytes())
        data[data.find(noise) + 99] ^= 64
        path.write_bytes(data)
    assert restored(tmp_path, template=state)[1] == 1
    found = "1 digests differ, first noise"
    assert f"checkpoint {newest} is damaged: {found}" in caplog.messages
    with pytest.raises(CheckpointError, match=f"damaged:\n  2: {found}"):
        restored(tmp_path, 2, state)  # requested by number: no other is restored


def test_next_best_replaces_a_damaged_best(tmp_path):
    with Checkpoints(tmp_path, keep=3) as saved:
        for step, score in [(1, 0.7), (2, 0.9), (3, 0.8)]:
            saved.save(step, make_state(step), {metrics.BEST_METRIC: score})
    shutil.rmtree(tmp_path / "checkpoints/2/arrays")
    assert restored(tmp_path, "best")[1] == 3


def test_if_all_are_damaged_each_is_named_and_none_deleted(tmp_path):
    save_steps(tmp_path, [1, 2, 3], keep=3)
    folder = tmp_path / "checkpoints"
    shutil.rmtree(folder / "1")
    (folder / "1").mkdir()
    shutil.rmtree(folder / "2/arrays")
    (folder / "3/table/table.json").write_text('{"table": {')
    before = files_below(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        restored(tmp_path)
    lines = str(caught.value).splitlines()
    assert [line[:4] for line in lines[1:4]] == ["  3:", "  2:", "  1:"]
    assert max(map(len, lines)) < 400
    assert files_below(tmp_path) == before


def test_run_resumes_past_a_damaged_checkpoint(tmp_path):
    save_steps(tmp_path, [1, 2, 4])
    flip_me = tmp_path / "checkpoints/4/table/table.json"
    flip_me.write_text(flip_me.read_text().replace("float32", "float64"))
    with Checkpoints(tmp_path) as saved:
        assert saved.restore(abstract(make_state()))[1] == 2
        saved.save(3, make_state(3))
        saved.wait()
        assert saved.steps() == [2, 3, 4]  # the damaged one is not one of the last two
        saved.save(4, make_state(4))
        saved.wait()
        assert saved.steps() == [3, 4]
    assert_same(restored(tmp_path)[0], make_state(4))


def test_checkpoint_of_another_net_is_rejected_briefly(tmp_path):
    save_steps(tmp_path, [1])
    with Checkpoints(tmp_path) as saved:
        saved.save(2, make_state(2, channels=17))
    other = make_state()
    other.params["head"]["kernel"] = other.params["head"]["kernel"].astype("float32")
    other.params |= {f"blocks.{i}": np.zeros(3, "f4") for i in range(1, 99)}
    with pytest.raises(CheckpointError) as caught:  # and does not fall back to step 1
        restored(tmp_path, template=other)
    text = str(caught.value)
    assert "102 arrays differ" in text
    assert "params/head/kernel: bfloat16[17,10], here float32[16,10]" in text
    assert "params/blocks.1: absent, here float32[3]" in text
    assert str(tmp_path / "config.json") in text
    assert text.count("\n") < 10


def test_dtype_is_never_cast(tmp_path):
    save_steps(tmp_path, [1])
    template = abstract(make_state())
    template.step = jax.ShapeDtypeStruct((), jnp.float32)
    with pytest.raises(CheckpointError, match=r"step: int32\[\], here float32\[\]"):
        restored(tmp_path, template=template)


def test_leaves_that_cannot_be_saved_are_named(tmp_path):
    cases = {
        "name is <U1": {"name": "x"},
        "rng is key<fry>": {"rng": jax.random.key(0)},
        "none is float64.0,3.": {"none": np.zeros((0, 3))},
        "two leaves .* a/b": {"a": {"b": np.ones(1)}, "a/b": np.ones(1)},
    }
    with Checkpoints(tmp_path) as saved:
        for words, state in cases.items():
            with pytest.raises(CheckpointError, match=words):
                saved.save(1, state)


@pytest.mark.parametrize("limit", [0, 100_000])
def test_full_disk_is_an_error_and_good_checkpoints_stay(tmp_path, limit):
    """The write fails in the background, as if the disk filled up during the run."""
    save_steps(tmp_path, [1, 2])
    big = {"w": np.random.default_rng(0).normal(size=200_000)}
    with Checkpoints(tmp_path) as saved:
        with files_no_larger_than(limit):
            saved.save(2, big)  # moves the existing step 2 aside
            with pytest.raises(CheckpointError) as caught:
                saved.wait()
        for words in [str(saved.directory / "2"), "File too large", "still good: 1, 2"]:
            assert words in str(caught.value)
        assert len(str(caught.value)) < 600
        assert_same(saved.restore(abstract(make_state()))[0], make_state(2))
        saved.save(3, big)
    assert_same(restored(tmp_path, template=big)[0], big)


def test_too_little_space_is_noticed_before_writing(tmp_path, monkeypatch):
    save_steps(tmp_path, [1])
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with Checkpoints(tmp_path) as saved:
        with pytest.raises(CheckpointError, match=r"disk full: .* 100 free; .* 1"):
            saved.save(1, make_state(5))
        assert_same(saved.restore(abstract(make_state()))[0], make_state(1))


def test_failed_write_does_not_hide_an_earlier_error(tmp_path, caplog):
    def fail():
        with Checkpoints(tmp_path) as saved:
            saved.save(1, make_state())
            raise FloatingPointError

    with files_no_larger_than(0), pytest.raises(FloatingPointError):
        fail()
    assert "checkpoints/1 could not be written" in caplog.text


KILLS = [
    (suffix, number)  # the number of file system operations before the kill
    for number in (1, 10, 16)
    for suffix in (WRITING, REPLACED, DELETED)
]


@pytest.mark.slow
def test_every_checkpoint_of_a_killed_process_is_as_it_was_saved(tmp_path):
    """SIGKILL while writing, replacing and deleting; each process resumes the last."""
    root = pathlib.Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.checkpoints_saver", str(tmp_path)],
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    committed = "0"
    for suffix, number in KILLS:
        print(suffix, number, file=process.stdin, flush=True)
        while not (line := process.stdout.readline()).startswith("exit"):
            assert line, "the saver has failed"
            committed = line
        assert line.split() == ["exit", str(-signal.SIGKILL)]
        with Checkpoints(tmp_path) as saved:
            assert any(name.endswith(suffix) for name in os.listdir(saved.directory))
            for step in saved.steps():
                got, _ = saved.restore(abstract(make_state()), step)
                assert_same(got, make_state(step))
            assert max(saved.steps(), default=0) >= int(committed)
    process.communicate()
    assert int(committed) >= 5  # the processes did not all die in their first save
    save_steps(tmp_path, [999])
    names = os.listdir(tmp_path / "checkpoints")
    assert all(map(str.isdecimal, names))
    assert len(names) <= 3


def test_log_of_a_save_is_empty(tmp_path, caplog):
    logging.set_verbosity(logging.INFO)
    save_steps(tmp_path, [1])
    assert restored(tmp_path)[1] == 1
    assert [record for record in caplog.records if record.name == "absl"] == []


def test_too_little_space_for_one_checkpoint_is_noticed_in_advance(
    tmp_path, monkeypatch
):
    state = {"kernel": jnp.zeros((5, 5)), "step": np.int32(0)}
    usage = shutil.disk_usage(tmp_path)._replace(free=103)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with Checkpoints(tmp_path) as checkpoints:
        message = "no checkpoint can be written to .* 104 bytes needed, 103 free"
        with pytest.raises(CheckpointError, match=message):
            checkpoints.check_room(state)
        checkpoints.check_room({"kernel": state["kernel"]})
    assert not any(tmp_path.iterdir())


def test_row_of_a_step(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": np.zeros(1)}, {"test_accuracy": 0.5})
        checkpoints.save(2, {"x": np.zeros(1)})
        checkpoints.wait()
        rows = [checkpoints.row(step) for step in (1, 2, 3)]
    assert rows == [{"test_accuracy": 0.5}, {}, {}]
