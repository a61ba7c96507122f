import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimizers
from configs import cfmz, common, xdensenet


def run(optimizer, gradients, start=1.0):
    """Returns the value of a parameter after each step."""
    parameter = jnp.asarray(start)
    state, values = optimizer.init(parameter), []
    for gradient in gradients:
        updates, state = optimizer.update(jnp.asarray(gradient), state, parameter)
        parameter = optax.apply_updates(parameter, updates)
        values.append(float(parameter))
    return values


def drop_at(step, before=0.1, after=0.01):
    return lambda count: jnp.where(count < step, before, after)


def test_torch_form_follows_its_recurrence():
    gradients, p, v, wanted = [0.5, -1.0, 2.0, 0.25], 1.0, 0.0, []
    for i, g in enumerate(gradients):
        v = 0.9 * v + (g + 0.1 * p)
        p -= (0.1 if i < 2 else 0.01) * v
        wanted.append(p)
    torch = optimizers.sgd(drop_at(2), momentum=0.9, weight_decay=0.1)
    np.testing.assert_allclose(run(torch, gradients), wanted, rtol=1e-6)


def test_nesterov_form_follows_its_recurrence():
    gradients, p, v, wanted = [0.5, -1.0, 2.0, 0.25], 1.0, 0.0, []
    for g in gradients:
        g += 0.1 * p
        v = 0.9 * v + g
        p -= 0.1 * (g + 0.9 * v)
        wanted.append(p)
    form = optimizers.sgd(0.1, momentum=0.9, nesterov=True, weight_decay=0.1)
    np.testing.assert_allclose(run(form, gradients), wanted, rtol=1e-6)


def test_neon_form_follows_its_recurrence():
    gradients, p, v, wanted = [0.5, -1.0, 2.0, 0.25], 1.0, 0.0, []
    for i, g in enumerate(gradients):
        v = 0.9 * v - (0.1 if i < 2 else 0.01) * (g + 0.1 * p)
        p += v
        wanted.append(p)
    options = dict(momentum=0.9, weight_decay=0.1, rate_in_velocity=True)
    neon = optimizers.sgd(drop_at(2), **options)
    np.testing.assert_allclose(run(neon, gradients), wanted, rtol=1e-6)


def test_the_forms_differ_only_after_a_drop_of_the_rate():
    gradients = [1.0, -0.5, 0.25, 1.0]
    forms = [
        run(optimizers.sgd(drop_at(2), momentum=0.9, rate_in_velocity=x), gradients)
        for x in (False, True)
    ]
    np.testing.assert_allclose(forms[0][:2], forms[1][:2], rtol=1e-6)
    # neon's velocity still holds the old rate: a difference of a step, not of bits.
    assert abs(forms[0][2] - forms[1][2]) > 0.01
    constant = [
        run(optimizers.sgd(0.1, momentum=0.9, rate_in_velocity=x), gradients)
        for x in (False, True)
    ]
    np.testing.assert_allclose(constant[0], constant[1], rtol=1e-6)


def test_cfmz_drops_the_rate_at_the_steps_of_the_original():
    config = cfmz.get_config()
    rate = optimizers.schedule(config, 50_000)
    rates = {step: float(rate(step)) for step in (0, 35_156, 35_157, 52_734, 52_735)}
    np.testing.assert_allclose(list(rates.values()), [0.1, 0.1, 0.01, 0.01, 0.001])
    assert float(rate(70_312)) == pytest.approx(0.001)


def test_xnets_do_not_go_below_the_minimal_rate():
    config = xdensenet.get_config()
    config.optimizer.drop_epochs = (1.0, 2.0, 3.0)
    rate = optimizers.schedule(config, 640)
    np.testing.assert_allclose(
        [rate(s) for s in (9, 10, 20, 30)], [0.1, 0.01, 0.001, 5e-4]
    )


def test_invalid_recipes_are_rejected():
    config = xdensenet.get_config()
    recipe = config.optimizer
    recipe.drop_epochs = (225.0, 150.0)
    with pytest.raises(ValueError, match=r"225\.0, 150\.0.*must increase"):
        optimizers.schedule(config, 50_000)
    recipe.drop_epochs = (149.9999, 150.0)  # two epochs in one step
    with pytest.raises(ValueError, match=r"117300, 117300.*must increase"):
        optimizers.schedule(config, 50_000)


def rates(steps, num_examples=1000, **fields):
    """Returns the rates at these steps: 10 epochs of 1,000 images, batches of 100."""
    config = xdensenet.get_config()
    config.train.update(batch_size=100, epochs=10.0)
    config.optimizer.update(dict(learning_rate=0.5, min_learning_rate=0.0) | fields)
    rate = optimizers.schedule(config, num_examples)
    return [float(rate(step)) for step in steps]


def test_an_epoch_listed_twice_drops_twice():
    found = rates([29, 30, 59, 60, 99], drop_epochs=(3.0, 6.0, 6.0))
    np.testing.assert_allclose(found, [0.5, 0.05, 0.05, 5e-4, 5e-4], rtol=1e-6)


def test_a_warm_up_is_a_line_from_zero():
    fields = dict(drop_epochs=(5.0,), warmup_epochs=2.0)
    found = rates([0, 5, 10, 19, 20, 49, 50], **fields)
    wanted = [0, 0.125, 0.25, 0.475, 0.5, 0.5, 0.05]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_a_cosine_of_rate_0_is_0():
    assert list(rates([0, 50], schedule="cosine", learning_rate=0.0)) == [0, 0]


