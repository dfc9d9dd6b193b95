"""Checkpoints of others: names both ways, what they say of their model, and that nothing in them runs."""

from __future__ import annotations

import argparse
import collections
import io
import os
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from phd_megatron.checkpoint.reader import CheckpointReader
from phd_megatron.checkpoint.status import is_stock, own_config
from phd_megatron.checkpoint.stock import Stock, _groups_for, place_in_run, stock_checks
from phd_megatron.checkpoint.stock_names import Place, asked_there, in_our_names, in_their_names
from phd_megatron.checkpoint.store import prune
from phd_megatron.config.architecture import architecture_of
from phd_megatron.config.schema import ModelConfig, RunConfig
from phd_megatron.config.stock_model import args_of, check_words, differences, not_stock, words_of
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
    ({"untie_embeddings_and_output_weights": True}, "untie_embeddings_and_output_weights=True, not False"),
    ({"share_embeddings_and_output_weights": False}, "untie_embeddings_and_output_weights=True, not False"),
    ({"activation_func": {"_target_": "torch._C._nn.gelu", "_call_": False}}, "activation_func="),
    ({"activation_func": "megatron.core.activations.squared_relu"}, "activation_func="),
    ({"no_rope_freq": [0, 1, 0, 0]}, "no_rope_freq=[0, 1, 0, 0], not None"),
    ({"softmax_scale": 0.5}, "softmax_scale=0.5, not None"),
    ({"layernorm_epsilon": "1e-06"}, "layernorm_epsilon='1e-06', not 1e-05"),
    ({"layernorm_epsilon": "small"}, "layernorm_epsilon='small', not 1e-05"),
    ({"num_layers": torch.tensor([1, 2])}, "num_layers=tensor([1, 2]), not 4"),
    ({"num_layers": True}, "num_layers=True, not 4"),
    ({"no_rope_freq": torch.tensor([1, 2])}, "no_rope_freq=tensor([1, 2]), not None"),
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
    (found,) = differences(said, MODELS["dense"])
    assert found.startswith(named)
    with pytest.raises(UserError, match="is of another model, by what it says of itself: "):
        check_words(said, MODELS["dense"], "DIR")


def test_defaults_that_follow_from_sizes() -> None:
    said = {"kv_channels": None, "ffn_hidden_size": None, "mtp_num_layers": 0, "rotary_base": 10000}
    assert not list(differences(said, architecture(ffn_hidden_size=128)))
    assert list(differences(said, MODELS["dense"])) == ["ffn_hidden_size=None, not 48"]
    biased = architecture(add_bias_linear=True)
    assert not list(differences({"add_bias_linear": True, "add_qkv_bias": False}, biased))


YARN = {
    **{"position_embedding_type": "yarn", "yarn_rotary_scaling_factor": 4.0},
    "yarn_original_max_position_embeddings": 4096,
}


def test_scaled_rope_is_the_same_one() -> None:
    llama = architecture(use_rope_scaling=True, rope_scaling_factor=32.0)
    yarn = architecture(**YARN, yarn_mscale=0.5)
    for model in (llama, yarn):
        assert not list(differences(words_of(model), model)) and not list(differences(args_of(model), model))
    for name in ("use_rope_scaling", "rope_scaling"):
        assert list(differences({name: True, "rope_scaling_factor": 8.0}, llama)) == [
            "rope_scaling_factor=8.0, not 32.0"
        ]
        assert list(differences({name: False}, llama)) == [f"{name}=False, not True"]
        assert list(differences({name: True}, yarn)) == [f"{name}=True, not False"]
    assert not list(differences({"use_rope_scaling": False, "rope_scaling_factor": 32.0}, MODELS["dense"]))
    assert list(differences({**YARN, "yarn_beta_fast": 16, "yarn_mscale": None}, yarn)) == [
        "yarn_beta_fast=16, not 32.0",
        "yarn_mscale=None, not 0.5",
    ]
    assert list(differences({"position_embedding_type": "yarn"}, llama)) == [
        "position_embedding_type='yarn', not 'rope'"
    ]


def test_without_one_of_its_mscales_yarn_has_1_and_0() -> None:
    """As in Megatron-Core, whatever the other says."""
    assert not list(differences({"yarn_mscale": None, "yarn_mscale_all_dim": None}, architecture(**YARN)))
    said = {"yarn_mscale": 0.5, "yarn_mscale_all_dim": None}
    assert list(differences(said, architecture(**YARN, yarn_mscale=0.5))) == ["yarn_mscale_all_dim=None, not 0.0"]


def test_yarn_over_a_part_of_each_head_is_not_stock() -> None:
    assert not_stock(architecture(**YARN)) is None
    assert "rotary_percent=0.5 with YaRN" in not_stock(architecture(**YARN, rotary_percent=0.5))


