"""Give the rows of a run the experts that another run chose for them.

Routers choose the largest scores. Two layouts that add up in another order get scores that differ by a rounding error,
and where two scores are that close, another expert: a step that no tolerance of numbers covers. To compare layouts in
half precision, one rank records its choices and the ranks of a layout take them, each those of its own rows. What they
would have chosen themselves is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from phd_megatron.phd.kv_policy import KVPolicy

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

_ACTIVE: ContextVar[RoutingReplay | None] = ContextVar("routing_replay", default=None)
_INDICES = "indices"


class Router(Protocol):
    """What is asked of a router; ``copies`` are those of each token among its rows."""

    config: TransformerConfig
    layer_number: int | None

    @property
    def copies(self) -> int: ...


@dataclass
class RoutingReplay:
    """The choices of all routers of a run.

    Attributes:
        directory: holds a file per layer and micro-batch of the whole run.
        record: write what is chosen, on one rank, instead of taking what is there.
        rows: rows that were routed on this rank.
        changed: those which would have gone to other experts.
        largest_gap: among those, by how much the scores of the own choice add up to more than those of the other's.
    """

    directory: Path
    record: bool
    rows: int = 0
    changed: int = 0
    largest_gap: float = 0.0

    @contextmanager
    def active(self) -> Iterator[RoutingReplay]:
        """Routers that are built meanwhile take part."""
        token = _ACTIVE.set(self)
        try:
            yield self
        finally:
            _ACTIVE.reset(token)


def choices_of(router: Router) -> LayerChoices | None:
    """What a router asks for its experts while a replay is active, in the place of Megatron-Core's ``RouterReplay``."""
    replay = _ACTIVE.get()
    return None if replay is None else LayerChoices(replay, router)


class LayerChoices:
    """The choices of one router. Called once a micro-batch, and once more where activations are recomputed."""

    def __init__(self, replay: RoutingReplay, router: Router) -> None:
        from megatron.core import parallel_state  # here: this module is loaded before the device is chosen

        self._replay, self._router = replay, router
        self._data = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        self._context = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
        self._tensor = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )
        self._calls = {False: 0, True: 0}  # recomputation enables gradients for what ran without them before

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        compute_topk: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Scores and indices, both ``[rows, topk]``, of ``scores`` ``[rows, experts]``."""
        values, own = compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        differentiated = torch.is_grad_enabled()
        call = self._calls[differentiated]
        self._calls[differentiated] += 1
        rank, size = self._data
        microbatch = call * size + rank  # the data-parallel ranks take them in turns
        path = self._replay.directory / f"layer_{self._router.layer_number}_microbatch_{microbatch}.safetensors"
        if self._replay.record:
            self._replay.directory.mkdir(parents=True, exist_ok=True)
            save_file({_INDICES: own.contiguous()}, path)
            return values, own
        recorded = self._rows_of_rank(load_file(path)[_INDICES]).to(scores.device)
        if differentiated:
            self._count(scores, own, recorded)
        return scores.gather(1, recorded), recorded

    def _rows_of_rank(self, choices: Tensor) -> Tensor:
        """``[K*s*b, topk]`` of all positions to ``[K*s_rank*b, topk]`` of this rank's, whatever ``b`` is."""
        copies, topk = self._router.copies, choices.size(1)
        rank, size = self._context
        if size > 1:
            slices = KVPolicy(1).context_parallel_slices(2 * size, size, rank)  # of unit length
            choices = choices.view(copies, 2 * size, -1, topk)[:, [i for part in slices for i in part]]
        if self._router.config.sequence_parallel:
            rank, size = self._tensor
            choices = choices.reshape(copies, size, -1, topk)[:, rank]
        return choices.reshape(-1, topk)

    def _count(self, scores: Tensor, own: Tensor, recorded: Tensor) -> None:
        changed = (own.sort(dim=1).values != recorded.sort(dim=1).values).any(dim=1)
        self._replay.rows += len(changed)
        self._replay.changed += int(changed.sum())
        if changed.any():
            gap = (scores.gather(1, own) - scores.gather(1, recorded)).float().sum(dim=1)[changed]
            self._replay.largest_gap = max(self._replay.largest_gap, float(gap.max()))
