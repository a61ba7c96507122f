import itertools

import pytest

from configs import cfmz, xdensenet
from runtime.clock import Clock, step_of_epoch, steps_per_epoch


def clock(images=1437, **fields):
    """A clock of 45 steps per epoch."""
    config = xdensenet.get_config("22-8-2,digits")
    config.update_from_flattened_dict(
        {k.replace("__", "."): v for k, v in fields.items()}
    )
    return Clock.of(config, images)


def ends(clock, action, start=0):
    """Returns the steps after which a run from `start` evaluates or saves."""
    return [chunk.end for chunk in clock.chunks(start) if getattr(chunk, action)]


def test_cfmz_takes_as_many_steps_as_the_original():
    assert Clock.of(cfmz.get_config(), 50_000).total == 70_313


@pytest.mark.parametrize("batch_size", [1, 7, 64, 128, 1000])
def test_an_epoch_begins_with_its_first_image(batch_size):
    """The stream of images has no gap between epochs."""
    for epoch in (0, 1, 2.5, 7, 90):
        step = step_of_epoch(epoch, steps_per_epoch(1000, batch_size))
        assert step * batch_size >= epoch * 1000
        assert (step - 1) * batch_size < epoch * 1000


@pytest.mark.parametrize("batch_size", [7, 64, 100])
def test_with_partial_batches_an_epoch_is_whole_steps(batch_size):
    per_epoch = -(-1000 // batch_size)
    for epoch in (0, 1, 7, 90):
        found = steps_per_epoch(1000, batch_size, partial=True)
        assert step_of_epoch(epoch, found) == epoch * per_epoch
    assert step_of_epoch(2.5, steps_per_epoch(1000, 64, partial=True)) == 40


@pytest.mark.parametrize(
    ("epochs", "every_epochs", "expected"),
    [
        (3.0, 1.0, [45, 90, 135]),
        (1.0, 0.4, [18, 36, 45]),  # the last interval is shorter
        (1.0, 50.0, [45]),  # less than one interval
        (0.1, 0.001, [1, 2, 3, 4, 5]),  # several intervals in a step
    ],
)
def test_evaluations_are_on_time_and_the_last_step_is_evaluated(
    epochs, every_epochs, expected
):
    times = clock(train__epochs=epochs, eval__every_epochs=every_epochs)
    assert times.total == expected[-1]
    assert ends(times, "evaluate") == ends(times, "save") == expected


def test_evaluations_do_not_precede_their_epoch():
    times = clock(train__epochs=3.0, eval__every_epochs=1.0, train__batch_size=31)
    for epoch, step in enumerate(ends(times, "evaluate"), 1):
        assert times.epoch(step - 1) < epoch <= times.epoch(step)


def test_checkpoints_are_saved_between_evaluations_too():
    times = clock(train__epochs=2.0, eval__every_epochs=1.0, checkpoint__every_steps=20)
    assert ends(times, "evaluate") == [45, 90]
    assert ends(times, "save") == [20, 40, 45, 60, 80, 90]


@pytest.mark.parametrize(
    ("fields", "images"),
    [
        ({"train__batch_size": 64}, 1437),
        ({"train__batch_size": 8}, 1437),
        ({"train__last_batch": "partial"}, 1437),
        ({}, 2000),
        ({}, 700),
    ],
)
def test_progress_is_counted_in_epochs_for_any_batch_size(fields, images):
    """A run of 3 epochs in batches of 32 continues after one of them."""
    old, other = (
        clock(train__epochs=3.0),
        fields | {"train__epochs": 3.0, "eval__every_epochs": 1.0},
    )
    fresh = clock(**other, images=images)
    new = fresh.resume(old, 45)
    assert old.epoch(45) <= new.epoch(45) < old.epoch(45) + 1 / new.steps_per_epoch
    assert new.total - 45 == fresh.total - fresh.step_of(old.epoch(45))
    assert new.epoch(new.total) == fresh.epoch(fresh.total)
    assert [new.epoch(x) >= 2 for x in ends(new, "evaluate", 45)] == [True, True]
    again = old.resume(new, new.total)  # and back
    assert again.epoch(new.total) >= 3
    assert fresh.resume(new, 50) == new  # nothing has changed since


def test_an_unchanged_clock_has_no_offset():
    assert clock().resume(clock(train__epochs=3.0), 45) == clock()


def test_smaller_batches_end_the_passes_of_a_resumed_run():
    fields = dict(data__pipeline="device", train__steps_per_dispatch=4)
    fields |= dict(train__last_batch="partial", train__epochs=3.0)
    new = clock(**fields, train__batch_size=64).resume(clock(**fields), 45)
    assert (new.steps_per_epoch, new.offset) == (23, 22)
    alone = [x for x in new.chunks(45) if (x.end - 22) % 23 == 0]
    assert [chunk.steps for chunk in alone] == [1, 1]


DISPATCHES = [
    {},
    dict(data__pipeline="device", train__steps_per_dispatch=4),
    dict(
        data__pipeline="device",
        train__steps_per_dispatch=4,
        train__last_batch="partial",
        train__epochs=2.0,
    ),
]


@pytest.mark.parametrize("fields", DISPATCHES)
def test_events_after_a_step_do_not_depend_on_where_the_run_resumes(fields):
    every = dict(eval__every_epochs=0.35, checkpoint__every_steps=7)
    times = clock(**every | dict(train__epochs=3.0) | fields)
    for action, start in itertools.product(("evaluate", "save"), range(times.total)):
        expected = [step for step in ends(times, action) if step > start]
        assert ends(times, action, start) == expected


@pytest.mark.parametrize("fields", DISPATCHES)
def test_chunks_cover_the_rest_of_the_run_without_gaps(fields):
    times = clock(**dict(train__epochs=3.0) | fields)
    for start in range(times.total):
        step = start
        for chunk in times.chunks(start):
            assert 1 <= chunk.steps <= times.config.train.steps_per_dispatch
            step += chunk.steps
            assert chunk.end == step
        assert step == times.total
    assert not list(times.chunks(times.total))


def test_a_smaller_batch_is_dispatched_alone():
    times = clock(**DISPATCHES[-1])
    steps_of = [range(chunk.end - chunk.steps, chunk.end) for chunk in times.chunks(0)]
    last = [steps for steps in steps_of if steps[-1] % 45 == 44]
    assert last == [range(44, 45), range(89, 90)]
    assert max(map(len, steps_of)) == 4


@pytest.mark.parametrize(
    ("epochs", "message"),
    [(1e-10, "less than one step"), (1e15, r"2\*\*31 steps or more")],
)
def test_a_run_without_steps_or_with_too_many_is_rejected(epochs, message):
    with pytest.raises(ValueError, match=f"train.epochs={epochs} is {message}"):
        clock(train__epochs=epochs)


def test_an_evaluation_can_be_made_up_for_before_the_next_step():
    times = clock(train__epochs=3.0)
    first, second, *_ = times.chunks(45, evaluate_first=True)
    assert first == (0, 45, True, True)
    assert second.steps == 1
    assert [chunk.end for chunk in times.chunks(135, evaluate_first=True)] == [135]


def test_every_evaluated_step_is_known():
    times = clock(train__epochs=1.0, eval__every_epochs=0.4, checkpoint__every_steps=7)
    evaluated = [step for step in range(100) if times.is_evaluated(step)]
    assert evaluated == ends(times, "evaluate") == [18, 36, 45]
