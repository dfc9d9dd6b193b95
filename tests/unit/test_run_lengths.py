"""Where in a run its validations are, and which runs are too short for them."""

from fractions import Fraction

import pytest

from phd_megatron.config.schema import RunConfig
from phd_megatron.errors import UserError


def due(total, parts, batch):
    from phd_megatron.training.validation import crosses

    steps = range(0, total - batch + 1, batch)
    return [start + batch for start in steps if crosses(start, start + batch, total, parts)]


@pytest.mark.parametrize(("total", "parts"), [(40, 3), (96, 4), (97, 5), (10, 10), (1_000_003, 7)])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_validation_follows_the_step_that_reaches_its_place(total, parts, batch):
    places = [Fraction(k * total, parts) for k in range(1, parts + 1)]
    ends = [end for end in (batch * step for step in range(1, total // batch + 1))]
    expected = sorted({min((end for end in ends if end >= place), default=None) or 0 for place in places} - {0})
    assert due(total, parts, batch) == expected


def test_places_do_not_depend_on_the_batch():
    assert due(96, 4, 8) == due(96, 4, 4) == due(96, 4, 24) == [24, 48, 72, 96]


def test_more_validations_than_steps_are_refused():
    from phd_megatron.training.optimizer import plan_schedule

    run = RunConfig()
    run.training.train_samples, run.training.evals_per_run = 40, 5
    assert plan_schedule(run, 8).total == 40
    run.training.evals_per_run = 6
    with pytest.raises(UserError, match="evals_per_run=6: the run has at most 5 steps"):
        plan_schedule(run, 8)
    run.training.rampup_batch_size = [4, 4, 20]
    assert plan_schedule(run, 8).total == 40
