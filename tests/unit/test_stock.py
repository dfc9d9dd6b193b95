"""Checkpoints of others: names both ways, what they say of their model, and that nothing in them runs."""

from __future__ import annotations

import argparse
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from phd_megatron.checkpoint.reader import CheckpointReader
from phd_megatron.checkpoint.status import is_stock, own_config
from phd_megatron.checkpoint.stock import Stock, place_in_run, stock_checks
from phd_megatron.checkpoint.stock_names import Place, asked_there, in_our_names, in_their_names
from phd_megatron.config.architecture import architecture_of
from phd_megatron.config.schema import ModelConfig, RunConfig
from phd_megatron.config.stock_model import args_of, check_words, differences, words_of
from phd_megatron.errors import UserError

SIZES = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 48}


def entry(*size: int) -> TensorStorageMetadata:
    return TensorStorageMetadata(None, torch.Size(size), [])  # type: ignore[arg-type]


def architecture(**changes: Any) -> Any:
    return architecture_of(ModelConfig(**{**SIZES, **changes}))


# ---------------------------------------------------------------- names


def test_stacked_layers_are_parted() -> None:
    found, places = in_our_names(
        {
            "decoder.layers.self_attention.linear_qkv.layer_norm_weight": entry(2, 8),
            "decoder.layers.mlp.experts.experts.linear_fc1.weight": entry(2, 4, 6, 8),
            "decoder.final_layernorm.weight": entry(8),
            "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.layer_norm_weight": entry(2, 8),
            "decoder.layers.mlp.linear_fc1._extra_state/shard_0_2": BytesStorageMetadata(),
        }
    )
    assert {name: tuple(value.size) for name, value in found.items()} == {  # type: ignore[union-attr]
        "decoder.layers.0.input_layernorm.weight": (8,),
        "decoder.layers.1.input_layernorm.weight": (8,),
        "decoder.layers.0.mlp.experts.experts.linear_fc1.weight": (4, 6, 8),
        "decoder.layers.1.mlp.experts.experts.linear_fc1.weight": (4, 6, 8),
        "decoder.final_layernorm.weight": (8,),
        "optimizer.state.exp_avg.decoder.layers.0.pre_mlp_layernorm.weight": (8,),
        "optimizer.state.exp_avg.decoder.layers.1.pre_mlp_layernorm.weight": (8,),
    }
    theirs = "decoder.layers.self_attention.linear_qkv.layer_norm_weight"
    assert places["decoder.layers.1.input_layernorm.weight"] == Place(theirs, 1, 2)


def test_numbered_layers_and_parts_of_a_chain_keep_their_place() -> None:
    found, places = in_our_names(
        {
            "decoder.layers.10.self_attention.linear_qkv.layer_norm_bias": entry(8),
            "decoder.layers.10.pre_mlp_layernorm.weight": entry(8),
            "chained_1.optimizer.state.param.decoder.layers.10.mlp.router.weight": entry(4, 8),
        }
    )
    assert {name: place.key for name, place in places.items()} == {
        "decoder.layers.10.input_layernorm.bias": "decoder.layers.10.self_attention.linear_qkv.layer_norm_bias",
        "decoder.layers.10.pre_mlp_layernorm.weight": "decoder.layers.10.pre_mlp_layernorm.weight",
        "optimizer.state.param.decoder.layers.10.mlp.router.weight": (
            "chained_1.optimizer.state.param.decoder.layers.10.mlp.router.weight"
        ),
    }
    assert found.keys() == places.keys() and all(place.layer is None for place in places.values())


def test_a_shard_is_asked_for_where_it_lies() -> None:
    shard = ShardedTensor.from_rank_offsets("ours", torch.zeros(2, 3), (0, 1, 2))
    there = asked_there(shard, Place("theirs", 5, 7))
    assert (there.key, there.global_shape, there.global_offset) == ("theirs", (7, 4, 3), (5, 2, 0))
    assert (there.axis_fragmentations, there.prepend_axis_num) == ((7, 2, 1), 1)
    assert asked_there(shard, Place("theirs")).global_shape == (4, 3)


KEYS = [
    "embedding.word_embeddings.weight",
    *(
        f"decoder.layers.{layer}.{name}"
        for layer in range(2)
        for name in ("input_layernorm.weight", "mlp.router.weight", "pre_mlp_layernorm.weight")
    ),
    "decoder.layers.2.pre_mlp_layernorm.weight",
]


