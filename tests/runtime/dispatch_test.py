"""The cache of compiled programs: the user's settings have precedence."""

import jax
import pytest

from runtime import dispatch

DIRECTORY = "jax_compilation_cache_dir"
SECONDS = "jax_persistent_cache_min_compile_time_secs"
SWITCH = "jax_enable_compilation_cache"


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """Resets the settings to JAX's defaults, and restores them at the end."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = {name: getattr(jax.config, name) for name in (DIRECTORY, SECONDS, SWITCH)}
    jax.config.update(DIRECTORY, None)
    jax.config.update(SECONDS, 1.0)
    yield lambda: (getattr(jax.config, DIRECTORY), getattr(jax.config, SECONDS))
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_stored_in_the_cache_directory(settings, tmp_path):
    dispatch.use_compilation_cache()
    assert settings() == (str(tmp_path / "wirings" / "jax"), 0.0)


def test_a_user_directory_is_used(settings):
    jax.config.update(DIRECTORY, "/mine")
    dispatch.use_compilation_cache()
    assert settings() == ("/mine", 1.0)


def test_a_user_minimum_time_is_used(settings, monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1.0")
    dispatch.use_compilation_cache()
    assert settings()[1] == 1.0


def test_a_disabled_cache_stays_disabled(settings):
    jax.config.update(SWITCH, False)
    dispatch.use_compilation_cache()
    assert settings() == (None, 1.0)
