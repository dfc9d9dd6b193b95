"""Write a Megatron checkpoint as a self-contained Hugging Face directory, tensor by tensor, on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from phd_megatron.data.generation import GENERATION_FILE, Values, outside, read_generation
from phd_megatron.data.record import TrainingData
from phd_megatron.data.tokenizer_files import copy_tokenizer_files, read_mapping
from phd_megatron.data.tokenizers import load_tokenizer
from phd_megatron.errors import UserError
from phd_megatron.huggingface.architecture import Architecture
from phd_megatron.huggingface.bundle_files import write_bundle
from phd_megatron.huggingface.chat_template import add_template, read_template
from phd_megatron.huggingface.checkpoint import MegatronCheckpoint
from phd_megatron.huggingface.config_json import TokenIds, write_config
from phd_megatron.huggingface.export_output import check_output, not_our_export
from phd_megatron.huggingface.families import export_family
from phd_megatron.huggingface.family import Family
from phd_megatron.huggingface.json_values import Fields
from phd_megatron.huggingface.mapping import Rule, model_rules, some_names
from phd_megatron.huggingface.model_card import model_card
from phd_megatron.huggingface.shards import Log, Written, parse_size, plan_shards, write_json, write_shards
from phd_megatron.runtime.output import new_directory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Verify = Literal["full", "tensors", "none"]
_VERIFIED = {"full": "verified", "tensors": "tensors verified, logits not", "none": "not verified"}


@dataclass(frozen=True)
class ExportReport:
    """What an export did. ``largest_shard`` in bytes is about the memory it needed, without verification."""

    output: Path
    checkpoint: Path
    model_class: str
    tensors_read: int
    tensors_written: int
    parameters: int
    bytes_written: int
    largest_shard: int
    shards: int
    dtype: str
    verified: Verify

    def __str__(self) -> str:
        return (
            f"exported {self.checkpoint} to {self.output}: {self.model_class}, {self.parameters:,} parameters in "
            f"{self.dtype}, {self.tensors_read} tensors read, {self.tensors_written} written into {self.shards} "
            f"file(s) of {self.bytes_written / 1e6:.1f} MB, {_VERIFIED[self.verified]}"
        )


def export_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    dtype: str = "auto",
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    verify: Verify = "full",
    native: bool = True,
    verify_checkpoint: bool = True,
    chat_template: str | Path | None = None,
    log: Log = lambda message: None,
) -> ExportReport:
    """Export the model of ``checkpoint`` into the directory ``output``, which appears complete or not at all.

    Args:
        checkpoint: a ``--save`` directory, whose tracker chooses, or one ``iter_...`` directory; saved by any layout.
        dtype: ``auto`` keeps the checkpoint's, else ``float32``, ``bfloat16`` or ``float16``.
        max_shard_size: of one safetensors file, such as ``"5GB"``; a larger tensor gets its own.
        overwrite: replace ``output`` if it exists.
        verify: ``full`` loads the result through ``AutoModelForCausalLM``, compares every tensor with the checkpoint,
            and the logits with the Megatron-Core model's; needs memory for the whole model in float32. ``tensors``
            leaves the logits out, ``none`` everything.
        native: use a class of transformers' own where it computes the same; False always bundles the model's code.
        verify_checkpoint: compare every file of the checkpoint with its checksum first.
        chat_template: file of a template that is tried with the tokenizer and saved beside it, in place of one that is
            there.

    Raises:
        UserError: for a checkpoint that cannot be exported exactly, with nothing left behind in ``output``.
    """
    limit = parse_size(max_shard_size)
    if dtype not in ("auto", *DTYPES):  # before every file of the checkpoint is read
        raise UserError(f"dtype={dtype!r} is not known; choose auto, {', '.join(DTYPES)}")
    check_output(output, overwrite)
    template = None if chat_template is None else read_template(chat_template)
    model = _model_of(MegatronCheckpoint(checkpoint, verify=verify_checkpoint, log=log), dtype, native, log)
    source, shards = model.source, plan_shards(model.source, model.rules, model.dtype, limit)
    with new_directory(output, overwrite=overwrite, not_ours=not_our_export, keep=[source.directory]) as directory:
        written = write_shards(directory, source, shards, model.dtype, log)
        _write_texts(directory, model, written.parameters, Path(output).name)
        if chat_template is not None and template is not None:
            if source.tokenizer_dir is None:
                raise UserError(f"{chat_template}: {source.directory} has no tokenizer to save it with; leave it out")
            add_template(directory, template, chat_template)
        if verify != "none":
            from phd_megatron.huggingface.verify import verify_export

            logits = ", and its logits with the Megatron model's" if verify == "full" else ""
            log(f"verifying: loading the result and comparing every tensor with the checkpoint{logits}")
            verify_export(directory, source, model.rules, model.dtype, verify)
    return _report(Path(output), model, written, len(shards), verify)


@dataclass(frozen=True)
class _Model:
    """What is exported: a checkpoint's model as one of a family, with tensors of ``dtype``."""

    source: MegatronCheckpoint
    architecture: Architecture
    family: Family
    rules: list[Rule]
    dtype: torch.dtype
    tokens: TokenIds
    generation: Values

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def _model_of(source: MegatronCheckpoint, dtype: str, native: bool, log: Log) -> _Model:
    architecture, tokens = describe(source)
    generation = generation_defaults(source, architecture.vocab_size, log)
    tokens = TokenIds(*(generation.get(f"{name}_token_id", value) for name, value in vars(tokens).items()))
    family = export_family(architecture, native)
    rules = model_rules(architecture, family)
    check_complete(source, rules)
    return _Model(source, architecture, family, rules, _target_dtype(source, rules, dtype), tokens, generation)


