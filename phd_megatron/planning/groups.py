"""Process groups of this rank by the names that people use, and over what they talk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch.distributed as dist
from megatron.core import parallel_state

NVLINK, NETWORK = "NVLink", "network"

#: Megatron-Core's variables; where two of them hold one group, the first names it
_NAMES = {
    "_TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "_PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "_CONTEXT_PARALLEL_GROUP": "cp",
    "_DATA_PARALLEL_GROUP": "dp",
    "_DATA_PARALLEL_GROUP_WITH_CP": "dp_cp",
    "_EXPERT_MODEL_PARALLEL_GROUP": "ep",
    "_EXPERT_TENSOR_PARALLEL_GROUP": "etp",
    "_EXPERT_DATA_PARALLEL_GROUP": "edp",
    "_EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "etp_ep",
    "_EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP": "etp_ep_pp",
    "_MODEL_PARALLEL_GROUP": "tp_pp",
    "_TENSOR_AND_CONTEXT_PARALLEL_GROUP": "tp_cp",
    "_TENSOR_AND_DATA_PARALLEL_GROUP": "tp_dp",
    "_TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": "tp_dp_cp",
    "_INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "all",
    "_EMBEDDING_GROUP": "embd",
    "_POSITION_EMBEDDING_GROUP": "pos_embd",
}


@dataclass(frozen=True)
class Group:
    """One group.

    Attributes:
        label: a short name, as ``tp``.
        ranks: global numbers, ascending.
    """

    label: str
    ranks: tuple[int, ...]

    @property
    def stride(self) -> int:
        """The largest distance of neighbours; 0 of one rank."""
        return max((after - before for before, after in pairwise(self.ranks)), default=0)


def link(ranks: tuple[int, ...], per_node: int) -> str:
    """Over what ranks talk where each node has ``per_node`` of them, in order."""
    return NVLINK if len({rank // per_node for rank in ranks}) == 1 else NETWORK


def groups_of_this_rank() -> dict[str, Group]:
    """Groups by torch.distributed's names of them; after Megatron-Core has made its groups."""
    found: dict[str, Group] = {}
    for label, group in _known():
        if group.group_name not in found:
            found[group.group_name] = Group(label, tuple(sorted(dist.get_process_group_ranks(group))))
    return found


def _known() -> Iterator[tuple[str, dist.ProcessGroup]]:
    if dist.group.WORLD is not None:
        yield "world", dist.group.WORLD
    others = [name for name in vars(parallel_state) if "_GROUP" in name and name not in _NAMES]
    for name in (*_NAMES, *others):
        value = getattr(parallel_state, name, None)
        for group in value if isinstance(value, list) else [value]:
            if isinstance(group, dist.ProcessGroup):
                yield _NAMES.get(name, name.strip("_").removesuffix("_GROUP").lower()), group
