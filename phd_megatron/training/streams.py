"""From a dataset to the micro-batches of this rank, and before that: is its index whole?"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from megatron.core import parallel_state

from phd_megatron.config.architecture import kv_policy
from phd_megatron.config.schema import RunConfig
from phd_megatron.data.loader import SampleStream
from phd_megatron.data.samples import Samples
from phd_megatron.runtime import agreement
from phd_megatron.runtime.context import Runtime

Sets = TypeVar("Sets", bound="tuple[Samples | None, ...]")


def with_whole_indices(build: Callable[[], Sets], local_rank: int) -> Sets:
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


def open_stream(run: RunConfig, runtime: Runtime, dataset: Samples) -> SampleStream:
    """This rank's micro-batches of ``dataset``."""
    return SampleStream(
        dataset,
        run.training.micro_batch_size,
        parallel_state.get_data_parallel_rank(),
        runtime.dims.dp,
        num_workers=run.data.num_workers,
        pin_memory=not runtime.on_cpu,
        slices=_context_parallel_slices(run, runtime),
    )


def _context_parallel_slices(run: RunConfig, runtime: Runtime) -> tuple[range, ...] | None:
    """Token positions of this rank; ``None`` where it holds whole sequences."""
    model, size = run.model, runtime.dims.cp
    if size == 1:
        return None
    return kv_policy(model).context_parallel_slices(model.seq_length, size, parallel_state.get_context_parallel_rank())
