"""Compiling for tests: a program that runs once is not worth optimising."""

import functools

import jax

import nets


def run_once(function):
    """jax.jit of a function whose compilation costs more than its one call."""
    return jax.jit(function, compiler_options=_options())


@functools.cache
def _options() -> dict:
    # The older emitters of XLA:CPU compile these nets 2.5 times faster than the
    # present ones (without optimisation: 7.6 s against 20 s for DenseNet-40). They
    # will go some day, and an unknown option is an error.
    options = nets.RUN_ONCE | {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda x: x, compiler_options=options)(0.0)
    except jax.errors.JaxRuntimeError:
        return nets.RUN_ONCE
    return options
