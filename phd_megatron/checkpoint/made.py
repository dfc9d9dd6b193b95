"""A checkpoint that no training wrote: a model of one process, filled by whoever makes it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state

from phd_megatron.checkpoint.saver import CheckpointSaver, Saveable
from phd_megatron.config.plain import Json
from phd_megatron.config.precision import for_cpu
from phd_megatron.config.schema import ParallelConfig, RunConfig
from phd_megatron.model.build import build_model
from phd_megatron.model.initialisation import sharded_tensors
from phd_megatron.runtime.context import Runtime
from phd_megatron.runtime.output import new_directory

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

#: Called with the parts of every parameter; it writes their data.
Fill = Callable[["list[ShardedTensor]"], None]


@dataclass(frozen=True)
class Made:
    """What was written, still under the name that vanishes."""

    directory: Path  #: the ``iter_...`` directory
    parameters: int


@contextmanager
def new_checkpoint(
    output: str | Path,
    run: RunConfig,
    vocab_size: int,
    fill: Fill,
    *,
    tokenizer: Saveable | None,
    iteration: int = 0,
    facts: Json,
    keep: tuple[Path, ...] = (),
    log: Callable[[str], None] = lambda message: None,
) -> Iterator[Made]:
    """A directory with one checkpoint of a model without optimizer; it becomes ``output`` if the block ends well.

    On one process, on the CPU. Needs memory for the model.

    Args:
        run: resolved. Its layout is left out of what is saved, so whoever goes on is free in theirs.
        facts: of the training state.
        keep: directories that are read, which ``output`` may not be or hold.

    Raises:
        UserError: ``output`` is not empty, or cannot be written.
    """
    saved = replace(run, parallel=ParallelConfig())
    alone = replace(run, model=copy.deepcopy(run.model), parallel=ParallelConfig(device="cpu"))
    for_cpu(alone.model)
    with new_directory(output, keep=keep) as place:
        with Runtime.start(alone.parallel, verbose=False) as runtime:
            model = build_model(alone, vocab_size, runtime.device)[0]
            told = _ToldLater(runtime.device)
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            with torch.no_grad():
                fill(list(sharded_tensors(model, group)))
            saver = CheckpointSaver(place, run_config=saved, tokenizer=tokenizer, runtime=told)
            directory = saver.save(
                iteration=iteration, models=[model], optimizer=None, scheduler=None, training_state=facts
            )
            assert directory is not None  # what was not trained is not judged
            saver.close()
            parameters = sum(parameter.numel() for parameter in model.parameters())
        del model
        yield Made(directory, parameters)
    for line in told.lines:
        log(line.replace(str(place), str(output)))


@dataclass
class _ToldLater:
    """Keeps what a save says until the checkpoint has the name under which it is found."""

    device: torch.device
    lines: list[str] = field(default_factory=list)

    def log(self, message: str) -> None:
        """Keep a line."""
        self.lines.append(message)
