"""The mean of a run's checkpoints: one model, as good as one that was trained to a smaller learning rate.

Mean of the last checkpoints of a constant rate (LAWA, arXiv 2209.14981), as WSD and OLMo 2 recipes take it before or in
the place of a decay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from phd_megatron.checkpoint.made import new_checkpoint
from phd_megatron.checkpoint.store import complete_dir, complete_iterations
from phd_megatron.data.tokenizers import load_tokenizer
from phd_megatron.errors import UserError
from phd_megatron.huggingface.checkpoint import MegatronCheckpoint
from phd_megatron.huggingface.export import describe
from phd_megatron.model.initialisation import fill
from phd_megatron.runtime.output import check_directory


@dataclass(frozen=True)
class Averaged:
    """What was written."""

    directory: Path
    iterations: list[int]
    tensors: int
    parameters: int


def choose(run: str | Path, last: int | None = None, iterations: Sequence[int] | None = None) -> list[int]:
    """Iterations whose complete checkpoints are averaged, ascending.

    Args:
        run: directory that a run saved into.
        last: so many of the newest; or
        iterations: these.

    Raises:
        UserError: they are not there, or fewer than two.
    """
    there = complete_iterations(run)
    found = ", ".join(map(str, there)) or "none"
    if iterations is None:
        assert last is not None
        if len(there) < last:
            raise UserError(f"--last {last}: {run} has {len(there)} complete checkpoints ({found}); ask for fewer")
        return there[-last:]
    if len(set(iterations)) < len(iterations):
        raise UserError(
            f"--iterations {' '.join(map(str, iterations))}: a checkpoint counts once; leave the second out"
        )
    if missing := [iteration for iteration in iterations if iteration not in there]:
        raise UserError(f"--iterations {missing[0]}: {run} has no complete checkpoint of it; there are {found}")
    return sorted(iterations)


def average(
    run: str | Path,
    iterations: Sequence[int],
    output: str | Path,
    *,
    verify: bool = True,
    log: Callable[[str], None] = lambda message: None,
) -> Averaged:
    """Write the mean of checkpoints of one run, without optimizer, under the newest one's iteration. On the CPU.

    Sums are in float64, the result in the parameters' own type. What is no floating-point number is the newest one's.
    Needs memory for the model and twice its largest tensor in float64.

    Raises:
        UserError: they are not of one model, a file is damaged, or ``output`` is not empty.
    """
    check_directory(output, keep=[Path(run)])
    sources = []
    for iteration in iterations:
        directory = complete_dir(run, iteration)
        assert directory is not None  # choose
        sources.append(MegatronCheckpoint(directory, verify=verify, log=log))
    newest = sources[-1]
    for source in sources[:-1]:
        _check_alike(source, newest)
    architecture, _ = describe(newest)
    tokenizer = None if newest.tokenizer_dir is None else load_tokenizer(newest.tokenizer_dir)
    names = []

    def mean(key: str) -> Tensor:
        names.append(key)
        last = newest.read(key)
        if not last.is_floating_point():
            return last
        total = last.double()
        for source in sources[:-1]:
            total += source.read(key)
        return (total / len(sources)).to(last.dtype)

    facts = {"consumed_samples": newest.training_state.get("consumed_samples", 0), "averaged": list(iterations)}
    with new_checkpoint(
        *(output, newest.run, architecture.vocab_size, lambda parts: fill(parts, mean)),
        tokenizer=tokenizer,
        iteration=iterations[-1],
        facts=facts,
        keep=(Path(run),),
        log=log,
    ) as made:
        if left := newest.tensors.keys() - names:
            raise UserError(f"the model has no place for {sorted(left)[:5]}; nothing is dropped, so it is not written")
    return Averaged(Path(output) / made.directory.name, list(iterations), len(names), made.parameters)


def _check_alike(source: MegatronCheckpoint, newest: MegatronCheckpoint) -> None:
    """Refuse a checkpoint that holds other tensors, which a run that was changed on the way has."""
    one, other = (
        {key: (tuple(entry.size), entry.properties.dtype) for key, entry in checkpoint.tensors.items()}
        for checkpoint in (source, newest)
    )
    differ = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
    if differ:
        raise UserError(
            f"{source.directory.name} and {newest.directory.name} are not of one model: {differ[0]} is "
            f"{_shown(one.get(differ[0]))} in the one and {_shown(other.get(differ[0]))} in the other; average those "
            "of one model"
        )
    if describe(source)[0] != describe(newest)[0]:
        raise UserError(
            f"{source.directory.name} and {newest.directory.name} have tensors alike and say different models in "
            "run_config.yaml, so their mean may be neither; average those of one model"
        )


def _shown(entry: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "missing" if entry is None else f"{entry[0]} of {entry[1]}"
