"""Write a checkpoint as Megatron-Core's own GPT model saves its parameters, for Megatron-LM, Bridge and others.

That model has one copy of a token and Pre-Norm, perhaps with norms on queries and keys. The tensors are the
checkpoint's under other names, in one tensor for all layers where these are alike; each is read when it is written, so
that memory holds one of a layer.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from phd_megatron.checkpoint.find import RELEASE, TRACKER
from phd_megatron.checkpoint.format import FORMAT
from phd_megatron.checkpoint.reader import CheckpointReader
from phd_megatron.checkpoint.status import METADATA, iteration_dir, iteration_of
from phd_megatron.checkpoint.stock_names import in_their_names
from phd_megatron.checkpoint.store import CheckpointError, metadata_text
from phd_megatron.config.stock_model import args_of, not_stock
from phd_megatron.errors import UserError
from phd_megatron.huggingface.architecture import Architecture
from phd_megatron.huggingface.checkpoint import MegatronCheckpoint
from phd_megatron.huggingface.export import DTYPES, check_complete, describe
from phd_megatron.huggingface.export_output import check_output
from phd_megatron.huggingface.families import export_family
from phd_megatron.huggingface.mapping import Experts, Rule, model_rules
from phd_megatron.huggingface.shards import Log
from phd_megatron.runtime.output import new_directory

#: beside the checkpoint: who wrote it
RECORD = "exported.json"


@dataclass(frozen=True)
class _Piece:
    """A tensor of the checkpoint in its place in one of the result's: all of it, or its part ``index`` of ``count``."""

    rule: Rule
    index: int | None
    count: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def chunk(self) -> ChunkStorageMetadata:
        whole = self.index is None
        offsets = (0,) * len(self.shape) if whole else (self.index or 0, *(0 for _ in self.shape))
        return ChunkStorageMetadata(torch.Size(offsets), torch.Size(self.shape if whole else (1, *self.shape)))

    def size(self) -> torch.Size:
        return torch.Size(self.shape if self.index is None else (self.count, *self.shape))

    def read(self, source: MegatronCheckpoint) -> Tensor:
        tensor = source.read(self.rule.mcore).to(self.dtype)
        return tensor if self.index is None else tensor[None]


