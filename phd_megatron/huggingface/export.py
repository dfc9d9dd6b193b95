"""Write a Megatron checkpoint as a self-contained Hugging Face directory, tensor by tensor, on the CPU."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from phd_megatron.data.generation import GENERATION_FILE, outside, read_generation
from phd_megatron.data.record import TrainingData
from phd_megatron.data.tokenizer_files import copy_tokenizer_files, read_mapping
from phd_megatron.data.tokenizers import load_tokenizer
from phd_megatron.errors import UserError
from phd_megatron.huggingface.architecture import BUNDLED, Architecture, TokenIds
from phd_megatron.huggingface.bundle_files import write_bundle
from phd_megatron.huggingface.checkpoint import MegatronCheckpoint
from phd_megatron.huggingface.export_output import check_output, not_our_export
from phd_megatron.huggingface.mapping import Rule, model_rules
from phd_megatron.huggingface.model_card import model_card
from phd_megatron.runtime.output import new_directory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
Log = Callable[[str], Any]
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

    Raises:
        UserError: for a checkpoint that cannot be exported exactly, with nothing left behind in ``output``.
    """
    limit = parse_size(max_shard_size)
    if dtype not in ("auto", *DTYPES):  # before every file of the checkpoint is read
        raise UserError(f"dtype={dtype!r} is not known; choose auto, {', '.join(DTYPES)}")
    check_output(output, overwrite)
    source = MegatronCheckpoint(checkpoint, verify=verify_checkpoint, log=log)
    architecture, tokens = describe(source)
    generation = generation_defaults(source, architecture.vocab_size, log)
    tokens = TokenIds(*(generation.get(f"{name}_token_id", value) for name, value in vars(tokens).items()))
    model_class = architecture.model_class(native)
    rules = model_rules(architecture, model_class)
    check_complete(source, rules)
    target = _target_dtype(source, rules, dtype)
    with new_directory(output, overwrite=overwrite, not_ours=not_our_export, keep=[source.directory]) as directory:
        shards = _plan_shards(source, rules, target, limit)
        written = _write_shards(directory, source, shards, target, log)
        dtype_name = str(target).removeprefix("torch.")
        _write_json(directory / "config.json", architecture.hf_config(model_class, dtype_name, tokens))
        _write_json(directory / GENERATION_FILE, {**_ids(tokens), **generation})
        if source.tokenizer_dir is not None:
            # Nothing but a tokenizer's files: what else a checkpoint of others has there would be loaded as ours.
            copy_tokenizer_files(source.tokenizer_dir, directory)
        if model_class == BUNDLED:
            write_bundle(directory)
        if (data := TrainingData.of_run(source.run)) is not None:
            data.write(directory)
        card = model_card(architecture, source, model_class, dtype_name, written.parameters, Path(output).name)
        (directory / "README.md").write_text(card, encoding="utf-8")
        if verify != "none":
            from phd_megatron.huggingface.verify import verify_export

            logits = ", and its logits with the Megatron model's" if verify == "full" else ""
            log(f"verifying: loading the result and comparing every tensor with the checkpoint{logits}")
            verify_export(directory, source, rules, target, verify)
    return ExportReport(
        output=Path(output),
        checkpoint=source.directory,
        model_class=model_class,
        tensors_read=len(rules),
        tensors_written=written.tensors,
        parameters=written.parameters,
        bytes_written=written.bytes,
        largest_shard=written.largest,
        shards=len(shards),
        dtype=dtype_name,
        verified=verify,
    )


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
            f"{source.directory} holds {len(left)} model tensor(s) that the export has no place for: {_some(left)}; "
            "nothing is dropped silently, so this model cannot be exported"
        )
    if missing := sorted(expected - found):
        raise UserError(
            f"{source.directory} lacks {len(missing)} tensor(s) of the model its run_config.yaml describes: "
            f"{_some(missing)}; load another checkpoint"
        )
    for rule in rules:
        rule.check(source.shape(rule.mcore))


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _target_dtype(source: MegatronCheckpoint, rules: list[Rule], dtype: str) -> torch.dtype:
    if dtype != "auto":
        return DTYPES[dtype]
    target = source.dtype(rules[0].mcore)
    for rule in rules:
        if rule.dtype(target) == target:  # others keep a type of their own
            target = torch.promote_types(target, source.dtype(rule.mcore))
    return target