def test_our_layers_in_their_names() -> None:
    """The norm before experts under both names, of a dense layer under one."""
    numbered = in_their_names(KEYS, alike=False)
    assert numbered["decoder.layers.1.pre_mlp_layernorm.weight"] == ["decoder.layers.1.pre_mlp_layernorm.weight"]
    assert numbered["decoder.layers.1.mlp.linear_fc1.layer_norm_weight"] == KEYS[6:7]
    assert "decoder.layers.2.pre_mlp_layernorm.weight" not in numbered
    assert numbered["decoder.layers.2.mlp.linear_fc1.layer_norm_weight"] == KEYS[7:]
    together = in_their_names(KEYS[:7], alike=True)
    assert together == {
        "embedding.word_embeddings.weight": KEYS[:1],
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": [KEYS[1], KEYS[4]],
        "decoder.layers.mlp.router.weight": [KEYS[2], KEYS[5]],
        "decoder.layers.pre_mlp_layernorm.weight": [KEYS[3], KEYS[6]],
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": [KEYS[3], KEYS[6]],
    }


# ---------------------------------------------------------------- what they say of their model

MOE = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
MODELS = {
    "dense": architecture(),
    "qk": architecture(norm_scheme="pre_qk", add_qkv_bias=True, layernorm_epsilon=1e-6),
    "moe": architecture(transformer=MOE),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_model_is_the_one_that_it_says(model: Any) -> None:
    assert not list(differences(words_of(model), model))
    assert not list(differences(args_of(model), model))
    assert not list(differences({}, model))


#: what is said -> how the refusal names it
DIFFERENT: list[tuple[dict[str, Any], str]] = [
    ({"num_attention_heads": 8}, "num_attention_heads=8, not 4"),
    ({"num_query_groups": 1, "group_query_attention": False, "num_attention_heads": 4}, "num_query_groups=4, not 2"),
    ({"num_query_groups": None}, "num_query_groups=None, not 2"),
    ({"norm_epsilon": 1e-6}, "layernorm_epsilon=1e-06, not 1e-05"),
    ({"layernorm_epsilon": 1e-6}, "layernorm_epsilon=1e-06, not 1e-05"),
    ({"rotary_base": 500000}, "rotary_base=500000, not 10000.0"),
    ({"rotary_percent": 0.5}, "rotary_percent=0.5, not 1.0"),
    ({"kv_channels": 16}, "kv_channels=16, not 8"),
    ({"swiglu": False}, "gated_linear_unit=False, not True"),
    ({"untie_embeddings_and_output_weights": True}, "share_embeddings_and_output_weights=False, not True"),
    ({"share_embeddings_and_output_weights": False}, "share_embeddings_and_output_weights=False, not True"),
    ({"normalization": "LayerNorm"}, "normalization='LayerNorm', not 'RMSNorm'"),
    ({"qk_layernorm": True}, "qk_layernorm=True, not False"),
    ({"add_qkv_bias": True}, "add_qkv_bias=True, not False"),
    ({"num_experts": 8}, "num_moe_experts=8, not None"),
    ({"position_embedding_type": "learned_absolute"}, "position_embedding_type='learned_absolute', not 'rope'"),
    ({"apply_layernorm_1p": True}, "layernorm_zero_centered_gamma=True, not False"),
    ({"multi_latent_attention": True}, "multi_latent_attention=True, not False"),
    ({"use_rope_scaling": True}, "use_rope_scaling=True, not False"),
    ({"rotary_seq_len_interpolation_factor": 4}, "seq_len_interpolation_factor=4, not None"),
    ({"window_size": (128, 0)}, "window_size=(128, 0), not None"),
    ({"softmax_type": "learnable"}, "softmax_type='learnable', not 'vanilla'"),
    ({"squared_relu": True}, "squared_relu=True, not False"),
    ({"mtp_num_layers": 1}, "mtp_num_layers=1, not None"),
]


@pytest.mark.parametrize(("said", "named"), DIFFERENT, ids=[named for _, named in DIFFERENT])
def test_another_model_is_refused_by_name(said: dict[str, Any], named: str) -> None:
    assert named in list(differences({**said}, MODELS["dense"]))
    with pytest.raises(UserError, match="is of another model, by what it says of itself: "):
        check_words(said, MODELS["dense"], "DIR")


def test_defaults_that_follow_from_sizes() -> None:
    said = {"kv_channels": None, "ffn_hidden_size": None, "mtp_num_layers": 0, "rotary_base": 10000}
    assert not list(differences(said, architecture(ffn_hidden_size=128)))
    assert list(differences(said, MODELS["dense"])) == ["ffn_hidden_size=None, not 48"]
    biased = architecture(add_bias_linear=True)
    assert not list(differences({"add_bias_linear": True, "add_qkv_bias": False}, biased))


def test_experts() -> None:
    model = architecture(transformer={**MOE, "moe_layer_freq": [1, 0, 1, 0]})
    assert not list(differences({"moe_layer_freq": 2, "moe_router_topk_scaling_factor": None}, model))
    assert list(differences({"moe_layer_freq": 1, "moe_router_topk": 1}, model)) == [
        "moe_router_topk=1, not 2",
        "moe_layer_freq=1, not [1, 0, 1, 0]",
    ]
    assert not list(differences({"moe_router_topk": 1, "num_experts": None}, MODELS["dense"])), "a default of others"
    same = architecture(transformer={"num_moe_experts": 4})
    assert not list(differences({"moe_ffn_hidden_size": None}, same))


# ---------------------------------------------------------------- small files


class _Runs:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return _write, (self.path,)


def _write(path: Path) -> Path:
    path.write_text("it ran")
    return path


def checkpoint(path: Path, common: dict[str, Any]) -> Path:
    path.mkdir()
    dcp.save({"a": torch.zeros(1)}, storage_writer=dcp.FileSystemWriter(path), no_dist=True)
    torch.save(common, path / "common.pt")
    return path


def read(path: Path) -> Stock:
    return Stock.read(path, CheckpointReader(path))


def test_args_are_read_without_their_classes(tmp_path: Path) -> None:
    args = argparse.Namespace(num_layers=4, data_path=[Path("/x")], consumed_train_samples=80, global_batch_size=8)
    path = checkpoint(tmp_path / "iter_0000010", {"args": args, "iteration": 10, "other": {1: torch.ones(2)}})
    stock = read(path)
    assert stock.model["num_layers"] == 4
    assert place_in_run(stock) == {"iteration": 10, "consumed_samples": 80, "first_batch_size": 8}
    assert torch.equal(stock.common["other"][1], torch.ones(2))
    assert is_stock(path)


def test_nothing_in_a_foreign_file_runs(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    args = argparse.Namespace(num_layers=4, bad=_Runs(proof))
    path = checkpoint(tmp_path / "iter_0000010", {"args": args, "iteration": 10})
    assert read(path).model["num_layers"] == 4
    assert not proof.exists()
    torch.load(path / "common.pt", weights_only=False)  # the file of this test itself
    assert proof.exists(), "it would have run"


def test_a_foreign_file_that_asks_for_the_system_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "iter_0000010", {})
    torch.save({"args": os.system}, path / "common.pt")
    with pytest.raises(UserError, match=r"common.pt cannot be read \(\w+: .*; load another checkpoint"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"no archive", [1, 2]], ids=["empty", "text", "a list"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes | list[int]) -> None:
    path = checkpoint(tmp_path / "iter_0000010", {})
    if isinstance(content, bytes):
        (path / "common.pt").write_bytes(content)
    else:
        torch.save(content, path / "common.pt")
    with pytest.raises(UserError, match=r"common\.pt cannot be read"):
        read(path)


def test_what_a_checkpoint_does_not_say(tmp_path: Path) -> None:
    stock = read(checkpoint(tmp_path / "iter_0000010", {"iteration": 10}))
    with pytest.raises(UserError, match=r"training_state\.json is missing, and no consumed_samples .*--finetune"):
        place_in_run(stock)
    run = RunConfig(model=ModelConfig(**SIZES, vocab_size=50))
    notes = stock_checks(stock, {}, run)
    assert len(notes) == 3 and "does not say its number of heads" in notes[1] and "random-number state" in notes[2]
    run.checkpoint.finetune = True
    assert len(stock_checks(stock, {}, run)) == 2


def test_a_vocabulary_with_too_few_rows_is_refused(tmp_path: Path) -> None:
    stock = read(checkpoint(tmp_path / "iter_0000010", {}))
    run = RunConfig(model=ModelConfig(**SIZES, vocab_size=50))
    assert stock_checks(stock, {"embedding.word_embeddings.weight": entry(50, 32)}, run)
    with pytest.raises(UserError, match="has 49 rows of the vocabulary and this run 50 tokens"):
        stock_checks(stock, {"embedding.word_embeddings.weight": entry(49, 32)}, run)


BRIDGE = """\
_target_: megatron.bridge.training.config.ConfigContainer
model:
  _target_: megatron.bridge.models.llama.LlamaProvider
  num_layers: 4
train:
  global_batch_size: 16
"""


def test_bridges_files(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "iter_0000010", {})
    (path / "run_config.yaml").write_text(BRIDGE)
    torch.save({"step": torch.tensor(10), "consumed_train_samples": torch.tensor(160)}, path / "train_state.pt")
    assert own_config(path) is None and is_stock(path)
    stock = read(path)
    assert stock.model["num_layers"] == 4
    assert place_in_run(stock) == {"iteration": 10, "consumed_samples": 160, "first_batch_size": 16}
    (path / "run_config.yaml").write_text("model:\n  num_layers: 4\n")
    assert own_config(path) == path / "run_config.yaml" and not is_stock(path)


def test_the_common_state_among_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "iter_0000010"
    path.mkdir()
    content = io.BytesIO()
    torch.save([{"args": argparse.Namespace(num_layers=3), "iteration": 10}], content)
    state = {"common_state/shard_0_1": content, "a": torch.zeros(1)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(path), planner=_AsItIs(), no_dist=True)
    assert read(path).model == {"num_layers": 3}


class _AsItIs(dcp.DefaultSavePlanner):
    def transform_object(self, write_item: Any, object: Any) -> Any:
        return object
