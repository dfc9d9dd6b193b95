"""Where in a run its validations are, and which runs have too few steps for them."""

from fractions import Fraction
from types import SimpleNamespace

import pytest

from phd_megatron.config.schema import RunConfig
from phd_megatron.errors import UserError


def due(total, parts, batch):
    from phd_megatron.training.validation import crosses

    steps = range(0, total - batch + 1, batch)
    return [start + batch for start in steps if crosses(start, start + batch, total, parts)]


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize(("steps", "parts"), [(5, 3), (12, 4), (13, 5), (10, 10), (1_003, 7)])
def test_a_validation_follows_the_step_that_reaches_its_place(steps, parts, batch):
    total = steps * batch
    places = [Fraction(k * total, parts) for k in range(1, parts + 1)]
    ends = range(batch, total + 1, batch)
    expected = [next(end for end in ends if end >= place) for place in places]
    found = due(total, parts, batch)
    assert found == expected and len(found) == parts and found[-1] == total


def test_places_do_not_depend_on_the_batch():
    assert due(96, 4, 8) == due(96, 4, 4) == due(96, 4, 24) == [24, 48, 72, 96]


@pytest.mark.parametrize(("total", "batch", "parts", "most"), [(40, 8, 6, 5), (96, 24, 5, 4)])
def test_two_validations_in_a_step_are_refused(total, batch, parts, most):
    from phd_megatron.training.validation import Validation

    run = RunConfig()
    run.training.global_batch_size, run.training.evals_per_run = batch, parts
    with pytest.raises(UserError, match=f"evals_per_run={parts}: a step of {batch} of .* ask for at most {most}"):
        Validation(run, SimpleNamespace(dims=SimpleNamespace(dp=1)), [], total)
