"""Micro-batches whose backward pass is still to come, against Megatron-Core's own schedule."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from phd_megatron.planning.in_flight import most_kept, passes


@pytest.mark.parametrize(("count", "chunks", "group"), [(8, 2, 4), (9, 3, 4), (2, 2, 4), (5, 1, 5), (16, 4, 8)])
def test_order_is_megatrons(count: int, chunks: int, group: int) -> None:
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    assert passes(count, chunks, group) == [chunk for _, chunk in get_schedule_table(count, chunks, group)]


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize(
    ("stages", "chunks", "group", "count"), [(8, 2, 8, 64), (4, 3, 4, 12), (4, 2, 6, 12), (2, 2, 2, 2)]
)
def test_as_many_forward_passes_as_megatron_runs_first(
    stages: int, chunks: int, group: int, count: int, ahead: int
) -> None:
    """One more than its warm-up, whose number it gives for each stage, where there are more at all."""
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    for stage in range(stages):
        pipeline = SimpleNamespace(size=lambda: stages, rank=lambda stage=stage: stage)
        sends = SimpleNamespace(pp_group=pipeline, virtual_pipeline_model_parallel_size=chunks)
        total, _, first, left = get_pp_rank_microbatches(
            count, chunks, group, overlap_moe_expert_parallel_comm=bool(ahead), p2p_communicator=sends
        )
        assert most_kept([1.0] * chunks, stage, stages, count, group, ahead) == first + (left > 0)
        assert total == count * chunks


def test_by_hand() -> None:
    """The first of 8 stages with two chunks runs 14 + 8 passes, and one more; without chunks 8."""
    assert most_kept([1.0, 1.0], 0, 8, 64, 8) == 23
    assert [most_kept([1.0], stage, 8, 64, 8) for stage in range(8)] == [8, 7, 6, 5, 4, 3, 2, 1]
    assert [most_kept([1.0], stage, 8, 3, 8) for stage in (0, 4, 7)] == [3, 3, 1], "three micro-batches in all"
    # Two stages, two chunks of 1 and 10, four micro-batches. The first stage: chunks 0 0 1 1, then 0 (5 passes: 23),
    # backward of a 1, forward of a 0 (14), backward of the other 1, forward of a 1 (14), and so on.
    assert most_kept([1.0, 10.0], 0, 2, 4, 2) == 23
    # The other way round the chunk that is left first is the small one, so a third and a fourth 10 come in.
    assert most_kept([10.0, 1.0], 0, 2, 4, 2) == 10 + 10 + 1 + 1 + 10 - 1 + 10