def parse_size(size: str | int) -> int:
    """``"5GB"`` to bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    unit = _UNITS.get(match.group(2).upper()) if match else None
    if match is None or unit is None or not 1 <= float(match.group(1)) * unit < 2**63:
        raise UserError(f"max_shard_size={size!r} is no size; write a number with KB, MB, GB, KiB, MiB or GiB")
    return int(float(match.group(1)) * unit)


def generation_defaults(source: MegatronCheckpoint, vocab_size: int, log: Log) -> dict[str, Any]:
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


def _ids(tokens: TokenIds) -> dict[str, Any]:
    ids = {"bos_token_id": tokens.bos, "eos_token_id": tokens.eos, "pad_token_id": tokens.pad}
    return {name: value for name, value in ids.items() if value is not None}


# ---------------------------------------------------------------- files


@dataclass
class _Written:
    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    largest: int = 0


def _plan_shards(source: MegatronCheckpoint, rules: list[Rule], dtype: torch.dtype, limit: int) -> list[list[Rule]]:
    """Which rules' tensors go into each file. No data is read: the rules run on meta tensors."""
    shards: list[list[Rule]] = [[]]
    size = 0
    for rule in rules:
        outline = torch.empty(source.shape(rule.mcore), dtype=rule.dtype(dtype), device="meta")
        parts = rule.to_hf(outline)
        needed = sum(part.numel() * part.element_size() for part in parts.values())
        if shards[-1] and size + needed > limit:
            shards.append([])
            size = 0
        shards[-1].append(rule)
        size += needed
    return shards


def _write_shards(
    directory: Path, source: MegatronCheckpoint, shards: list[list[Rule]], dtype: torch.dtype, log: Log
) -> _Written:
    written = _Written()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for rule in shard:
            parts = rule.to_hf(_finite(source, rule.mcore, rule.dtype(dtype)))
            # A clone, not a view: safetensors refuses tensors that share storage.
            kept = rule.dtype(dtype)
            tensors |= {key: part.to(kept).clone(memory_format=torch.contiguous_format) for key, part in parts.items()}
        try:
            save_file(tensors, directory / name, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write {name}: {error}; free some space or choose another --output") from error
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        written.tensors += len(tensors)
        written.parameters += sum(tensor.numel() for tensor in tensors.values())
        written.bytes += size
        written.largest = max(written.largest, size)
        weight_map |= dict.fromkeys(tensors, name)
        log(f"wrote {name}: {len(tensors)} tensors, {size / 1e6:.1f} MB")
    if len(shards) > 1:
        index = {"metadata": {"total_size": written.bytes}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(directory / "model.safetensors.index.json", index)
    return written


def _finite(source: MegatronCheckpoint, name: str, dtype: torch.dtype) -> Tensor:
    """One tensor of the checkpoint, all of whose values are numbers, in the export's type too."""
    tensor = source.read(name)
    if not tensor.isfinite().all():
        raise UserError(
            f"{name} of {source.directory} holds {_count(tensor)} values that are not finite: the run has diverged; "
            "export an earlier checkpoint"
        )
    if not (cast := tensor.to(dtype)).isfinite().all():
        raise UserError(
            f"{name} of {source.directory} holds {_count(cast)} values beyond {dtype}; export with --dtype bfloat16 or "
            "float32"
        )
    return tensor


def _count(tensor: Tensor) -> int:
    return int((~tensor.isfinite()).sum())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
