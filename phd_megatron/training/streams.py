"""The micro-batches that a rank of the process groups reads of a dataset."""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state

from phd_megatron.config.architecture import kv_policy
from phd_megatron.config.schema import RunConfig
from phd_megatron.data.loader import SampleStream
from phd_megatron.runtime.context import Runtime


def open_stream(run: RunConfig, runtime: Runtime, dataset: Any) -> SampleStream:
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
