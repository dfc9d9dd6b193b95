"""Checkpoints that Megatron-LM, Megatron-Bridge or Megatron-Core alone wrote (torch_dist), read without trusting them.

Theirs say what they are in ``common.pt``, or since Megatron-Core 0.19 among the tensors: Megatron-LM its ``args``, the
iteration, optimizer groups and schedule. Bridge has ``run_config.yaml`` and ``train_state.pt`` beside that. Whatever
object lies in there is read as its attributes alone, with no class of it made.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy
import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from phd_megatron.checkpoint.format import SafeLoad, check_common
from phd_megatron.checkpoint.reader import CheckpointReader
from phd_megatron.checkpoint.status import RUN_CONFIG, TRAINING_STATE
from phd_megatron.checkpoint.stock_names import Place, asked_there
from phd_megatron.checkpoint.store import CheckpointError
from phd_megatron.config.architecture import architecture_of, padded_vocab_size
from phd_megatron.config.plain import Json, Plain
from phd_megatron.config.schema import ModelConfig, RunConfig
from phd_megatron.config.stock_model import check_words, not_stock
from phd_megatron.config.yaml_text import read_yaml_file
from phd_megatron.errors import shown
from phd_megatron.phd.kv_policy import KVPolicy
from phd_megatron.runtime import agreement

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import CommonStateDict, ShardedStateDict, StateDict
    from torch.distributed.checkpoint.metadata import STORAGE_TYPES
    from torch.distributed.checkpoint.planner import ReadItem

_BRIDGES_STATE = "train_state.pt"
_DEEPEST = 4  # a group lies below its optimizer's part of a chain
#: Megatron-Core 0.19's object of what was in common.pt
_COMMON_OBJECT = "common_state/shard_0_1"


@dataclass(frozen=True)
class Stock:
    """What a stock checkpoint says of itself beside its tensors.

    Attributes:
        common: what is the same on all ranks: optimizer groups, schedule, how it is sharded.
        model: what is said of the model, under Megatron-LM's or Megatron-Core's names; empty where nothing is.
        training_state: place in the run, under our names; empty where nothing is.
    """

    path: Path
    common: CommonStateDict
    model: Mapping[str, Plain]
    training_state: Json

    @classmethod
    def read(cls, path: Path, reader: CheckpointReader) -> Stock:
        """Read the small files of a checkpoint.

        Raises:
            CheckpointError: one of them is damaged.
        """
        common = _read_common(path, reader)
        if (path / RUN_CONFIG).is_file():
            return cls(path, common, *_bridges(path, common))
        said = _args(path, common.get("args"))
        place = {
            "iteration": common.get("iteration"),
            "consumed_samples": said.get("consumed_train_samples"),
            "first_batch_size": said.get("global_batch_size"),
        }
        return cls(path, common, said, _counts(place))


def _args(path: Path, args: Plain) -> Json:
    said = {} if args is None else args if isinstance(args, dict) else getattr(args, "__dict__", None)
    if not isinstance(said, dict):
        raise CheckpointError(f"{path} is damaged: its args are {shown(args)}, no names; load another checkpoint")
    return dict(said)


def _bridges(path: Path, common: CommonStateDict) -> tuple[Json, Json]:
    """What Megatron-Bridge says of the model and of the place in the run."""
    content = read_yaml_file(path / RUN_CONFIG)
    config = content if isinstance(content, dict) else {}
    model, train = (part if isinstance(part := config.get(name), dict) else {} for name in ("model", "train"))
    state = _read_objects(path / _BRIDGES_STATE, path) if (path / _BRIDGES_STATE).is_file() else {}
    place = {
        "iteration": state.get("step", common.get("iteration")),
        "consumed_samples": state.get("consumed_train_samples"),
        "first_batch_size": train.get("global_batch_size"),
    }
    return model, _counts(place)


def _counts(place: Mapping[str, Plain | torch.Tensor]) -> Json:
    """Those of the values that are counts."""
    single = {
        name: value.item() for name, value in place.items() if isinstance(value, torch.Tensor) and value.numel() == 1
    }
    return {name: value for name, value in {**place, **single}.items() if type(value) is int and 0 <= value < 2**62}


def place_in_run(stock: Stock) -> Json:
    """Where the run was that saved a stock checkpoint.

    Raises:
        CheckpointError: it does not say.
    """
    if missing := [name for name in ("iteration", "consumed_samples") if name not in stock.training_state]:
        raise CheckpointError(
            f"{stock.path / TRAINING_STATE} is missing, and no {' and no '.join(missing)} of Megatron-LM or Bridge is "
            "there, so nothing says where the run was; load another checkpoint, or take the parameters alone with "
            "--finetune"
        )
    return stock.training_state


def stock_checks(stock: Stock, stored: Mapping[str, STORAGE_TYPES], run: RunConfig) -> list[str]:
    """Compare what tensors do not show with this run's model; notes on what is not taken over.

    Args:
        stored: what the checkpoint holds, under our names.

    Raises:
        UserError: for another model, or fewer rows of the vocabulary than the run has tokens.
    """
    ours = architecture_of(run.model)
    model = replace(ours, policy=KVPolicy()) if run.checkpoint.finetune else ours  # which may add copies
    if problem := not_stock(model):
        raise CheckpointError(
            f"{stock.path} is of Megatron-Core's own GPTModel, and this run has {problem}; "
            f"{'take its parameters with --finetune' if ours.policy.repeat > 1 else 'choose one of these'}"
        )
    check_words(stock.model, ours, str(stock.path))
    notes = [f"note: {stock.path} is of Megatron-LM, Bridge or Megatron-Core, not of phd-megatron"]
    notes += _compare_vocabulary(stock, stored.get("embedding.word_embeddings.weight"), run.model)
    if not stock.model:
        notes.append(
            "note: it does not say its number of heads, epsilon, base of RoPE and the like; those of this run are taken"
        )
    if not run.checkpoint.finetune and not run.checkpoint.no_load_rng:
        notes.append("note: random-number state (dropout) starts afresh")
    return notes


def _compare_vocabulary(stock: Stock, table: STORAGE_TYPES | None, model: ModelConfig) -> list[str]:
    tokens, said = model.vocab_size, stock.model.get("vocab_size")
    assert tokens is not None  # resolved
    rows = int(table.size[0]) if isinstance(table, TensorStorageMetadata) else tokens
    cure = "use the tokenizer that it was trained with, or set vocab_size"
    if rows < tokens:
        raise CheckpointError(f"{stock.path} has {rows} rows of the vocabulary and this run {tokens} tokens; {cure}")
    if type(said) is int and said > tokens:
        raise CheckpointError(f"{stock.path} is of {said} tokens and this run of {tokens}; {cure}")
    kept = padded_vocab_size(tokens, model.make_vocab_size_divisible_by)
    return [f"note: it has {rows} rows of the vocabulary, of which this run keeps {kept}"] if rows > kept else []


# ---------------------------------------------------------------- objects, without their classes


_DEFAULT = "collections.defaultdict"
#: what torch lets numpy's numbers and arrays be, told their types
_NUMBERS = [type(numpy.dtype(code)) for code in "?bhilqBHILQefd"]


class _Attributes:
    """Stands for an object in a file: it has its attributes, and nothing that its class does."""

    def __new__(cls, *values: Plain) -> _Attributes:
        return super().__new__(cls)

    def __init__(self, *values: Plain) -> None:
        self.values = values

    def __setstate__(self, state: Plain) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.__dict__.update(part)

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self.values or ''}"


def _without_classes(stream: BinaryIO) -> AbstractContextManager[None]:
    names = {*torch.serialization.get_unsafe_globals_in_checkpoint(stream), "argparse.Namespace"} - {_DEFAULT}
    stream.seek(0)
    standing_for = [(type(name.rpartition(".")[2], (_Attributes,), {}), name) for name in names]
    return torch.serialization.safe_globals([io.BytesIO, *_NUMBERS, *standing_for, (_mapping, _DEFAULT)])


def _mapping(*values: Plain) -> Json:
    return {}


def _read_objects(file: Path | io.BytesIO, where: Path) -> CommonStateDict:
    try:
        with open(file, "rb") if isinstance(file, Path) else file as stream, _without_classes(stream):
            content = torch.load(stream, map_location="cpu", weights_only=True)
        if isinstance(file, io.BytesIO) and isinstance(content, list) and len(content) == 1:
            content = content[0]  # as the planner of Megatron-Core wraps an object
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}, not a mapping")
    except Exception as error:
        # torch begins with advice that nobody should follow
        said = str(error).rpartition("WeightsUnpickler error:")[2].strip().splitlines()
        first = said[0] if said else "no more is said"
        name = file if isinstance(file, Path) else f"{_COMMON_OBJECT} in {where}"
        raise CheckpointError(
            f"{name} cannot be read ({type(error).__name__}: {first}); load another checkpoint"
        ) from error
    return content


class _Bytes(dcp.DefaultLoadPlanner):
    """Takes an object as it lies there."""

    content: io.BytesIO

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.content = value


def _read_common(path: Path, reader: CheckpointReader) -> CommonStateDict:
    file = path / COMMON_STATE_FNAME
    if file.is_file():
        return check_common(file, _read_objects(file, path))
    if _COMMON_OBJECT not in reader.read_metadata().state_dict_metadata:
        return {}
    planner = _Bytes()
    dcp.load({_COMMON_OBJECT: io.BytesIO()}, storage_reader=reader, planner=planner, no_dist=True)
    return check_common(path / _COMMON_OBJECT, _read_objects(planner.content, path))


# ---------------------------------------------------------------- tensors


def load_stock(
    state: ShardedStateDict, stock: Stock, reader: CheckpointReader, places: Mapping[str, Place]
) -> StateDict:
    """Fill a state dict of ours, as Megatron-Core's ``load`` does, from where a stock checkpoint has it; collective.

    Args:
        places: of the tensors, from :func:`~phd_megatron.checkpoint.stock_names.in_our_names`.
    """
    common: StateDict = {}
    if "optimizer" in state:
        common["optimizer"] = agreement.everywhere(lambda: _groups_for(state["optimizer"], stock))
    sharded, here, factories = load_preprocess(state)
    sharded, _ = extract_sharded_base(sharded)
    dict_list_map_inplace(lambda value: _asked(value, places), sharded)
    validate_sharding_integrity(determine_global_metadata(sharded)[1])
    merge(common, here)
    merge(common, SafeLoad(reader).load(sharded, stock.path))
    loaded: StateDict = apply_factory_merges(common, factories)
    return loaded


def _groups_for(state: ShardedStateDict, stock: Stock) -> StateDict:
    """The stock optimizer's groups for each part of ours, which divides experts and the rest as it always does.

    Raises:
        CheckpointError: there are none.
    """
    groups = list(_groups_in(stock.common.get("optimizer")))
    if not groups:
        raise CheckpointError(
            f"{stock.path} has optimizer states without the groups of their parameters; take the parameters alone with "
            "--no-load-optim or --finetune"
        )
    if any(not isinstance(group.get("step"), (int, float, torch.Tensor)) for group in groups):
        raise CheckpointError(
            f"{stock.path} does not say how many steps its optimizer did; take the parameters alone with "
            "--no-load-optim or --finetune"
        )
    parts = [number for number in state if isinstance(number, int)]
    one = [{"optimizer": {"param_groups": [dict(group) for group in groups]}} for _ in parts or [0]]
    return dict(zip(parts, one, strict=True)) if parts else one[0]


def _groups_in(saved: Plain, depth: int = 0) -> Iterator[Json]:
    """Groups of a chain in order; each knows the steps that were done, and no parameters."""
    if not isinstance(saved, dict) or depth > _DEEPEST:
        return
    if isinstance(groups := saved.get("param_groups"), list):
        state = saved.get("state")
        done = {"step": state["common_step"]} if isinstance(state, dict) and "common_step" in state else {}
        for group in groups:
            named = group if isinstance(group, dict) else {}  # it then lacks its steps
            yield {name: value for name, value in {**named, **done}.items() if name != "params"}
    else:
        for part in saved.values():
            yield from _groups_in(part, depth + 1)


def _asked(value: ShardedTensor | Plain, places: Mapping[str, Place]) -> ShardedTensor | Plain:
    return asked_there(value, places[value.key]) if isinstance(value, ShardedTensor) else value