def test_a_cosine_goes_from_the_warm_up_to_the_minimal_rate():
    whole = rates([0, 25, 50, 100], schedule="cosine")
    np.testing.assert_allclose(
        whole, [0.5, 0.25 * (1 + 0.5**0.5), 0.25, 0], rtol=1e-6, atol=1e-8
    )
    warmed = rates([0, 10, 20, 60, 100], schedule="cosine", warmup_epochs=2.0)
    np.testing.assert_allclose(warmed, [0, 0.25, 0.5, 0.25, 0], rtol=1e-6, atol=1e-8)


def test_one_cycle_is_three_straight_lines():
    steps = [0, 15, 30, 57, 58, 85, 100]
    found = rates(steps, schedule="one_cycle")
    low = 0.5 / 25
    slope = (0.5 - low) / 55
    wanted = [
        *(low, (low + 0.5) / 2, 0.5),
        *(0.5 - 27 * slope, 0.5 - 28 * slope, low, low / 1e4),
    ]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_a_warm_up_longer_than_the_run_is_rejected():
    for epochs in (10.0, -1.0):
        with pytest.raises(ValueError, match=r"warmup_epochs=.* of the 100 steps"):
            rates([0], schedule="cosine", warmup_epochs=epochs)


PARAMS = {
    "conv": {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([0.5])},
    "norm": {"scale": jnp.array([1.5]), "bias": jnp.array([-0.5])},
}


def trajectory(fields, gradients, rate=lambda step: 0.1 / (1 + step)):
    """Returns the parameters after each step with the optimizer of these fields."""
    recipe = xdensenet.get_config().optimizer
    recipe.update(fields)
    optimizer = optimizers.create(recipe, rate)
    params, state, found = PARAMS, optimizer.init(PARAMS), []
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        tree = jax.tree.map(lambda x, g=gradient: jnp.full_like(x, g), PARAMS)
        updates, state = update(tree, state, params)
        params = optax.apply_updates(params, updates)
        found.append(params)
    return found


def assert_equal(a, b, rtol=0.0):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol), a, b)


def test_adamw_follows_its_recurrence():
    """The decay is decoupled: it is not divided by the gradient's magnitude."""
    gradients, p, m, v, wanted = [0.5, -1.0, 2.0], 1.0, 0.0, 0.0, []
    for i, g in enumerate(gradients):
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        mean, square = m / (1 - 0.8 ** (i + 1)), v / (1 - 0.9 ** (i + 1))
        p -= 0.1 / (1 + i) * (mean / (square**0.5 + 0.01) + 0.2 * p)
        wanted.append(p)
    fields = dict(name="adamw", beta1=0.8, beta2=0.9, epsilon=0.01, weight_decay=0.2)
    found = [params["conv"]["kernel"][0] for params in trajectory(fields, gradients)]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("decay_on", ["auto", "all", "kernels"])
def test_the_chosen_parameters_decay(name, decay_on):
    """Without a gradient, an update is the decay alone."""
    fields = dict(name=name, decay_on=decay_on, weight_decay=0.1, nesterov=False)
    (params,) = trajectory(fields, [0.0])
    alone = decay_on == "kernels" or (decay_on, name) == ("auto", "adamw")
    decayed = jax.tree.map(lambda x: x * (1 - 0.1 * 0.1), PARAMS)
    wanted = decayed
    if alone:
        kernel = {"kernel": decayed["conv"]["kernel"]}
        wanted = PARAMS | {"conv": PARAMS["conv"] | kernel}
    assert_equal(params, wanted, rtol=1e-6)


def test_a_clipped_gradient_has_the_largest_norm():
    """Five gradients of 2 have the norm sqrt(20). The decay is not clipped."""
    fields = dict(weight_decay=0.1)
    clipped = trajectory(fields | {"clip_norm": 1.0}, [2.0, 0.01])
    assert_equal(clipped, trajectory(fields, [2 / 20**0.5, 0.01]), rtol=1e-6)
    # A smaller gradient is not changed, to the bit.
    assert_equal(
        trajectory(fields | {"clip_norm": 5.0}, [2.0]), trajectory(fields, [2.0])
    )


def test_an_unknown_name_is_refused_with_the_choices():
    config = common.base()
    config.optimizer.update(name="x", schedule="y")
    with pytest.raises(ValueError, match="name 'x': choose from sgd, adamw"):
        optimizers.create(config.optimizer, lambda _: 0.1)
    with pytest.raises(ValueError, match="schedule 'y': choose from steps, cosine"):
        optimizers.schedule(config, 9999)


def test_clipping_can_be_switched_on_in_a_run():
    """The state has the same paths, by which checkpoints are restored."""
    config, clipped = (common.base().optimizer for _ in range(2))
    clipped.clip_norm = 1.0
    plain, other = (
        jax.eval_shape(optimizers.create(x, lambda _: 0.1).init, PARAMS)
        for x in (config, clipped)
    )
    assert jax.tree.structure(plain) == jax.tree.structure(other)


@pytest.mark.parametrize(
    "fields", [{}, {"name": "adamw"}, {"clip_norm": 0.5, "decay_on": "kernels"}]
)
def test_accumulated_gradients_are_averaged_for_one_update(fields):
    rate = lambda step: 0.1 / (1 + step)
    found = trajectory(fields | {"accumulate_steps": 3}, [1.0, 2.0, 6.0, 0.5, 0.25, 0])
    # An update has the rate of the last of its steps: 2 and 5.
    updates = trajectory(fields, [3.0, 0.25], lambda update: rate(3 * update + 2))
    assert_equal(found[:2], [PARAMS, PARAMS])
    assert_equal(found[2:5], [updates[0]] * 3, rtol=1e-6)
    assert_equal(found[5], updates[1], rtol=1e-6)


def test_an_accumulation_must_fit_into_the_run():
    with pytest.raises(ValueError, match=r"accumulate_steps=101 .* the 100 steps"):
        rates([0], accumulate_steps=101)
    assert rates([0], accumulate_steps=100)