def _report(output: Path, model: _Model, written: Written, shards: int, verified: Verify) -> ExportReport:
    return ExportReport(
        output=output,
        checkpoint=model.source.directory,
        model_class=model.family.model_class,
        tensors_read=len(model.rules),
        tensors_written=written.tensors,
        parameters=written.parameters,
        bytes_written=written.bytes,
        largest_shard=written.largest,
        shards=shards,
        dtype=model.dtype_name,
        verified=verified,
    )


def _write_texts(directory: Path, model: _Model, parameters: int, title: str) -> None:
    """Everything of an export but its weights."""
    source = model.source
    config = write_config(model.architecture, model.family, model.dtype_name, model.tokens)
    write_json(directory / "config.json", config)
    write_json(directory / GENERATION_FILE, {**_ids(model.tokens), **model.generation})
    if source.tokenizer_dir is not None:
        # Nothing but a tokenizer's files: what else a checkpoint of others has there would be loaded as ours.
        copy_tokenizer_files(source.tokenizer_dir, directory)
    if model.family.is_bundled:
        write_bundle(directory)
    if (data := TrainingData.of_run(source.run)) is not None:
        data.write(directory)
    card = model_card(model.architecture, source, model.family, model.dtype_name, parameters, title)
    (directory / "README.md").write_text(card, encoding="utf-8")


def describe(source: MegatronCheckpoint) -> tuple[Architecture, TokenIds]:
    """The model of a checkpoint, and its tokenizer's special tokens."""
    vocab_size, tokens = source.run.model.vocab_size, TokenIds()
    if source.tokenizer_dir is not None:
        tokenizer = load_tokenizer(source.tokenizer_dir)
        vocab_size = vocab_size or tokenizer.vocab_size
        if tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"the tokenizer in {source.tokenizer_dir} has {tokenizer.vocab_size} tokens, the model {vocab_size}; "
                "the two do not belong together"
            )
        tokens = TokenIds(bos=_bos(source.tokenizer_dir), eos=tokenizer.eod, pad=tokenizer.pad)
    if vocab_size is None:
        raise UserError(f"{source.directory} neither says vocab_size nor holds a tokenizer; its vocabulary is unknown")
    return Architecture.from_model(source.run.model, vocab_size), tokens


def _bos(directory: Path) -> int | None:
    text = read_mapping(directory / "tokenizer_config.json").get("bos_token")
    text = text.get("content") if isinstance(text, dict) else text
    added = read_mapping(directory / "tokenizer.json").get("added_tokens")
    for token in added if isinstance(added, list) and isinstance(text, str) else ():
        if isinstance(token, dict) and token.get("content") == text and type(token.get("id")) is int:
            return int(token["id"])
    return None


def check_complete(source: MegatronCheckpoint, rules: list[Rule]) -> None:
    """Refuse a checkpoint with a model tensor too many, too few, or of another shape."""
    expected = {rule.mcore for rule in rules}
    found = set(source.tensors)
    if left := sorted(found - expected):
        raise UserError(
            f"{source.directory} holds {len(left)} model tensor(s) that the export has no place for: "
            f"{some_names(left)}; nothing is dropped silently, so this model cannot be exported"
        )
    if missing := sorted(expected - found):
        raise UserError(
            f"{source.directory} lacks {len(missing)} tensor(s) of the model its run_config.yaml describes: "
            f"{some_names(missing)}; load another checkpoint"
        )
    for rule in rules:
        rule.check(source.shape(rule.mcore))


def _target_dtype(source: MegatronCheckpoint, rules: list[Rule], dtype: str) -> torch.dtype:
    if dtype != "auto":
        return DTYPES[dtype]
    target = source.dtype(rules[0].mcore)
    for rule in rules:
        if rule.dtype(target) == target:  # others keep a type of their own
            target = torch.promote_types(target, source.dtype(rule.mcore))
    return target


def generation_defaults(source: MegatronCheckpoint, vocab_size: int, log: Log) -> Values:
    """Defaults of generation that lie beside a checkpoint's tokenizer; those that do not fit are left out by name."""
    if source.tokenizer_dir is None:
        return {}
    values, left_out = read_generation(source.tokenizer_dir)
    if left_out := sorted({*left_out, *outside(values, vocab_size)}):
        log(
            f"note: {source.tokenizer_dir / GENERATION_FILE}: {', '.join(left_out)} left out, as not known or not in "
            "the vocabulary"
        )
    return {name: value for name, value in values.items() if name not in left_out}


def _ids(tokens: TokenIds) -> Fields:
    ids = {"bos_token_id": tokens.bos, "eos_token_id": tokens.eos, "pad_token_id": tokens.pad}
    return {name: value for name, value in ids.items() if value is not None}
