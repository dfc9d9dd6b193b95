"""The numbers of index caches are read on one rank of each node, before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from phd_megatron.runtime import agreement

T = TypeVar("T", bound=tuple[Any, ...])


def with_whole_indices(build: Callable[[], T], local_rank: int) -> T:
    """What ``build`` makes of the data, with index caches that are as they were written; collective.

    A process that is alone has compared them as it opened them (`data/index_cache.py`). Of several, all open the files
    and the first of a node reads them; where it finds damage, all build again, and the first to come writes.

    Raises:
        UserError: on all ranks, when one cannot look.
    """
    from phd_megatron.data.gpt_index import forget_damaged_caches
    from phd_megatron.data.index_cache import is_alone

    built = build()
    if is_alone():
        return built
    looks = not local_rank or not agreement.rank()
    damaged = agreement.everywhere(lambda: forget_damaged_caches(built) if looks else 0)
    return build() if any(agreement.gather(damaged)) else built
