"""Compiles the train step for the mesh and feeds it batches, one dispatch at a time."""

import collections
import concurrent.futures
import itertools
import os
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

import input_pipeline
from runtime.devices import REPLICATED, SHARDED, STACKED, on_mesh, place, shard

# Dispatches that may wait while one is computed. They keep the devices busy, but each
# holds a batch in memory and delays the reaction to SIGTERM.
MAX_IN_FLIGHT = 4


def use_compilation_cache() -> None:
    """Stores compiled programs in the user's cache directory.

    The user's own settings (such as $JAX_COMPILATION_CACHE_DIR) have precedence.
    """
    if not jax.config.jax_enable_compilation_cache:
        return
    if not jax.config.jax_compilation_cache_dir:
        path = input_pipeline.cache_directory() / "jax"
        jax.config.update("jax_compilation_cache_dir", str(path))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    directory = jax.config.jax_compilation_cache_dir
    logging.info("compiled programs are cached in %s", directory)


def make_train_step(train_step: Callable, mesh: Mesh) -> Callable:
    """Returns a jitted (state, batch) -> (state, totals, bad_step) that donates state.

    train_step: (state, batch) -> state on one device's share, as train.train_step.
    Totals and bad_step are returned twice because those inside the state are donated
    to the next step, while the reporter fetches its copy during that step.
    """

    def step(state, batch):
        state = train_step(state, batch)
        return state, state.totals, state.bad_step

    return on_mesh(step, mesh, (REPLICATED, SHARDED), donate=0)


def make_device_steps(train_step: Callable, mesh: Mesh) -> Callable:
    """Returns a jitted (state, data, plans, count) -> (state, totals, bad_step).

    data: padded images and labels, replicated on every device. plans: K stacked plans
    (K, B, ...); the first `count` are run in one dispatch.
    """

    def steps(state, data, plans, count):
        def body(i, state):
            plan = jax.tree.map(lambda x: x[i], plans)
            return train_step(state, input_pipeline.apply_plan(*data, plan))

        # XLA:CPU runs loops on one thread, so a single step is not wrapped in one.
        if len(plans.index) == 1:
            state = body(0, state)
        else:
            state = jax.lax.fori_loop(0, count, body, state)
        return state, state.totals, state.bad_step

    in_specs = (REPLICATED, REPLICATED, STACKED, REPLICATED)
    return on_mesh(steps, mesh, in_specs, donate=0)


def make_advance(
    config: ConfigDict,
    train_step: Callable,
    mesh: Mesh,
    split: input_pipeline.Split,
    facts: input_pipeline.Facts,
    state,
    step: int,
) -> Callable:
    """Returns (state, count) -> (state, totals, bad_step): the next `count` steps.

    The first call continues at `step`; a count of 0 changes nothing. Compiles the
    program for full batches before it returns; the one for a smaller last batch of an
    epoch is compiled in another thread while the first steps run.
    """
    on_device = input_pipeline.pipeline(config.data) == "device"
    make = _device_path if on_device else _host_path
    abstract = jax.tree.map(  # the state itself is donated by the first step
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    logging.info("compiling the train step (seconds to minutes, unless it is cached)")
    started = time.perf_counter()
    advance = make(config, train_step, mesh, split, facts, abstract, step)
    logging.info("compiled in %.1f s", time.perf_counter() - started)
    in_flight = collections.deque()

    def advance_in_flight(state, count):
        if not count:
            return state, state.totals, state.bad_step
        state, totals, bad_step = advance(state, count)
        in_flight.append(bad_step)
        if len(in_flight) > MAX_IN_FLIGHT:
            jax.block_until_ready(in_flight.popleft())
        return state, totals, bad_step

    return advance_in_flight


def _device_path(config, train_step, mesh, split, facts, state, step):
    padded = split.padded(config.data.pad, config.data.border, facts.mean)
    data = place((padded, split.labels), mesh)
    plans = input_pipeline.plans(config, len(split), step)
    steps = make_device_steps(train_step, mesh)
    sizes = input_pipeline.batch_sizes(config, len(split))

    def stack(chunk):  # repeats the last plan, so that one program fits all chunks
        size = len(chunk[0].index)
        # A smaller batch is dispatched alone.
        length = config.train.steps_per_dispatch if size == sizes[0] else 1
        chunk = chunk + chunk[-1:] * (length - len(chunk))
        return place(jax.tree.map(lambda *x: np.stack(x), *chunk), mesh, STACKED)

    def compile_for(size):
        plan = input_pipeline.plan(config, len(split), 0)
        plan = jax.tree.map(lambda x: x[:size], plan)
        return steps.lower(state, data, stack([plan]), 1).compile()

    program = _programs(compile_for, sizes)

    def advance(state, count):
        chunk = list(itertools.islice(plans, count))
        return program(len(chunk[0].index))(state, data, stack(chunk), count)

    return advance


def _host_path(config, train_step, mesh, split, facts, state, step):
    def start():
        batches = input_pipeline.batches(
            config, "train", step, examples=split, mean=facts.mean
        )
        return itertools.chain([next(batches)], batches)

    def compile_for(size):
        rows = size // jax.process_count()
        image = np.zeros((rows, *split.image_shape), np.uint8)
        batch = shard({"image": image, "label": np.zeros(rows, np.int32)}, mesh)
        return make_train_step(train_step, mesh).lower(state, batch).compile()

    # TensorFlow is imported and the first batch made while the step compiles.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        started = thread.submit(start)
        sizes = input_pipeline.batch_sizes(config, len(split))
        program = _programs(compile_for, sizes)
        batches = started.result()

    def advance(state, count):
        batch = shard(next(batches), mesh)
        return program(len(batch["label"]))(state, batch)

    return advance


def _programs(compile_for: Callable, sizes: list[int]) -> Callable:
    """Returns size -> program: the first compiled now, the others in a thread."""
    first, *others = sizes
    program, thread = compile_for(first), concurrent.futures.ThreadPoolExecutor(1)
    later = {size: thread.submit(compile_for, size) for size in others}
    thread.shutdown(wait=False)
    return lambda size: program if size == first else later[size].result()
