"""Write a Hugging Face directory as a Megatron checkpoint from which ``pretrain --load --finetune`` goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from phd_megatron.checkpoint.made import new_checkpoint
from phd_megatron.config.plain import Json
from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import ModelConfig, RunConfig
from phd_megatron.data.tokenizers import Tokenizer, load_tokenizer
from phd_megatron.errors import UserError
from phd_megatron.huggingface.architecture import Architecture
from phd_megatron.huggingface.config_json import read_config
from phd_megatron.huggingface.importing.source import HFDirectory
from phd_megatron.huggingface.mapping import Rule, VocabRows, model_rules
from phd_megatron.model.copy_embedding import COPY_EMBEDDING
from phd_megatron.runtime.output import check_directory

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

_EXPERTS, _DENSE, _ROUTER = ".mlp.experts.experts.", ".mlp.", ".mlp.router."


@dataclass(frozen=True)
class Changes:
    """What the checkpoint's model has that the source's has not.

    Attributes:
        phd: ``phd_repeat``, ``phd_window``, ``phd_chunk``, ``phd_copy_positions`` and ``phd_copy_embedding``, where
            given.
        experts: make each FFN so many experts, all equal to it, of which ``topk`` compute a row.
        seq_length: of the run; default the positions the model is declared for.
    """

    phd: dict[str, int | str]
    experts: int | None = None
    topk: int = 2
    seq_length: int | None = None
    make_vocab_size_divisible_by: int = 128


@dataclass(frozen=True)
class Imported:
    """What an import did."""

    directory: Path
    architecture: Architecture
    source: HFDirectory
    tensors: int
    parameters: int


def describe_source(source: HFDirectory, changes: Changes) -> tuple[RunConfig, Architecture, list[Rule]]:
    """The run of the checkpoint to be, resolved, the source's architecture and the rules of its tensors.

    Raises:
        UserError: for whatever cannot be represented.
    """
    model = read_config(source.content, source.family)
    run = RunConfig(model=replace(model, transformer=dict(model.transformer)))
    run.model.make_vocab_size_divisible_by = changes.make_vocab_size_divisible_by
    longest = model.max_position_embeddings or 0
    run.model.seq_length = changes.seq_length or longest
    if changes.seq_length is not None and changes.seq_length > longest:
        raise UserError(
            f"--seq-length {changes.seq_length}: the model is declared for {longest} positions; use that or less"
        )
    dtype = source.dtype
    run.training.bf16, run.training.fp16 = dtype == torch.bfloat16, dtype == torch.float16
    original = RunConfig(model=replace(run.model, transformer=dict(run.model.transformer)))
    resolve(original)
    assert original.model.vocab_size is not None
    architecture = Architecture.from_model(original.model, original.model.vocab_size)
    for name, value in changes.phd.items():
        setattr(run.model, name, value)
    _check_copies(architecture, run.model, changes)
    if changes.experts is not None:
        if architecture.moe is not None:
            raise UserError(f"--upcycle-experts {changes.experts}: the model has experts already; leave it out")
        run.model.transformer |= {
            "num_moe_experts": changes.experts,
            "moe_router_topk": changes.topk,
            "moe_ffn_hidden_size": architecture.ffn_hidden_size,
        }
    resolve(run)
    return run, architecture, model_rules(architecture, source.family)


def _check_copies(source: Architecture, model: ModelConfig, changes: Changes) -> None:
    """Refuse copies with which the originals would not be what the source computes, and options without effect."""
    repeat = model.phd_repeat
    if repeat == 1 and (given := [name for name in changes.phd if name != "phd_repeat"]):
        words = ", ".join(f"--{name.replace('_', '-')} {changes.phd[name]}" for name in given)
        raise UserError(f"{words}: no effect on a model without copies; add --phd-repeat K, or leave it out")
    apart = [
        copies if kind == "repeated" else 1
        for copies, kind in ((source.policy.repeat, source.copy_positions), (repeat, model.phd_copy_positions))
    ]
    if apart[0] != apart[1]:
        cure = "--phd-copy-positions fraction" if apart[0] == 1 else f"--phd-repeat {apart[0]} and repeated"
        raise UserError(
            f"phd_copy_positions={model.phd_copy_positions} with phd_repeat={repeat} puts tokens {apart[1]} RoPE "
            f"positions apart, and the source has them {apart[0]} apart, so originals would not be what it computes; "
            f"use {cure}, or import as it is and change it with pretrain --finetune"
        )
    if source.copy_embedding == "vector" and (repeat, model.phd_copy_embedding) != (source.policy.repeat, "vector"):
        raise UserError(
            f"the source has {source.policy.repeat - 1} vector(s) for its copies, which phd_repeat={repeat} with "
            f"phd_copy_embedding={model.phd_copy_embedding} has no place for; leave both out"
        )


def import_directory(
    path: str | Path,
    output: str | Path,
    changes: Changes,
    log: Callable[[str], None] = lambda message: None,
    check: Callable[[Imported], None] = lambda imported: None,
) -> Imported:
    """Import ``path`` into the directory ``output``, which appears complete or not at all. On one process.

    Needs memory for the model and its largest tensor. Tensors keep their type.

    Args:
        check: is given the import before it appears in ``output``, and may refuse it.

    Raises:
        UserError: for whatever cannot be represented, damaged files, or an ``output`` that is not empty.
    """
    check_directory(output)
    source = HFDirectory(path)
    run, architecture, rules = describe_source(source, changes)
    source.check_complete(rules, architecture.tied)
    tokenizer = _tokenizer_of(source, architecture.vocab_size, log)
    tensors = 0

    def fill(parts: list[ShardedTensor]) -> None:
        nonlocal tensors
        tensors = _fill(parts, source, rules)

    facts: Json = {"consumed_samples": 0, "imported_from": source.path.name}
    vocab_size = architecture.vocab_size
    with new_checkpoint(output, run, vocab_size, fill, tokenizer=tokenizer, facts=facts, log=log) as made:
        imported = Imported(made.directory, architecture, source, tensors, made.parameters)
        check(imported)
    return replace(imported, directory=Path(output) / made.directory.name)


def _tokenizer_of(source: HFDirectory, vocab_size: int, log: Callable[[str], None]) -> Tokenizer | None:
    """The directory's tokenizer, with its defaults of generation, if it has one."""
    tokenizer = load_tokenizer(source.path) if source.has_tokenizer else None
    if tokenizer is None:
        log(
            f"note: {source.path} holds no tokenizer.json; the checkpoint has neither tokenizer nor defaults of "
            "generation, so give the tokenizer to prepare"
        )
    elif tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer in {source.path} has {tokenizer.vocab_size} tokens and the embedding {vocab_size} rows; "
            "the two do not belong together"
        )
    else:
        tokenizer.generation = source.generation(vocab_size, log)
    return tokenizer


def _fill(parts: list[ShardedTensor], source: HFDirectory, rules: list[Rule]) -> int:
    """Copy every tensor of the source into the parts of a model of one rank; how many there were.

    Experts that the source lacks are its FFN, each of them; a router that it lacks stays as drawn, and vectors of
    copies zero.
    """
    by_key = {rule.mcore: rule for rule in rules}
    used: set[str] = set()
    key, whole = "", torch.empty(0)
    for part in sorted(parts, key=lambda part: part.key):
        name = part.key
        if name not in by_key:
            if _ROUTER in name or name == COPY_EMBEDDING:
                continue
            name = name.replace(_EXPERTS, _DENSE)
        if name != key:
            rule = by_key[name]
            if isinstance(rule, VocabRows):
                rule = replace(rule, padded=part.global_shape[0])
            key, whole = name, rule.to_mcore(source.read(rule.hf))
            used.update(rule.hf)
        place = part.global_slice()
        part.data.copy_(whole[place if name == part.key else place[part.prepend_axis_num :]].view_as(part.data))
    if left := {name for rule in rules for name in rule.hf} - used:
        raise UserError(f"the checkpoint has no place for {sorted(left)[:5]}; nothing is dropped, so it is not written")
    return len(used)
