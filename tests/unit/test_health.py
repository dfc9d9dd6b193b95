"""The look at parameters before a save: what it finds, and what it says."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from phd_megatron.checkpoint import extra_state, health
from phd_megatron.checkpoint.store import CheckpointError
from phd_megatron.errors import DIVERGED, UserError


class Built:
    """A model and its optimizer after a step, as Megatron-Core holds them."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 0)).to(dtype)
        self.inner = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.model(torch.ones(2, 4, dtype=dtype)).sum().backward()
        self.inner.step()
        self.optimizer = SimpleNamespace(optimizer=self.inner)

    def check(self) -> float:
        return health.check_parameters([self.model], self.optimizer, 7, lambda: "KNOWN")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_largest_value_is_that_of_a_loop(dtype: torch.dtype) -> None:
    built = Built(dtype)
    built.model[0].weight.data[1, 2] = -17.5
    assert built.check() == 17.5 == max(float(p.abs().max()) for p in built.model.parameters() if p.numel())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -2e6])
@pytest.mark.parametrize("where", [0, -1])
def test_what_no_parameter_can_be_is_named(value: float, where: int) -> None:
    built = Built()
    built.model[0].bias.data[where] = value
    with pytest.raises(UserError) as refused:
        built.check()
    said = str(refused.value)
    assert said.startswith(f"{DIVERGED}: after iteration 7 parameter 0.bias holds ") and "KNOWN" in said
    assert f"{abs(value):.3g}" in said and "not saved" in said and "Lower lr" in said


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda built: built.inner.state[built.model[0].weight]["exp_avg_sq"].fill_(math.inf),
            "state exp_avg_sq holds inf",
        ),
        (lambda built: built.inner.state[built.model[0].bias]["exp_avg"].fill_(math.nan), "state exp_avg holds nan"),
        (
            lambda built: built.inner.add_param_group({"params": [torch.nn.Parameter(torch.tensor([math.nan]))]}),
            "a main parameter of the optimizer holds nan",
        ),
    ],
)
def test_the_optimizers_copies_and_states_are_looked_at(spoil: Callable[[Built], object], said: str) -> None:
    built = Built()
    spoil(built)
    with pytest.raises(UserError, match=said):
        built.check()


def test_large_moments_are_no_reason(tmp_path: Path) -> None:
    built = Built()
    built.inner.state[built.model[0].weight]["exp_avg_sq"].fill_(1e12)
    assert built.check() < 10


def test_only_what_is_known_is_said(tmp_path: Path) -> None:
    assert health.standing(None, None) == "there is no checkpoint to go back to"
    assert "finite when it was saved, the largest 0.5" in health.standing(tmp_path, 0.5)
    assert "was not looked at" in health.standing(tmp_path, health.largest_of(tmp_path))
    (tmp_path / "training_state.json").write_text('{"largest_parameter": 0.25}')
    assert health.largest_of(tmp_path) == 0.25


@pytest.mark.parametrize("content", [5, [1], "text", (1, 2)])
def test_an_extra_state_that_is_no_mapping_is_refused(content: object, tmp_path: Path) -> None:
    state = {"layer._extra_state": torch.frombuffer(bytearray(pickle.dumps(content)), dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match=r"layer\._extra_state: it holds a .*, not a mapping"):
        extra_state.check(state, tmp_path)
    extra_state.check({"a._extra_state": torch.frombuffer(bytearray(pickle.dumps({})), dtype=torch.uint8)}, tmp_path)
    with pytest.raises(CheckpointError, match="it is a list"):
        extra_state.check({"a._extra_state": [1]}, tmp_path)
