import itertools

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimizers
from configs import cfmz, xdensenet
from optimizers import Clock, step_of_epoch


def test_cfmz_has_70313_steps_and_drops_after_35157_and_52735():
    config = cfmz.get_config()
    clock = Clock.of(config, 50_000)
    assert clock.total == 70_313
    rate = optimizers.schedule(config.optimizer, 50_000, 128)
    rates = [float(rate(step)) for step in (0, 35_156, 35_157, 52_734, 52_735, 70_312)]
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-6)


def test_the_rate_stays_above_its_minimum():
    config = xdensenet.get_config()
    rate = optimizers.schedule(config.optimizer, 50_000, 64)
    last = step_of_epoch(299, 50_000, 64)
    assert float(rate(last)) == pytest.approx(0.001)
    config.optimizer.min_learning_rate = 0.005
    rate = optimizers.schedule(config.optimizer, 50_000, 64)
    assert float(rate(last)) == pytest.approx(0.005)


def test_drops_that_fall_on_one_step_are_refused():
    config = cfmz.get_config()
    config.optimizer.drop_epochs = (0.001, 0.002)
    with pytest.raises(ValueError, match=r"\(0.001, 0.002\).*\[1, 1\].*increase"):
        optimizers.schedule(config.optimizer, 50_000, 128)


@pytest.mark.parametrize("every", [0.3, 1.0, 2.5])
def test_evaluations_end_their_intervals_and_the_run(every):
    config = cfmz.get_config()
    config.train.update(batch_size=7, epochs=5.0)
    config.eval.every_epochs = every
    clock = Clock.of(config, 100)
    stops = [0]
    while stops[-1] < clock.total:
        stops.append(clock.next_eval(stops[-1]))
    count = int(5 / every + 1e-9)
    expected = {step_of_epoch(i * every, 100, 7) for i in range(1, count + 1)}
    assert stops[1:] == sorted(expected | {clock.total})
    # Wherever a run resumes, it stops at the same steps.
    for before, after in itertools.pairwise(stops):
        assert {clock.next_eval(step) for step in range(before, after)} == {after}


def run(transform, gradients, p=1.0):
    p = jnp.asarray(p)
    state = transform.init(p)
    path = []
    for g in gradients:
        update, state = transform.update(jnp.asarray(g), state, p)
        p = optax.apply_updates(p, update)
        path.append(float(p))
    return path


def by_hand(rates, gradients, momentum, decay, *, nesterov=False, inside=False, p=1.0):
    """The update rules as the originals' documents write them."""
    v, path = 0.0, []
    for rate, g in zip(rates, gradients, strict=True):
        g = g + decay * p
        if inside:  # neon
            v = momentum * v - rate * g
            p = p + v
        else:  # torch
            v = momentum * v + g
            p = p - rate * (g + momentum * v if nesterov else v)
        path.append(p)
    return path


RATES, GRADIENTS = [0.1, 0.1, 0.01, 0.01], [1.0, -0.5, 0.25, 2.0]


@pytest.mark.parametrize(
    ("nesterov", "inside"), [(False, False), (True, False), (False, True)]
)
def test_sgd_follows_its_original_through_a_drop_of_the_rate(nesterov, inside):
    rate = optax.piecewise_constant_schedule(0.1, {2: 0.1})
    transform = optimizers.sgd(
        rate,
        momentum=0.9,
        nesterov=nesterov,
        rate_in_velocity=inside,
        weight_decay=0.01,
    )
    expected = by_hand(RATES, GRADIENTS, 0.9, 0.01, nesterov=nesterov, inside=inside)
    np.testing.assert_allclose(run(transform, GRADIENTS), expected, rtol=1e-6)


def test_the_two_velocities_differ_only_when_the_rate_changes():
    inside, outside = (
        by_hand(RATES, GRADIENTS, 0.9, 0.01, inside=inside) for inside in (True, False)
    )
    np.testing.assert_allclose(inside[:2], outside[:2])
    assert abs(inside[2] - outside[2]) > 1e-3


def test_nesterov_with_the_rate_inside_is_refused():
    config = cfmz.get_config()
    config.optimizer.nesterov = True
    with pytest.raises(ValueError, match="no original has both"):
        optimizers.create(config.optimizer, 0.1)
