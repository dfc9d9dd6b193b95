"""What of a model needs values, and what takes its place where tensors have none (`runtime/dry.py`).

Each of these is a function of ours or of Megatron-Core's that is exchanged for the time of a dry run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from phd_megatron.errors import UserError
from phd_megatron.kernels.phd_attention import causal
from phd_megatron.model import build
from phd_megatron.runtime.dry import with_values
from phd_megatron.runtime.redirects import replaced


@contextmanager
def without_values() -> Iterator[None]:
    """Build and run models whose tensors have no values.

    - Initial weights are not drawn: whole tensors would be, in threads.
    - Private operators of attention are tried over values, or another path would be taken.
    - How rows of experts are sorted, and what ranks tell each other of their numbers, stays known.
    """
    gather = mappings._gather_along_first_dim

    def gather_known(input_: Tensor, *args: object, **kwargs: object) -> Tensor:
        if isinstance(input_, FakeTensor):
            return gather(input_, *args, **kwargs)
        return with_values(gather)(input_, *args, **kwargs)

    with (
        replaced(build, initialise=lambda *args, **kwargs: None),
        replaced(causal, _probe=with_values(causal._probe)),
        replaced(mappings, _gather_along_first_dim=gather_known),
        # a tensor that stays, of whichever run was the first of this process
        replaced(MoEAuxLossAutoScaler, main_loss_backward_scale=None),
        replaced(MoEAlltoAllTokenDispatcher, __init__=with_values(MoEAlltoAllTokenDispatcher.__init__)),
    ):
        yield


@contextmanager
def routed(experts: int | None, topk: int, favoured: range = range(0), factor: float = 1.0) -> Iterator[None]:
    """Every router sends rows to experts evenly, whatever it computes, and these are known without values.

    All ranks route alike.

    Args:
        experts: of a layer; None leaves everything as it is.
        topk: of a row.
        favoured: experts that get ``factor`` times their even share; the others have the rest, evenly.

    Raises:
        UserError: a row would go to an expert twice.
    """
    if experts is None:
        yield
        return
    shares = expert_shares(experts, topk, favoured, factor)
    stock = TopKRouter.routing

    def routing(self: TopKRouter, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        probs, routing_map = stock(self, *args, **kwargs)
        with unset_fake_temporarily():
            return probs, routing_table(routing_map.size(0), topk, shares)

    with replaced(TopKRouter, routing=routing):
        yield


def expert_shares(experts: int, topk: int, favoured: range, factor: float) -> list[float]:
    """The share of all rows that each expert gets; they add up to ``topk``.

    Raises:
        UserError: the factor is below 1, or so large that a row would go to an expert twice.
    """
    even, most = topk / experts, experts / max(topk, len(favoured) or topk)
    if not 1 <= factor <= most:
        raise UserError(
            f"--expert-imbalance {factor:g}: the experts of a rank get between 1 and {most:g} times their share, where "
            f"a row goes to {topk} of {experts} experts and a rank holds {len(favoured)}; use a factor between"
        )
    rest = (topk - factor * even * len(favoured)) / max(1, experts - len(favoured))
    return [factor * even if expert in favoured else rest for expert in range(experts)]


def routing_table(rows: int, topk: int, shares: list[float]) -> Tensor:
    """``[rows, experts]``, boolean: ``topk`` experts for each row, and for each expert its share, rounded."""
    ends = torch.tensor(shares, dtype=torch.float64).cumsum(0).mul(rows).round().to(torch.int64)
    expert = torch.searchsorted(ends, torch.arange(rows * topk), right=True)
    # An expert has no more rows than there are, so its entries, which lie together, fall on different rows.
    table = torch.zeros(rows, len(shares), dtype=torch.bool)
    table[torch.arange(rows * topk) % rows, expert] = True
    return table
