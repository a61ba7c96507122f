"""Environment variables of JAX that make a run impossible."""

import jax
import pytest

from runtime.devices import make_mesh
from tests.support.words import words


@pytest.mark.parametrize(
    ("error", "reason"),
    [(AssertionError(), "plugin"), (RuntimeError("no backend 'cuda'"), "no backend")],
)
def test_a_platform_without_devices_is_named(monkeypatch, error, reason):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    remedy = "unset JAX_PLATFORMS=cpu"
    with pytest.raises(ValueError, match=words(f"JAX_PLATFORMS= {reason} {remedy}")):
        make_mesh()


def test_a_run_without_jit_is_refused():
    with (
        jax.disable_jit(),
        pytest.raises(ValueError, match=words("JAX_DISABLE_JIT unset")),
    ):
        make_mesh()