def test_other_words_for_nothing() -> None:
    """As configurations of ordinary models have them."""
    said: dict[str, Any] = {"no_rope_freq": [0, 0, 0, 0], "window_size": (-1, -1), "softmax_scale": 8**-0.5}
    said |= {"rotary_interleaved": None, "qk_layernorm": None, "layernorm_epsilon": "1e-05", "rope_scaling": None}
    said |= {"activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False}}
    assert not list(differences(said, MODELS["dense"]))
    gelu = architecture(gated_linear_unit=False)
    assert not list(differences({"activation_func": {"_target_": "torch._C._nn.gelu"}}, gelu))
    assert list(differences({"activation_func": {"_target_": "torch.nn.functional.silu"}}, gelu))
    without_shared = {"moe_shared_expert_intermediate_size": 0, "moe_layer_freq": "([1]*3+[1])"}
    assert not list(differences(without_shared, MODELS["moe"]))
    for odd in (0, -1, "[1]*x", "[2]*4", [1, 1]):
        assert list(differences({"moe_layer_freq": odd}, MODELS["moe"])), odd


#: norm scheme and the like -> how it is named
NOT_STOCK = {
    "post_pre": "norm_scheme=post_pre",  # with the names of pre
    "pre_qk_post": "norm_scheme=pre_qk_post",
    "olmoe": "norm_scheme=olmoe",
    "embed_norm": "norm_scheme=embed_norm",
    "hybrid_star": "norm_scheme=hybrid_star",
}


@pytest.mark.parametrize("scheme", NOT_STOCK)
def test_another_scheme_is_refused_whatever_its_names(tmp_path: Path, scheme: str) -> None:
    assert not_stock(architecture(norm_scheme=scheme)).startswith(NOT_STOCK[scheme])
    stock = read(checkpoint(tmp_path / "iter_0000010", {}))
    run = RunConfig(model=ModelConfig(**SIZES, vocab_size=50, norm_scheme=scheme))
    for run.checkpoint.finetune in (False, True):
        with pytest.raises(
            UserError, match=f"this run has norm_scheme={scheme}: that model is the one of pre or pre_qk"
        ):
            stock_checks(stock, {}, run)


def test_copies_come_with_a_finetune_alone(tmp_path: Path) -> None:
    stock = read(checkpoint(tmp_path / "iter_0000010", {}))
    run = RunConfig(model=ModelConfig(**SIZES, vocab_size=50, phd_repeat=2))
    with pytest.raises(UserError, match=r"phd_repeat=2: that model knows no copies .* --finetune"):
        stock_checks(stock, {}, run)
    run.checkpoint.finetune = True
    assert stock_checks(stock, {}, run)


def test_experts() -> None:
    model = architecture(transformer={**MOE, "moe_layer_freq": [1, 0, 1, 0]})
    assert not list(differences({"moe_layer_freq": 2, "moe_router_topk_scaling_factor": None}, model))
    assert list(differences({"moe_layer_freq": 1, "moe_router_topk": 1}, model)) == [
        "moe_router_topk=1, not 2",
        "moe_layer_freq=1, not [1, 0, 1, 0]",
    ]
    assert not list(differences({"moe_layer_freq": "([1,0]*2)"}, model))
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
    asked_for = torch.serialization.get_unsafe_globals_in_checkpoint(path / "common.pt")
    assert any(name.endswith("._write") for name in asked_for), "it would run"
    assert read(path).model["num_layers"] == 4
    assert not proof.exists()


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


@pytest.mark.parametrize("args", [5, "x", [1]], ids=["number", "text", "list"])
def test_args_that_are_no_names(tmp_path: Path, args: Any) -> None:
    with pytest.raises(UserError, match=r"is damaged: its args are .*, no names; load another checkpoint"):
        read(checkpoint(tmp_path / "iter_0000010", {"args": args}))


def test_args_may_be_a_mapping_and_hold_anything(tmp_path: Path) -> None:
    odd = {"a": numpy.float64(1), "b": numpy.arange(3), "c": collections.defaultdict(list, {1: [2]}), "d": {1, 2}}
    stock = read(checkpoint(tmp_path / "iter_0000010", {"args": {"num_layers": 4, **odd}}))
    assert stock.model["num_layers"] == 4 and stock.model["c"] == {1: [2]}


@pytest.mark.parametrize("value", [torch.tensor([1, 2]), 10**30, -1, 1.5, True, "10"], ids=str)
def test_counts_that_are_none(tmp_path: Path, value: Any) -> None:
    args = argparse.Namespace(consumed_train_samples=80)
    stock = read(checkpoint(tmp_path / "iter_0000010", {"args": args, "iteration": value}))
    assert stock.training_state == {"consumed_samples": 80}


GROUP = {"lr": 0.1, "step": 3, "params": [0]}


def test_groups_of_an_optimizer_at_any_depth() -> None:
    def groups(saved: Any, *parts: int) -> Any:
        stock = Stock(Path("DIR"), {"optimizer": saved}, {}, {})
        return _groups_for({part: {} for part in parts}, stock)  # type: ignore[arg-type]

    bare = {"lr": 0.1, "step": 3}
    alone = {"optimizer": {"param_groups": [bare]}}
    assert groups({"optimizer": {"param_groups": [GROUP]}}) == alone
    assert groups({"param_groups": [{"lr": 0.1}], "state": {"common_step": 3}}) == alone
    two = {"optimizer": {"param_groups": [bare, bare]}}
    assert groups({0: {"optimizer": {"param_groups": [GROUP]}}, 1: {"param_groups": [GROUP]}}, 0, 1) == {0: two, 1: two}
    for saved in ({}, {"param_groups": []}, None, 5):
        with pytest.raises(UserError, match="without the groups of their parameters"):
            groups(saved)
    endless: dict[str, Any] = {}
    endless["optimizer"] = endless
    with pytest.raises(UserError, match="without the groups of their parameters"):
        groups(endless)
    for saved in ({"param_groups": [{"lr": 0.1}]}, {"param_groups": [5]}, {"param_groups": [GROUP, {"step": "3"}]}):
        with pytest.raises(UserError, match=r"does not say how many steps its optimizer did; .*--no-load-optim"):
            groups(saved)


@pytest.mark.parametrize("size", [(), (10**9, 3)], ids=["none", "too many"])
def test_shapes_that_no_layers_have(size: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"metadata is damaged: decoder\.layers\.a has the shape .*; load another"):
        in_our_names({"decoder.layers.a": entry(*size)})


def test_what_a_checkpoint_does_not_say(tmp_path: Path) -> None:
    stock = read(checkpoint(tmp_path / "iter_0000010", {"iteration": 10}))
    with pytest.raises(UserError, match=r"training_state\.json is missing, and no consumed_samples .*--finetune"):
        place_in_run(stock)
    run = RunConfig(model=ModelConfig(**SIZES, vocab_size=50))
    notes = stock_checks(stock, {}, run)
    assert len(notes) == 3 and "does not say its number of heads" in notes[1] and "random-number state" in notes[2]
    run.checkpoint.finetune = True
    assert len(stock_checks(stock, {}, run)) == 2


#: (rows there, tokens that it says, tokens of the run) -> a note, nothing or a refusal
VOCABULARIES = [
    ((64, None, 50), ""),
    ((64, 50, 50), ""),
    ((64, 50, 64), ""),
    ((128, None, 50), "note: it has 128 rows of the vocabulary, of which this run keeps 64"),
    ((49, None, 50), "has 49 rows of the vocabulary and this run 50 tokens; use the tokenizer"),
    ((64, 60, 50), "is of 60 tokens and this run of 50; use the tokenizer"),
]


@pytest.mark.parametrize(("sizes", "said"), VOCABULARIES)
def test_vocabularies(tmp_path: Path, sizes: tuple[int, int | None, int], said: str) -> None:
    rows, theirs, ours = sizes
    stock = read(checkpoint(tmp_path / "iter_0000010", {"args": {"vocab_size": theirs}}))
    run = RunConfig(model=ModelConfig(**SIZES, vocab_size=ours, make_vocab_size_divisible_by=64))
    table = {"embedding.word_embeddings.weight": entry(rows, 32)}
    if said.startswith(("has", "is")):
        with pytest.raises(UserError, match=said):
            stock_checks(stock, table, run)
    else:
        notes = [note for note in stock_checks(stock, table, run) if "rows" in note]
        assert notes == ([said] if said else [])


BRIDGE = """\
_target_: megatron.bridge.training.config.ConfigContainer
model:
  _target_: megatron.bridge.models.llama.LlamaProvider
  num_layers: 4
train:
  global_batch_size: 16
"""


def test_the_checkpoint_that_a_run_began_with_is_not_deleted(tmp_path: Path) -> None:
    for iteration in (1, 2, 3):
        path = tmp_path / f"iter_000000{iteration}"
        path.mkdir()
        (path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
        if iteration > 1:
            (path / "run_config.yaml").write_text("model: {}")
    assert prune(tmp_path, 1, current=3) == [tmp_path / "iter_0000002"]
    assert (tmp_path / "iter_0000001").is_dir()


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
