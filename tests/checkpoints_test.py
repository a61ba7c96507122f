import dataclasses
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import checkpoints_saver
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from absl import logging
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import checkpoints
import metrics
from checkpoints import CheckpointError, Checkpoints


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    step: jax.Array
    params: dict
    momentum: tuple
    wiring: dict


def make_state(seed=0, channels=16):
    """One of each: dataclass, dict of dicts, namedtuples, four dtypes, scalars."""
    random = np.random.default_rng(seed)
    kernel = random.normal(size=(3, 3, 4, channels)).astype(np.float32)
    head = random.normal(size=(channels, 10)).astype(jnp.bfloat16)
    params = {"blocks.0.conv": {"kernel": kernel}, "head": {"kernel": head}}
    momentum = optax.sgd(0.1, momentum=0.9).init(params)
    wiring = {"connections": random.integers(0, 99, (4, 7), np.int32)}
    wiring["frozen"] = np.array(seed % 2 == 0)
    state = State(np.int32(seed), params, momentum, wiring)
    return jax.tree.map(jnp.asarray, state)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def assert_same(got, wanted):
    """Same structure, dtypes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def accuracy(value):
    return {metrics.SELECTION: value, "test_loss": 1.0}


def save_steps(workdir, steps, keep=2):
    """Saves make_state(step) at each of the steps."""
    with Checkpoints(workdir, keep) as saved:
        for step in steps:
            saved.save(step, make_state(step))


def restored(workdir, which="last", template=None):
    with Checkpoints(workdir) as saved:
        return saved.restore(template or abstract(make_state()), which)


def files_below(folder):
    return sorted(str(path) for path in pathlib.Path(folder).rglob("*"))


def test_any_pytree_comes_back_bit_for_bit(tmp_path):
    state = make_state(4)
    with Checkpoints(tmp_path) as saved:
        saved.save(4, state)
        got, step = saved.restore(abstract(state))
    assert step == 4
    assert_same(got, state)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(got))


def test_template_of_numpy_arrays_gives_numpy_of_64_bits(tmp_path):
    state = {"wide": np.arange(3, dtype=np.float64) / 3, "count": np.int64(1 << 40)}
    with Checkpoints(tmp_path) as saved:
        saved.save(1, state)
        got, _ = saved.restore(state)
    assert_same(got, state)
    assert isinstance(got["wide"], np.ndarray)


def test_paths_on_disk_can_be_read(tmp_path):
    save_steps(tmp_path, [1])
    table = json.loads((tmp_path / "checkpoints/1/table/table.json").read_text())
    line = table["table"]["arrays"]["params/blocks.0.conv/kernel"]
    assert line[0] == "float32[3,3,4,16]"


def test_donated_state_is_saved_as_it_was(tmp_path):
    advance = jax.jit(
        lambda state: jax.tree.map(lambda x: x * 3 + 1, state), donate_argnums=0
    )
    state, seen = {"w": jnp.arange(50_000.0), "n": jnp.int32(1)}, {}
    with Checkpoints(tmp_path, keep=9) as saved:
        for step in range(1, 6):
            seen[step] = jax.tree.map(lambda x: np.array(x, copy=True), state)
            saved.save(step, state)
            kept, state = state, advance(state)
            assert kept["w"].is_deleted()
        for step, wanted in seen.items():
            assert_same(saved.restore(wanted, step)[0], wanted)


def test_restored_state_can_be_donated_on_many_devices(tmp_path):
    """Copies of one host array on eight devices must not be eight views of it."""
    if jax.device_count() < 8:
        pytest.skip("needs 8 (simulated) devices")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
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
    if jax.device_count() < 8:
        pytest.skip("needs 8 (simulated) devices")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
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


def test_keeps_the_last_and_the_best(tmp_path):
    scores = {1: 0.2, 2: 0.9, 3: 0.9, 4: float("nan"), 5: 0.1, 6: None, 7: 0.8}
    with Checkpoints(tmp_path, keep=2) as saved:
        for step, score in scores.items():
            saved.save(step, make_state(step), score and accuracy(score))
        saved.wait()
        assert saved.best_step() == 2  # the earliest of equals
        assert saved.steps() == [2, 6, 7]
    assert_same(restored(tmp_path, "best")[0], make_state(2))
    assert restored(tmp_path, "last")[1] == 7
    assert restored(tmp_path, 6)[1] == restored(tmp_path, "6")[1] == 6


@pytest.mark.parametrize("which", ["best", 3, "newest"])
def test_what_is_not_there_is_answered_with_what_is(tmp_path, which):
    save_steps(tmp_path, [1, 2])
    with pytest.raises(CheckpointError, match=f"{which}.*there are: last, 1, 2"):
        restored(tmp_path, which)
    with pytest.raises(CheckpointError, match=r"no checkpoint 'last' .*are: none"):
        restored(tmp_path / "empty")


def test_equal_step_is_replaced(tmp_path):
    with Checkpoints(tmp_path) as saved:
        saved.save(1, make_state(1))
        saved.save(1, make_state(7), accuracy(0.5))
        assert_same(saved.restore(abstract(make_state()))[0], make_state(7))
        assert saved.best_step() == 1
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
    assert files_below(tmp_path) == before  # reading touches nothing
    save_steps(tmp_path, [3])
    assert sorted(os.listdir(folder)) == ["2", "3"]
    assert restored(tmp_path, 2)[1] == 2


def flip(path):
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


DAMAGES = {
    "flipped": flip,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "removed": pathlib.Path.unlink,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_in_any_file_never_gives_wrong_numbers(tmp_path, kind):
    """The newest intact, or the one before it: nothing else may come out."""
    save_steps(tmp_path / "good", [1, 2])
    newest = tmp_path / "good/checkpoints/2"
    files = [path for path in newest.rglob("*") if path.stat().st_size]
    files = [path.relative_to(newest) for path in files if path.is_file()]
    random.seed(kind)
    fallen_back = set()
    for file in files * (3 if kind == "flipped" else 1):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "run")
        DAMAGES[kind](tmp_path / "run/checkpoints/2" / file)
        got, step = restored(tmp_path / "run")
        assert_same(got, make_state(step))
        fallen_back |= {file.parts[0]} if step == 1 else set()
    assert fallen_back >= {"arrays", "table"}


def test_flipped_bit_in_an_array_is_named(tmp_path, caplog):
    """The damage that only our digest sees: orbax returns the wrong number."""
    noise = np.random.default_rng(0).bytes(4096)  # stored as it is: incompressible
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
    assert caplog.messages == [f"checkpoint {newest} is damaged: {found}"]
    with pytest.raises(CheckpointError, match=f"damaged:\n  2: {found}"):
        restored(tmp_path, 2, state)  # asked for by number: no other will do


def test_damaged_best_gives_way_to_the_next_best(tmp_path):
    with Checkpoints(tmp_path, keep=3) as saved:
        for step, score in [(1, 0.7), (2, 0.9), (3, 0.8)]:
            saved.save(step, make_state(step), accuracy(score))
    shutil.rmtree(tmp_path / "checkpoints/2/arrays")
    assert restored(tmp_path, "best")[1] == 3


def test_all_damaged_names_each_and_deletes_nothing(tmp_path):
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


def test_run_goes_on_over_a_damaged_checkpoint(tmp_path):
    save_steps(tmp_path, [1, 2, 4])
    flip_me = tmp_path / "checkpoints/4/table/table.json"
    flip_me.write_text(flip_me.read_text().replace("float32", "float64"))
    with Checkpoints(tmp_path) as saved:
        assert saved.restore(abstract(make_state()))[1] == 2
        saved.save(3, make_state(3))
        saved.wait()
        assert saved.steps() == [2, 3, 4]  # the damaged one is none of the two kept
        saved.save(4, make_state(4))
        saved.wait()
        assert saved.steps() == [3, 4]
    assert_same(restored(tmp_path)[0], make_state(4))


def test_checkpoint_of_another_net_is_refused_in_few_words(tmp_path):
    save_steps(tmp_path, [1])
    with Checkpoints(tmp_path) as saved:
        saved.save(2, make_state(2, channels=17))
    other = make_state()
    other.params["head"]["kernel"] = other.params["head"]["kernel"].astype("float32")
    other.params |= {f"blocks.{i}": np.zeros(3, "f4") for i in range(1, 99)}
    with pytest.raises(CheckpointError) as caught:  # and no falling back to step 1
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


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"name": "x"}, "name is <U1"),
        ({"a": {"b": np.ones(1)}, "a/b": np.ones(1)}, "two leaves .* a/b"),
        ({"none": np.zeros((0, 3))}, r"none is float64\[0,3\]"),
    ],
)
def test_unstorable_leaves_are_named(tmp_path, state, words):
    with Checkpoints(tmp_path) as saved, pytest.raises(CheckpointError, match=words):
        saved.save(1, state)


def test_random_key_is_refused_by_name(tmp_path):
    with Checkpoints(tmp_path) as saved, pytest.raises(CheckpointError, match="rng"):
        saved.save(1, {"rng": jax.random.key(0)})


def test_full_disk_is_an_error_and_the_good_ones_stay(tmp_path):
    """The write fails in the background, as when the disk fills up meanwhile."""
    save_steps(tmp_path, [1, 2])
    big = {"w": np.random.default_rng(0).normal(size=200_000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path) as saved:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            saved.save(2, big)  # sets the step 2 that exists aside
            with pytest.raises(CheckpointError) as caught:
                saved.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        for words in [str(saved.directory / "2"), "File too large", "still good: 1, 2"]:
            assert words in str(caught.value)
        assert len(str(caught.value)) < 600
        saved.wait()  # reported once
        assert_same(saved.restore(abstract(make_state()))[0], make_state(2))
        saved.save(3, big)
    assert_same(restored(tmp_path, template=big)[0], big)


def test_too_little_room_is_seen_before_writing(tmp_path, monkeypatch):
    save_steps(tmp_path, [1])
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with Checkpoints(tmp_path) as saved:
        with pytest.raises(CheckpointError, match=r"disk full: .* 100 free; .* 1"):
            saved.save(1, make_state(5))
        assert_same(saved.restore(abstract(make_state()))[0], make_state(1))


def test_error_under_way_is_not_hidden_by_a_failed_write(tmp_path, monkeypatch):
    def fails():
        with Checkpoints(tmp_path) as saved:
            saved.save(1, make_state())
            monkeypatch.setattr(saved._orbax, "wait_until_finished", lambda: 1 / 0)
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        fails()


def test_killed_at_any_moment_every_checkpoint_is_what_was_saved(tmp_path):
    """SIGKILL of a process that does nothing but save; three times in one run."""
    random.seed(0)
    command = [sys.executable, checkpoints_saver.__file__, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    leftovers = 0
    for _ in range(3):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True
        )
        committed = [process.stdout.readline() for _ in range(3)][-1]
        time.sleep(random.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        committed = ([committed, *process.stdout.read().splitlines()])[-1]
        process.wait()
        with Checkpoints(tmp_path) as saved:
            steps = saved.steps()
            names = os.listdir(saved.directory)
            leftovers += sum(not name.isdecimal() for name in names)
            assert steps[-1] >= int(committed)
            for step in steps:
                got, _ = saved.restore(checkpoints_saver.state_at(0), step)
                assert_same(got, checkpoints_saver.state_at(step))
            assert saved.best_step() in steps
    assert leftovers, "no kill hit a write: the test has lost its meaning"
    with Checkpoints(tmp_path) as saved:
        saved.save(steps[-1] + 1, checkpoints_saver.state_at(0))
        saved.wait()
        assert len(saved.steps()) <= 3
        assert all(name.isdecimal() for name in os.listdir(saved.directory))


def test_log_of_a_save_is_empty(tmp_path, caplog):
    logging.set_verbosity(logging.INFO)
    save_steps(tmp_path, [1])
    assert restored(tmp_path)[1] == 1
    assert [record for record in caplog.records if record.name == "absl"] == []


def test_config_is_beside_them_sorted_and_comes_back_equal(tmp_path):
    config = ml_collections.ConfigDict(
        {"seed": 0, "net": {"name": "x", "blocks": (1, 2)}}
    )
    config.data = {"mean": (), "rate": 0.1, "flip": True, "none": None}
    checkpoints.save_config(tmp_path, config)
    assert checkpoints.load_config(tmp_path) == config
    text = (tmp_path / "config.json").read_text()
    assert text.index('"data"') < text.index('"net"') < text.index('"seed"')
    assert os.listdir(tmp_path) == ["config.json"]
    (tmp_path / "config.json").write_text(text[:-9])
    with pytest.raises(CheckpointError, match=r"config.json cannot be read"):
        checkpoints.load_config(tmp_path)
    with pytest.raises(CheckpointError, match="No such file"):
        checkpoints.load_config(tmp_path / "nothing")


def test_failed_text_leaves_the_old_one(tmp_path):
    path = tmp_path / "metrics.csv"
    checkpoints.write_text(path, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(
            CheckpointError, match=r"metrics.csv cannot be written: .*large"
        ):
            checkpoints.write_text(path, "new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old"
