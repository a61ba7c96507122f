"""The device mesh, and how arrays are placed on it."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

REPLICATED, SHARDED = PartitionSpec(), PartitionSpec("data")
STACKED = PartitionSpec(None, "data")  # (steps, batch, ...)


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with one axis, 'data', over `devices` (default: all devices).

    Raises ValueError if JAX's environment variables make a run impossible.
    """
    devices = _all_devices() if devices is None else devices
    return jax.make_mesh(
        (len(devices),), ("data",), devices=devices, axis_types=(AxisType.Auto,)
    )


def _all_devices() -> list[jax.Device]:
    if jax.config.jax_disable_jit:
        raise ValueError(
            "JAX_DISABLE_JIT is set, but a run compiles its steps in advance: unset "
            "it; jax.debug.print and jax.debug.breakpoint also work in compiled steps"
        )
    if jax.config.jax_enable_x64:
        raise ValueError(
            "JAX_ENABLE_X64 is set, but a run stores its state in float32: unset it"
        )
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # "cuda" without CUDA: no message
        reason = str(error) or "its plugin is not installed, or finds no device"
        raise ValueError(
            f"JAX_PLATFORMS={jax.config.jax_platforms or ''} cannot be used here "
            f"({reason}): unset it, or set JAX_PLATFORMS=cpu"
        ) from error


def shard(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes global arrays, split over the data axis, from this process's rows."""
    sharding = NamedSharding(mesh, SHARDED)
    return {
        k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()
    }


def place(tree, mesh: Mesh, spec: PartitionSpec = REPLICATED):
    """Makes global arrays from arrays that every process holds in full.

    Unlike jax.device_put, which over several processes first compares all values:
    one collective and one wait per array.
    """
    sharding = NamedSharding(mesh, spec)

    def put(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)

    return jax.tree.map(put, tree)


def on_mesh(step: Callable, mesh: Mesh, in_specs: tuple, donate: int) -> Callable:
    """Returns `step` compiled to run on every device; its results are replicated.

    in_specs: how each argument is split. donate: the index of the donated argument.
    """
    # check_vma: the custom gradients of the lowerings do not carry its annotations.
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=in_specs, out_specs=REPLICATED, check_vma=False
    )
    return jax.jit(mapped, donate_argnums=donate)
