"""Small decisions that all ranks must take together: did a step fail anywhere, does anyone want to stop.

They travel over a CPU-capable (gloo) group, so that a decision never waits behind queued device work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from phd_megatron.errors import UserError

T = TypeVar("T")
_control_groups: dict[int, dist.ProcessGroup] = {}
_timeout: timedelta | None = None


def set_timeout(minutes: float) -> None:
    """How long the control group waits for a rank; before its first use, the same on all ranks."""
    global _timeout
    _timeout = timedelta(minutes=minutes)


def control_group() -> dist.ProcessGroup | None:
    """A group of all ranks for CPU tensors and objects. Its first call is collective; None means the default group."""
    if not dist.is_initialized() or "gloo" in dist.get_backend():
        return None
    key = id(dist.group.WORLD)  # a process that re-initialises torch.distributed gets a new group
    if key not in _control_groups:
        _control_groups.clear()
        _control_groups[key] = dist.new_group(backend="gloo", timeout=_timeout)
    return _control_groups[key]


def rank() -> int:
    """Global rank; 0 without torch.distributed."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1


def maximum(values: Sequence[int]) -> list[int]:
    """Element-wise maximum of small integers over all ranks."""
    if world_size() == 1:
        return list(values)
    tensor = torch.tensor(list(values), dtype=torch.int64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=control_group())
    return [int(value) for value in tensor.tolist()]


def gather(value: T) -> list[T]:
    """One small picklable object of every rank, in rank order."""
    if world_size() == 1:
        return [value]
    gathered = [value] * world_size()
    dist.all_gather_object(gathered, value, group=control_group())
    return gathered


def from_rank_zero(function: Callable[[], T]) -> T:
    """Run ``function`` on rank 0 alone and give its result to everyone.

    Raises:
        UserError: on every rank, with rank 0's message, when ``function`` refused or failed there.
    """
    outcome: list[Any] = [None, None]
    cause: Exception | None = None
    if rank() == 0:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1], cause = str(error), error
        except Exception as error:
            outcome[1], cause = f"{type(error).__name__}: {error}", error
    if world_size() > 1:
        dist.broadcast_object_list(outcome, src=0, group=control_group())
    if outcome[1] is not None:
        raise UserError(outcome[1]) from cause
    return outcome[0]


def everywhere(function: Callable[[], T]) -> T:
    """Run ``function`` on every rank; when it raises on any, raise :class:`UserError` on all instead of hanging some.

    ``function`` may use collectives only where a failure of one rank cannot leave another waiting.
    """
    results: list[T] = []
    problem = None
    try:
        results.append(function())
    except UserError as error:
        problem = str(error)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    problems = {number: text for number, text in enumerate(gather(problem)) if text is not None}
    if problems:
        first = next(iter(problems.values()))
        if all(text == first for text in problems.values()) and (len(problems) == world_size()):
            raise UserError(first)
        raise UserError("; ".join(f"rank {number}: {text}" for number, text in problems.items()))
    return results[0]
