"""Optimizer states that move between torch's AdamW and the FusedAdam of Transformer Engine and apex.

Moments are the same everywhere, but torch counts steps per parameter and FusedAdam per group, and each writes options
of its own into the groups. Megatron-Core loads only what the same implementation saved; a run that continues on a
machine with or without Transformer Engine, or goes from a GPU to the CPU, needs the other form.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import StateDict


def adapt(saved: StateDict, optimizer: torch.optim.Optimizer) -> None:
    """Bring what a checkpoint holds of an optimizer into the form that ``optimizer`` loads, in place.

    Args:
        saved: the loaded state dict of a megatron optimizer: sharded, not sharded, or chained.
        optimizer: the torch optimizer inside the megatron optimizer that will load it.
    """
    parts = list(_parts(saved))
    step = max(map(_step, parts), default=0)
    for part in parts:
        _adapt_one(part, step, optimizer.defaults)


def _parts(saved: StateDict) -> Iterator[StateDict]:
    """The state dicts with groups of AdamW inside a chain of optimizers, which may have muon too."""
    if not isinstance(saved, dict):
        return
    if isinstance(groups := saved.get("param_groups"), list):
        if not any("momentum" in group for group in groups):
            yield saved
    else:
        for part in saved.values():
            yield from _parts(part)


def _adapt_one(saved: StateDict, step: int, defaults: StateDict) -> None:
    for group in saved["param_groups"]:
        for name, value in defaults.items():
            group.setdefault(name, value)
        group["step"] = step
    state = saved.get("state")  # the distributed optimizer keeps its states elsewhere
    if not isinstance(state, dict):
        return
    if "bias_correction" in defaults:  # FusedAdam: every entry of a parameter's state is a moment to it
        state.pop("common_step", None)
    else:
        state["common_step"] = torch.tensor(float(step))


def _step(saved: StateDict) -> int:
    """Steps done: one number for all parameters, which is all that Megatron-Core knows too.

    0 where the rank that wrote it had no parameters in this optimizer, so the whole chain's is the largest.
    """
    state = saved.get("state")
    common = state.get("common_step") if isinstance(state, dict) else None
    candidates = [common, *(group.get("step") for group in saved["param_groups"])]
    return next((int(step) for step in candidates if step is not None), 0)
