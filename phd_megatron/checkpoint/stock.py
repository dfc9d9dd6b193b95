"""Checkpoints that Megatron-LM, Megatron-Bridge or Megatron-Core alone wrote (torch_dist), read without trusting them.

Theirs say what they are in ``common.pt``, or since Megatron-Core 0.19 among the tensors: Megatron-LM its ``args``, the
iteration, optimizer groups and schedule. Bridge has ``run_config.yaml`` and ``train_state.pt`` beside that. Whatever
object lies in there is read as its attributes alone, with no class of it made.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

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
from phd_megatron.config.architecture import architecture_of
from phd_megatron.config.plain import Json, Plain
from phd_megatron.config.schema import RunConfig
from phd_megatron.config.stock_model import check_words
from phd_megatron.config.yaml_text import read_yaml_file

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import CommonStateDict, ShardedStateDict, StateDict
    from torch.distributed.checkpoint.metadata import STORAGE_TYPES
    from torch.distributed.checkpoint.planner import ReadItem

_BRIDGES_STATE = "train_state.pt"
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
        args = common.get("args")
        said = {} if args is None else dict(vars(args))
        place = {
            "iteration": common.get("iteration"),
            "consumed_samples": said.get("consumed_train_samples"),
            "first_batch_size": said.get("global_batch_size"),
        }
        return cls(path, common, said, _counts(place))


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
    found = {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in place.items()}
    return {name: value for name, value in found.items() if type(value) is int and value >= 0}


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
    model = run.model
    check_words(stock.model, architecture_of(model), str(stock.path))
    table = stored.get("embedding.word_embeddings.weight")
    assert model.vocab_size is not None  # resolved
    if isinstance(table, TensorStorageMetadata) and (rows := int(table.size[0])) < model.vocab_size:
        raise CheckpointError(
            f"{stock.path} has {rows} rows of the vocabulary and this run {model.vocab_size} tokens; use the tokenizer "
            "that it was trained with"
        )
    notes = [f"note: {stock.path} is of Megatron-LM, Bridge or Megatron-Core, not of phd-megatron"]
    if not stock.model:
        notes.append(
            "note: it does not say its number of heads, epsilon, base of RoPE and the like; those of this run are taken"
        )
    if not run.checkpoint.finetune and not run.checkpoint.no_load_rng:
        notes.append("note: random-number state (dropout) starts afresh")
    return notes


# ---------------------------------------------------------------- objects, without their classes


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
    names = torch.serialization.get_unsafe_globals_in_checkpoint(stream)
    stream.seek(0)
    standing_for = [
        (type(name.rpartition(".")[2], (_Attributes,), {}), name) for name in {*names, "argparse.Namespace"}
    ]
    return torch.serialization.safe_globals([io.BytesIO, *standing_for])


def _read_objects(file: Path | io.BytesIO, where: Path) -> CommonStateDict:
    try:
        with open(file, "rb") if isinstance(file, Path) else file as stream, _without_classes(stream):
            content = torch.load(stream, map_location="cpu", weights_only=True)
        if isinstance(file, io.BytesIO) and isinstance(content, list) and len(content) == 1:
            content = content[0]  # as the planner of Megatron-Core wraps an object
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}, not a mapping")
    except Exception as error:
        first = " ".join(str(error).strip().splitlines()[:1])
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
    sharded, here, factories = load_preprocess(state)
    sharded, _ = extract_sharded_base(sharded)
    dict_list_map_inplace(lambda value: _asked(value, places), sharded)
    validate_sharding_integrity(determine_global_metadata(sharded)[1])
    common: StateDict = {}
    if "optimizer" in state:
        common["optimizer"] = _groups_for(state["optimizer"], stock)
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
    parts = [number for number in state if isinstance(number, int)]
    one = [{"optimizer": {"param_groups": [dict(group) for group in groups]}} for _ in parts or [0]]
    return dict(zip(parts, one, strict=True)) if parts else one[0]


def _groups_in(saved: Plain) -> Iterator[Json]:
    """Groups at whatever depth, of a chain in order; each knows the steps that were done, and no parameters."""
    if not isinstance(saved, dict):
        return
    if isinstance(groups := saved.get("param_groups"), list):
        state = saved.get("state")
        done = {"step": state["common_step"]} if isinstance(state, dict) and "common_step" in state else {}
        for group in groups:
            yield {name: value for name, value in {**group, **done}.items() if name != "params"}
    else:
        for part in saved.values():
            yield from _groups_in(part)


def _asked(value: ShardedTensor | Plain, places: Mapping[str, Place]) -> ShardedTensor | Plain:
    return asked_there(value, places[value.key]) if isinstance(value, ShardedTensor) else value
