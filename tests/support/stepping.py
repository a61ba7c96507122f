"""Tiny runs, and their steps one by one: for the tests of training."""

import functools
import logging
import re

import jax
import numpy as np

import input_pipeline
import train
from configs import common
from runtime.devices import make_mesh, place, shard
from runtime.dispatch import make_train_step
from tests.support import compiling, tiny

BATCH = 16
# Steps so long that a net leaves its surroundings multiply rounding errors.
SLOWLY = dict(optimizer__learning_rate=1e-4)


def save_images(path, size):
    """Images of two classes that differ in brightness."""
    random, arrays = np.random.default_rng(0), {}
    for split, count in (("train", 100), ("test", 30)):
        labels = np.arange(count) % 2
        noise = random.integers(0, 128, (count, size, size, 3))
        arrays[f"x_{split}"] = (noise + 100 * labels[:, None, None, None]).astype(
            "uint8"
        )
        arrays[f"y_{split}"] = labels
    np.savez(path, **arrays)
    return path


def configured(npz, name="densenet", **fields):
    """A tiny run: 2 epochs of 6.25 steps, an evaluation after each."""
    config = common.base()
    with config.net.unlocked():
        config.net.update(tiny.config(name, "expander", num_classes=2))
    config.data.update(name=str(npz), pad=1, pipeline="device")
    config.train.update(batch_size=BATCH, epochs=2.0, log_every_steps=3)
    config.train.update(tensorboard=False, compilation_cache=False)
    config.optimizer.update(drop_epochs=(1.5,), learning_rate=0.01)
    config.update_from_flattened_dict(
        {k.replace("__", "."): v for k, v in fields.items()}
    )
    return config


class Steps:
    """The steps of a configuration, one by one, over the first `devices`."""

    def __init__(self, config, devices):
        examples = input_pipeline.load(config.data, "train")
        self.mesh = make_mesh(jax.devices()[:devices])
        self.program, state = train.create_train_state(
            config, input_pipeline.facts(config.data, examples)
        )
        self.state = place(state, self.mesh)
        self.batches = input_pipeline.batches(config, "train", examples=examples)
        self.seen = 0.0
        batch = shard(next(input_pipeline.batches(config, "train")), self.mesh)
        train_step = functools.partial(train.train_step, self.program)
        step = make_train_step(train_step, self.mesh)
        options = compiling.options()
        self.compiled = step.lower(self.state, batch).compile(compiler_options=options)

    def loss(self):
        """That of the next step."""
        batch = shard(next(self.batches), self.mesh)
        self.state, totals, _ = self.compiled(self.state, batch)
        before, self.seen = self.seen, float(totals["loss"])
        return (self.seen - before) / BATCH

    def losses(self, count=4):
        return [self.loss() for _ in range(count)]


class Compilations(logging.Handler):
    """Names of the programs compiled while it is entered."""

    def __enter__(self):
        self.names, self.log = [], jax.log_compiles()
        self.log.__enter__()
        logging.getLogger("jax").addHandler(self)
        return self

    def __exit__(self, *error):
        logging.getLogger("jax").removeHandler(self)
        self.log.__exit__(*error)

    def emit(self, record):
        if found := re.match(
            r"Finished XLA compilation of jit\((.*?)\)", record.getMessage()
        ):
            self.names.append(found[1])