def export_to_megatron(
    checkpoint: str | Path,
    output: str | Path,
    *,
    dtype: str = "auto",
    overwrite: bool = False,
    verify: bool = True,
    verify_checkpoint: bool = True,
    log: Log = lambda message: None,
) -> str:
    """Write the model of ``checkpoint`` into the directory ``output``, which appears complete or not at all.

    There it lies as Megatron-LM expects it of ``--load``: a tracker, and ``iter_...`` or, of an untrained model,
    ``release``. Parameters alone, no optimizer: ``--finetune`` of Megatron-LM goes on from it.

    Args:
        dtype: ``auto`` keeps each tensor's, else ``float32``, ``bfloat16`` or ``float16``.
        verify: read every tensor again and compare it.

    Returns:
        What was done, in a line.

    Raises:
        UserError: for a model that Megatron-Core's own cannot be.
    """
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"dtype={dtype!r} is not known; choose auto, {', '.join(DTYPES)}")
    check_output(output, overwrite, _not_ours)
    source = MegatronCheckpoint(checkpoint, verify=verify_checkpoint, log=log)
    architecture, _ = describe(source)
    _check_stock(architecture, source)
    rules = model_rules(architecture, export_family(architecture))
    check_complete(source, rules)
    pieces = _pieces(source, rules, architecture, dtype)
    with new_directory(output, overwrite=overwrite, not_ours=_not_ours, keep=[source.directory]) as place:
        directory = iteration_dir(place, source.iteration) if source.iteration else place / RELEASE
        directory.mkdir()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*single process.*")
            writer = dcp.FileSystemWriter(directory, thread_count=1)
            dcp.save(dict.fromkeys(pieces), storage_writer=writer, planner=_Planner(source, pieces), no_dist=True)
        torch.save(_common(source, architecture), directory / "common.pt")
        (directory / METADATA).write_text(metadata_text(FORMAT), encoding="utf-8")
        (place / TRACKER).write_text(f"{source.iteration or RELEASE}\n", encoding="utf-8")
        record = {"exported_by": "phd-megatron", "checkpoint": str(source.directory)}
        (place / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
        if verify:
            _compare(directory, source, pieces)
    verified = "verified" if verify else "not verified"
    return (
        f"exported {source.directory} to {output} for Megatron-Core's GPTModel: {len(rules)} tensors read, "
        f"{len(pieces)} written, {verified}"
    )


def _not_ours(directory: Path) -> str | None:
    try:
        content = json.loads((directory / RECORD).read_bytes())
        if not isinstance(content, dict) or content.get("exported_by") != "phd-megatron":
            return f"its {RECORD} does not say that phd-megatron exported it"
    except (OSError, ValueError, RecursionError):
        return f"it has no {RECORD}, so it is no export of phd-megatron to Megatron"
    for path in sorted(directory.iterdir()):
        if path.name not in (RECORD, TRACKER, RELEASE) and iteration_of(path) is None:
            return f"{path.name} in it is no file that an export wrote"
    return None


def _check_stock(architecture: Architecture, source: MegatronCheckpoint) -> None:
    if problem := not_stock(architecture):
        raise UserError(
            f"{source.directory} cannot be a checkpoint of Megatron-Core's own GPTModel: {problem}; phd-megatron's "
            "checkpoints load in phd-megatron, and export without --to makes a Hugging Face directory"
        )


def _pieces(source: MegatronCheckpoint, rules: list[Rule], a: Architecture, dtype: str) -> dict[str, list[_Piece]]:
    alike = a.moe is None or all(a.moe.layers)
    by_key = {rule.mcore: rule for rule in rules}
    found = {}
    for name, ours in in_their_names(by_key, alike=alike).items():
        parts = [by_key[key] for key in ours]
        stacked = alike and ".layers." in name
        types = [source.dtype(rule.mcore) if dtype == "auto" else rule.dtype(DTYPES[dtype]) for rule in parts]
        kind = types[0]
        for other in types:
            kind = torch.promote_types(kind, other)
        found[name] = [
            _Piece(rule, index if stacked else None, len(parts), source.shape(rule.mcore), kind)
            for index, rule in enumerate(parts)
        ]
    return found


class _Planner(dcp.DefaultSavePlanner):
    """Writes tensors that are read when it is their turn."""

    def __init__(self, source: MegatronCheckpoint, pieces: dict[str, list[_Piece]]) -> None:
        super().__init__()
        self._source = source
        self._states = _extra_states(pieces)
        self._pieces = {(name, number): piece for name, parts in pieces.items() for number, piece in enumerate(parts)}

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in self._states]
        for (name, number), piece in self._pieces.items():
            chunk = piece.chunk()
            data = TensorWriteData(chunk, TensorProperties(dtype=piece.dtype), piece.size())
            items.append(WriteItem(MetadataIndex(name, chunk.offsets, number), WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items, planner_data={})
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            content = io.BytesIO()
            torch.save([None], content)  # as Megatron-Core's planner wraps an object
            return content
        return self._pieces[write_item.index.fqn, write_item.index.index or 0].read(self._source)


def _extra_states(pieces: dict[str, list[_Piece]]) -> list[str]:
    """Objects that Megatron-Core's layers ask for, whichever implementation: empty, as no FP8 scale is taken over."""
    names = []
    for name, parts in pieces.items():
        module = name.removesuffix(".weight")
        if not module.rpartition(".")[2].startswith("linear_") or module == name:
            continue
        sizes = [len(parts)] if parts[0].index is not None else []
        if isinstance(parts[0].rule, Experts):
            sizes.append(parts[0].shape[0])
        of = [module, *([module.replace("linear_qkv", "core_attention")] if module.endswith("linear_qkv") else [])]
        for place in itertools.product(*(range(size) for size in sizes or [1])):
            shard = f"_extra_state/shard_{'.'.join(map(str, place))}_{'.'.join(map(str, sizes or [1]))}"
            names += [f"{one}.{shard}" for one in of]
    return names


def _common(source: MegatronCheckpoint, a: Architecture) -> dict[str, object]:
    """What Megatron-LM reads beside the tensors."""
    model = source.run.model
    rows = source.shape("embedding.word_embeddings.weight")[0]
    args = argparse.Namespace(
        **args_of(a),
        max_position_embeddings=a.max_position_embeddings,
        seq_length=model.seq_length,
        add_position_embedding=False,
        use_rotary_position_embeddings=True,
        vocab_size=a.vocab_size,
        padded_vocab_size=rows,
        make_vocab_size_divisible_by=model.make_vocab_size_divisible_by,
        init_method_std=a.init_std,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        ckpt_format="torch_dist",
        iteration=source.iteration or 0,
        consumed_train_samples=source.training_state.get("consumed_samples", 0),
    )
    metadata = {"non_homogeneous_layers": a.moe is not None and not all(a.moe.layers), "singleton_local_shards": False}
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": source.iteration or 0,
        "content_metadata": metadata,
    }


class _Comparison(dcp.DefaultLoadPlanner):
    """Reads each piece by itself and compares it with the checkpoint's."""

    def __init__(self, source: MegatronCheckpoint, pieces: dict[str, list[_Piece]]) -> None:
        super().__init__()
        self._source, self._pieces = source, pieces
        self.differ: list[str] = []

    def _piece(self, item: ReadItem) -> _Piece:
        return self._pieces[item.dest_index.fqn][item.dest_index.index or 0]

    def create_local_plan(self) -> LoadPlan:
        items = []
        for name, parts in self._pieces.items():
            for number, piece in enumerate(parts):
                chunk = piece.chunk()
                index, none = MetadataIndex(name, chunk.offsets, number), torch.Size([0] * len(chunk.sizes))
                items.append(ReadItem(LoadItemType.TENSOR, index, none, index, none, chunk.sizes))
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        piece = self._piece(read_item)
        return torch.empty(piece.chunk().sizes, dtype=piece.dtype)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        expected = self._piece(read_item).read(self._source).contiguous()
        if not torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8)):
            self.differ.append(read_item.dest_index.fqn)


def _compare(directory: Path, source: MegatronCheckpoint, pieces: dict[str, list[_Piece]]) -> None:
    comparison = _Comparison(source, pieces)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")
        dcp.load(dict.fromkeys(pieces), storage_reader=CheckpointReader(directory), planner=comparison, no_dist=True)
    if comparison.differ:
        raise CheckpointError(
            f"{comparison.differ[0]} is not in {directory} what was written; look at the disk, and export again"
        )
