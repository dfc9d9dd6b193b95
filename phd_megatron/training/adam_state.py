"""Optimizer states that move between torch's AdamW and the FusedAdam of Transformer Engine and apex.

Moments are the same everywhere, but torch counts steps per parameter and FusedAdam per group, and each writes options
of its own into the groups. Megatron-Core loads only what the same implementation saved; a run that continues on a
machine with or without Transformer Engine, or goes from a GPU to the CPU, needs the other form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def adapt(saved: Any, optimizer: torch.optim.Optimizer) -> None:
    """Bring what a checkpoint holds of an optimizer into the form that ``optimizer`` loads, in place.

    Args:
        saved: the loaded state dict of a megatron optimizer: sharded, not sharded, or chained.
        optimizer: the torch optimizer inside the megatron optimizer that will load it.
    """
    if not isinstance(saved, dict):
        return
    if isinstance(saved.get("param_groups"), list):
        _adapt_one(saved, optimizer.defaults)
    else:
        for part in saved.values():
            adapt(part, optimizer)


def _adapt_one(saved: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    step = _step(saved)
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


def _step(saved: Mapping[str, Any]) -> int:
    """Steps done: one number for all parameters, which is all that Megatron-Core knows too."""
    state = saved.get("state")
    common = state.get("common_step") if isinstance(state, dict) else None
    candidates = [common, *(group.get("step") for group in saved["param_groups"])]
    return next((int(step) for step in candidates if step is not None), 0)
