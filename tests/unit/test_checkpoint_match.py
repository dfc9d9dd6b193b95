"""What a checkpoint lacks, has too much or holds otherwise, by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from phd_megatron.checkpoint.match import check_contents
from phd_megatron.errors import UserError

PLACE = Path("some/iter_0000002")
EXTRA = ShardedObject("layer.norm._extra_state", None, (1,), (0,))


def tensor(name: str, size: int = 4) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(name, torch.zeros(size))


def stored(**sizes: int) -> dict[str, TensorStorageMetadata | BytesStorageMetadata]:
    names = {name.replace("__", "."): size for name, size in sizes.items()}
    return {name: TensorStorageMetadata(None, torch.Size([size]), []) for name, size in names.items()}  # type: ignore[arg-type]


STATE = {"a": tensor("a"), "copies": tensor("copies"), "extra": EXTRA}
#: what the checkpoint has -> what the refusal says of it
REFUSALS = [
    (stored(copies=4), r"of another architecture: it lacks a; build the model that its run_config\.yaml describes"),
    (stored(a=4, copies=4, b=4), r"of another architecture: this model has no b; "),
    (stored(a=5, copies=4), r"of another architecture: a has shape \(5,\) there and \(4,\) in this model"),
    ({"a": BytesStorageMetadata(), **stored(copies=4)}, "is damaged: a is an object in it, not a tensor"),
]


def test_what_may_be_lacking_stays_as_it_is() -> None:
    """Transformer Engine's extra states always, and what the caller names."""
    extra = EXTRA.unique_key
    assert check_contents(PLACE, STATE, stored(a=4, copies=4), False, frozenset()) == {extra}
    assert check_contents(PLACE, STATE, stored(a=4), False, frozenset({"copies"})) == {extra, "copies"}
    whole = {**stored(a=4, copies=4), extra: BytesStorageMetadata()}
    assert check_contents(PLACE, STATE, whole, False, frozenset({"copies"})) == frozenset()


@pytest.mark.parametrize(("there", "said"), REFUSALS, ids=["lacks", "more", "shape", "kind"])
def test_another_architecture_is_refused_by_name(there: dict[str, TensorStorageMetadata], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_contents(PLACE, STATE, there, False, frozenset())


def test_what_is_not_of_the_model_is_not_missed() -> None:
    more = {**stored(optimizer__a=9, a=4, copies=4), "rng_state/shard_0_1": BytesStorageMetadata()}
    check_contents(PLACE, STATE, {**more, "b._extra_state/shard_0_1": BytesStorageMetadata()}, False, frozenset())


def test_an_optimizer_that_is_wanted_must_be_there() -> None:
    check_contents(PLACE, STATE, stored(optimizer__a=4, a=4, copies=4), True, frozenset())
    with pytest.raises(UserError, match=r"holds no optimizer state; .*--finetune, or --no-load-optim"):
        check_contents(PLACE, STATE, stored(a=4, copies=4), True, frozenset())
