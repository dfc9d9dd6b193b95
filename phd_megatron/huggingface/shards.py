"""The safetensors files of an export: which tensors go into which, written one file at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from phd_megatron.errors import UserError
from phd_megatron.huggingface.checkpoint import MegatronCheckpoint
from phd_megatron.huggingface.json_values import Fields
from phd_megatron.huggingface.mapping import Rule

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
Log = Callable[[str], None]


@dataclass
class Written:
    """What the weight files hold; ``bytes`` of all, ``largest`` of one."""

    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    largest: int = 0


def parse_size(size: str | int) -> int:
    """``"5GB"`` to bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    unit = _UNITS.get(match.group(2).upper()) if match else None
    if match is None or unit is None or not 1 <= float(match.group(1)) * unit < 2**63:
        raise UserError(f"max_shard_size={size!r} is no size; write a number with KB, MB, GB, KiB, MiB or GiB")
    return int(float(match.group(1)) * unit)


def plan_shards(source: MegatronCheckpoint, rules: list[Rule], dtype: torch.dtype, limit: int) -> list[list[Rule]]:
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


def write_shards(
    directory: Path, source: MegatronCheckpoint, shards: list[list[Rule]], dtype: torch.dtype, log: Log
) -> Written:
    """Write the weight files, and their index where there are several.

    Raises:
        UserError: a value is no number, or no number in the export's type, or a file cannot be written.
    """
    written = Written()
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
        index: Fields = {"metadata": {"total_size": written.bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(directory / "model.safetensors.index.json", index)
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


def write_json(path: Path, content: Fields) -> None:
    """Write a mapping, for people too."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
