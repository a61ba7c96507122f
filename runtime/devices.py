"""How steps reach the devices: the mesh, batches on it, programs compiled for it."""

import concurrent.futures
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

import input_pipeline

REPLICATED, SHARDED = PartitionSpec(), PartitionSpec("data")
STACKED = PartitionSpec(None, "data")  # of several steps


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """These devices, or all of all processes, on one axis, 'data'."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(
        (len(devices),), ("data",), devices=devices, axis_types=(AxisType.Auto,)
    )


def shard(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch -> global arrays split over the data axis."""
    sharding = NamedSharding(mesh, SHARDED)
    return {
        k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()
    }


def place(tree, mesh: Mesh, spec: PartitionSpec = REPLICATED):
    """Arrays that every process has whole -> global ones.

    jax.device_put does it too, but over several processes it first compares all their
    values: a collective and a wait for each array.
    """
    sharding = NamedSharding(mesh, spec)

    def put(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)

    return jax.tree.map(put, tree)


def make_train_step(train_step: Callable, mesh: Mesh) -> Callable:
    """(state, batch) -> (state, totals, bad_step), to be compiled; donates the state.

    train_step: (state, batch) -> state on one device's share, as train.train_step.
    Totals and bad_step come back twice because those inside the state are donated
    to the next step, while the reporter fetches its copy during that step.
    """

    def step(state, batch):
        state = train_step(state, batch)
        return state, state.totals, state.bad_step

    return _mapped(step, mesh, (REPLICATED, SHARDED))


def make_device_steps(train_step: Callable, mesh: Mesh) -> Callable:
    """(state, data, plans, count) -> (state, totals, bad_step), to be compiled.

    data: padded images and labels, whole on every device; plans: K of them stacked
    (K, B, ...), of which the first `count` are carried out in one dispatch.
    """

    def steps(state, data, plans, count):
        def body(i, state):
            plan = jax.tree.map(lambda x: x[i], plans)
            return train_step(state, input_pipeline.apply_plan(*data, plan))

        # A loop of one step would only keep XLA:CPU from using its threads.
        if len(plans.index) == 1:
            state = body(0, state)
        else:
            state = jax.lax.fori_loop(0, count, body, state)
        return state, state.totals, state.bad_step

    return _mapped(steps, mesh, (REPLICATED, REPLICATED, STACKED, REPLICATED))


def _mapped(step: Callable, mesh: Mesh, in_specs: tuple) -> Callable:
    # check_vma: the custom gradients of the lowerings do not carry its annotations.
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=in_specs, out_specs=REPLICATED, check_vma=False
    )
    return jax.jit(mapped, donate_argnums=0)


def make_advance(
    config: ConfigDict,
    train_step: Callable,
    mesh: Mesh,
    examples: input_pipeline.Split,
    state,
    step: int,
) -> Callable:
    """(state, count) -> (state, totals, bad_step): the next `count` steps, from `step`.

    Returns when the program for whole batches is compiled; the one for a smaller last
    batch of a pass follows in another thread, while the first steps run.
    """
    make = _device_path if config.data.pipeline == "device" else _host_path
    abstract = jax.tree.map(  # the state itself is donated by the first step
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    return make(config, train_step, mesh, examples, abstract, step)


def _device_path(config, train_step, mesh, examples, state, step):
    num_examples = len(examples.labels)
    padded = input_pipeline.pad(config.data, examples)
    data = place((padded, examples.labels), mesh)
    plans = input_pipeline.plans(config, num_examples, step)
    steps = make_device_steps(train_step, mesh)
    sizes = input_pipeline.batch_sizes(config, num_examples)

    def length(size):  # of a stack: a smaller batch goes alone
        return config.train.steps_per_dispatch if size == sizes[0] else 1

    def compile_for(size):
        def stacked(x):
            shape = (length(size), size, *x.shape[1:])
            sharding = NamedSharding(mesh, STACKED)
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)

        plan = jax.tree.map(stacked, input_pipeline.plan(config, num_examples, 0))
        return steps.lower(state, data, plan, 1).compile()

    program = _programs(compile_for, sizes)

    def advance(state, count):
        chunk = list(itertools.islice(plans, count))
        size = len(chunk[0].index)
        chunk += chunk[-1:] * (length(size) - count)  # one shape, one program
        stacked = jax.tree.map(lambda *x: np.stack(x), *chunk)
        return program(size)(state, data, place(stacked, mesh, STACKED), count)

    return advance


def _host_path(config, train_step, mesh, examples, state, step):
    def start():
        batches = input_pipeline.batches(config, "train", step, examples=examples)
        return itertools.chain([next(batches)], batches)

    def compile_for(size):
        def array(shape, dtype):
            sharding = NamedSharding(mesh, SHARDED)
            return jax.ShapeDtypeStruct((size, *shape), dtype, sharding=sharding)

        image = array(examples.image_shape, jnp.uint8)
        batch = {"image": image, "label": array((), jnp.int32)}
        return make_train_step(train_step, mesh).lower(state, batch).compile()

    # TensorFlow is imported and the first batch made while the step compiles.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        started = thread.submit(start)
        sizes = input_pipeline.batch_sizes(config, len(examples.labels))
        program = _programs(compile_for, sizes)
        batches = started.result()

    def advance(state, count):
        batch = shard(next(batches), mesh)
        return program(len(batch["label"]))(state, batch)

    return advance


def _programs(compile_for: Callable, sizes: list[int]) -> Callable:
    """size -> program; the first is compiled now, the others in another thread."""
    programs = {sizes[0]: compile_for(sizes[0])}
    thread = concurrent.futures.ThreadPoolExecutor(1)
    later = {size: thread.submit(compile_for, size) for size in sizes[1:]}
    thread.shutdown(wait=False)

    def program(size):
        if size not in programs:
            programs[size] = later[size].result()
        return programs[size]

    return program
