"""Compiles programs that a test runs once, and looks into compiled programs."""

import functools
import re

import jax

import nets


def run_once(function):
    """Returns jax.jit of a function that takes longer to optimise than to run."""
    return jax.jit(function, compiler_options=options())


def run_optimised(function):
    """Returns jax.jit of a function that takes longer to run than to optimise.

    Higher levels take longer to compile and run no faster (measured on AlexNet).
    """
    optimised = {
        "xla_backend_optimization_level": 1,
        "xla_llvm_disable_expensive_passes": False,
    }
    return jax.jit(function, compiler_options=options() | optimised)


@functools.cache
def options() -> dict:
    """Returns the compiler options of `run_once`."""
    # The older emitters of XLA:CPU compile these nets 2.5 times faster than the
    # present ones (DenseNet-40 without optimisation: 7.6 s instead of 20 s). They will
    # be removed some day, and an unknown option is an error.
    options = nets.RUN_ONCE | {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda x: x, compiler_options=options)(0.0)
    except jax.errors.JaxRuntimeError:
        return nets.RUN_ONCE
    return options


def collectives(compiled) -> dict[str, int]:
    """Counts the collective operations of a compiled program by kind."""
    kinds = r"(all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute)"
    found = re.findall(rf" {kinds}(?:-start)?\(", compiled.as_text())
    return {kind: found.count(kind) for kind in set(found)}
