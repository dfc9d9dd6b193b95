"""Are the parameters numbers that a model can have? Looked at before every save, on all ranks together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor

from phd_megatron.checkpoint import store
from phd_megatron.checkpoint.state import chunks
from phd_megatron.errors import DIVERGED, UserError
from phd_megatron.runtime import agreement

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer

LARGEST = 1e6
"""No parameter of a model that computes anything is larger than this in absolute value."""
FACT = "largest_parameter"
"""In ``training_state.json``: the largest absolute value of a parameter, of checkpoints whose parameters passed."""


@torch.no_grad()
def check_parameters(
    models: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    iteration: int,
    standing: Callable[[], str],
    *,
    patient: bool = False,
) -> float:
    """The largest absolute value of all parameters; collective.

    Parameters, the optimizer's own copies of them and its states are looked at, a fused pass over each type.

    Args:
        standing: what is known about the checkpoints that are there, for the message.
        patient: a finite value that is too large is returned and not refused.

    Raises:
        UserError: on all ranks, naming the first parameter that is not finite, or too large to be one, and its value.
    """
    parameters = list(_parameters(models))
    copies = list(_main_parameters(optimizer))
    largest = _largest(tensor for _, tensor in (*parameters, *copies))
    states = list(_states(optimizer))
    problem = None
    if not largest <= LARGEST:
        problem = _first([*parameters, *copies], LARGEST)
    elif not math.isfinite(_largest(tensor for _, tensor in states)):
        problem = _first(states, math.inf)
    if patient and problem is not None and math.isfinite(largest) and largest > LARGEST:
        problem = None
    found = agreement.gather((largest, problem))
    problems = {rank: text for rank, (_, text) in enumerate(found) if text is not None}
    if problems:
        rank, text = next(iter(problems.items()))
        where = f" (rank {rank})" if len(found) > 1 else ""
        raise UserError(
            f"{DIVERGED}: after iteration {iteration} {text}{where}, so the model is not saved; {standing()}. Lower "
            "lr, lengthen the warm-up, or skip the batch"
        )
    return max(value for value, _ in found)


def warning(largest: float, iteration: int, standing: str) -> str:
    """What is said when a model is not saved and the run goes on."""
    return (
        f"warning: after iteration {iteration} a parameter holds {largest:.3g}, and none of a model that works is "
        f"above {LARGEST:g}, so it is not saved; {standing}. If the next save finds the same, the run ends"
    )


def largest_of(checkpoint: Path | None) -> float | None:
    """The largest absolute value of a checkpoint's parameters; None when nobody looked."""
    found = store.training_state(checkpoint).get(FACT) if checkpoint is not None else None
    return found if isinstance(found, float) else None


def standing(last: Path | None, largest: float | None) -> str:
    """What is known about the last checkpoint of a run, for a message that ends it."""
    if last is None:
        return "there is no checkpoint to go back to"
    if largest is not None:
        return f"the last checkpoint is {last}: its parameters were finite when it was saved, the largest {largest:.3g}"
    return f"the last checkpoint is {last}; whether its parameters are finite was not looked at when it was saved"


def _parameters(models: Sequence[torch.nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for _, model in chunks(models):
        for name, parameter in model.named_parameters():
            value = dequantize_fp8_tensor(parameter) if is_float8tensor(parameter) else parameter
            yield f"parameter {name}", value


def _optimizers(optimizer: MegatronOptimizer | None) -> Iterator[torch.optim.Optimizer]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(part, "optimizer", None) is not None:
            yield part.optimizer


def _main_parameters(optimizer: MegatronOptimizer | None) -> Iterator[tuple[str, Tensor]]:
    for inner in _optimizers(optimizer):
        for group in inner.param_groups:
            yield from (("a main parameter of the optimizer", parameter) for parameter in group["params"])


def _states(optimizer: MegatronOptimizer | None) -> Iterator[tuple[str, Tensor]]:
    for inner in _optimizers(optimizer):
        for values in inner.state.values():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    yield f"the optimizer's state {name}", value


def _largest(tensors: Iterable[Tensor]) -> float:
    """NaN where there is one."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            kinds[tensor.device, tensor.dtype].append(tensor.detach())
    largest = [float(torch.stack(torch._foreach_norm(group, math.inf)).max()) for group in kinds.values()]
    return math.nan if any(math.isnan(value) for value in largest) else max(largest, default=0.0)


def _first(named: Sequence[tuple[str, Tensor]], limit: float) -> str | None:
    for name, tensor in named:
        value = _largest([tensor])
        if not math.isfinite(value):
            return f"{name} holds {value}"
        if value > limit:
            return f"{name} holds {value:.3g}, and no parameter of a model that works is above {limit:g}"
    return None
