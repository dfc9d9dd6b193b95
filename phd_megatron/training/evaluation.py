"""Loss of a Megatron checkpoint on a data set, in any layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from phd_megatron.checkpoint.load import load_checkpoint
from phd_megatron.config.cuda_graph import drop_graph
from phd_megatron.config.layouts import Layout
from phd_megatron.config.precision import for_cpu
from phd_megatron.config.resolve import resolve
from phd_megatron.config.resume import for_reading
from phd_megatron.config.schema import RunConfig
from phd_megatron.data.blend import SPLITS
from phd_megatron.data.evaluation import Evaluation, EvaluationProgress, evaluation_dataset
from phd_megatron.data.tokenizers import Tokenizer
from phd_megatron.model.build import build_model
from phd_megatron.runtime import agreement
from phd_megatron.runtime.context import Runtime
from phd_megatron.runtime.parallel_dims import ParallelDims
from phd_megatron.training.megatron_engine import MegatronEngine
from phd_megatron.training.optimizer import in_run_precision
from phd_megatron.training.run_data import agree_on_data, check_own_data
from phd_megatron.training.step import Stepper
from phd_megatron.training.streams import open_stream, with_whole_indices


def for_evaluation(
    saved: RunConfig, layout: Layout, device: Literal["cpu", "cuda"], world_size: int
) -> tuple[RunConfig, list[str]]:
    """The saved configuration in another layout, with what only concerns training put aside.

    Returns:
        The configuration, and notes on what was put aside and changes the numbers.

    Raises:
        UserError: when the layout does not fit the ranks or the model.
    """
    run, notes = layout.apply(for_reading(saved)), []
    run.parallel.device = device
    extra = run.model.transformer
    for name in [name for name in extra if name.startswith("recompute_")]:
        del extra[name]
    if extra.pop("moe_expert_capacity_factor", None) is not None:
        notes.append("moe_expert_capacity_factor is left out: outside of training no token is dropped")
    drop_graph(run.model)
    if device == "cpu":
        notes += for_cpu(run.model)
    run.training.rampup_batch_size = None
    dims = ParallelDims.from_config(run.parallel, world_size)
    run.parallel.sequence_parallel = dims.sp
    run.training.global_batch_size = _batch(run, dims)
    resolve(run)
    dims.validate(run.model, run.training)
    return run, notes


def _batch(run: RunConfig, dims: ParallelDims) -> int:
    """Samples that go through the pipeline at once: as many micro-batches as it has stages."""
    return run.training.micro_batch_size * dims.dp * dims.pp


def evaluate_checkpoint(
    path: Path,
    run: RunConfig,
    runtime: Runtime,
    tokenizer: Tokenizer,
    split: str,
    samples: int,
    verify: bool = True,
    copies: bool = False,
    own_data: bool = False,
) -> Evaluation:
    """One pass of the model in ``path`` over ``samples`` samples of a split; collective.

    Args:
        run: from :func:`for_evaluation`.
        verify: compare every file of the checkpoint with its checksum first.
        own_data: the data is meant to be that of the training, and is refused where it is another.
        copies: also the loss of every copy's output; the last layer and the head then compute K times as many rows.

    Raises:
        UserError: on all ranks, for a damaged checkpoint or one of another model.
    """
    assert run.model.vocab_size is not None
    one, two, three = (int(name == split) for name in SPLITS)
    data = agree_on_data(run, tokenizer, (one, two, three), runtime.local_rank)
    if own_data:
        agreement.from_rank_zero(lambda: check_own_data(path, data, run))
    multiple = _batch(run, runtime.dims)
    (dataset,) = with_whole_indices(
        lambda: (evaluation_dataset(run, tokenizer, split, samples, multiple),), runtime.local_rank
    )
    models = in_run_precision(build_model(run, run.model.vocab_size, runtime.device, keep_copies=copies), run)
    load_checkpoint(path, models=models, optimizer=None, scheduler=None, runtime=runtime, load_rng=False, verify=verify)
    model = run.model
    size, stages = run.training.micro_batch_size, runtime.dims.pp
    stepper = Stepper(MegatronEngine(models), runtime.device, size, model.seq_length, model.phd_repeat)
    batch = _batch(run, runtime.dims)
    total = torch.zeros(stepper.report_shape, dtype=torch.float64, device=runtime.device)
    progress = EvaluationProgress(samples, runtime.log)
    stream = open_stream(run, runtime, dataset)
    try:
        batches = stream.microbatches(0, len(dataset) // batch * stages)
        for done in range(batch, len(dataset) + 1, batch):
            total += stepper.evaluate(batches, 1, stages)
            progress.advance(done, total[-1] if copies else total)
    finally:
        stream.close()
    if not copies:
        return progress.finish(total)
    return replace(progress.finish(total[-1]), copy_losses=tuple((total[:, 0] / total[:, 1]).tolist()))
