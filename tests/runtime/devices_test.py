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


@pytest.mark.parametrize("name", ["jax_disable_jit", "jax_enable_x64"])
def test_a_setting_that_no_run_supports_is_named(name):
    jax.config.update(name, True)
    try:
        with pytest.raises(ValueError, match=words(f"{name.upper()} unset")):
            make_mesh()
    finally:
        jax.config.update(name, False)
