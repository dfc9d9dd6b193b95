"""Every row of the alias table, through the command line."""

# ruff: noqa: UP045  (annotations written as Megatron-Core writes them)
from __future__ import annotations

import shlex
from typing import Any, Literal, Optional

import pytest

from phd_megatron.config.aliases import ALIASES, Accept, Choice, Refuse, Rename, Set, describe_alias
from phd_megatron.config.catalog import fields
from phd_megatron.config.flags import parse_flags
from phd_megatron.config.help import help_text
from phd_megatron.config.load import LoadedConfig, load_run_config
from phd_megatron.config.serialize import lookup
from phd_megatron.errors import UserError

TRANSFORMER_FIELDS: dict[str, Any] = {
    "num_moe_experts": Optional[int],
    "layernorm_zero_centered_gamma": bool,
    "fp8": Optional[Literal["e4m3", "hybrid"]],
    "fp8_param": bool,
    "fp4": Optional[Literal["e2m1"]],
    "num_layers_in_first_pipeline_stage": Optional[int],
    "num_layers_in_last_pipeline_stage": Optional[int],
    "recompute_granularity": Optional[Literal["full", "selective"]],
    "bias_activation_fusion": bool,
    "bias_dropout_fusion": bool,
    "qk_layernorm": bool,
}
WORDS = {"layernorm_epsilon": "1e-6", "fp8": "hybrid", "fp4": "e2m1", "tokenizer": "tok"}
MEGATRON_FLAGS = shlex.split("""
--tensor-model-parallel-size --pipeline-model-parallel-size --num-layers-per-virtual-pipeline-stage
--num-virtual-stages-per-pipeline-rank --context-parallel-size --expert-model-parallel-size
--expert-tensor-parallel-size --sequence-parallel --use-distributed-optimizer --overlap-grad-reduce
--overlap-param-gather --num-layers --hidden-size --ffn-hidden-size --num-attention-heads --group-query-attention
--num-query-groups --kv-channels --seq-length --max-position-embeddings --position-embedding-type --rotary-base --swiglu
--normalization --norm-epsilon --qk-layernorm --disable-bias-linear --untie-embeddings-and-output-weights
--init-method-std --num-experts --micro-batch-size --global-batch-size --train-iters --train-samples --lr --min-lr
--lr-decay-style --lr-warmup-iters --weight-decay --clip-grad --bf16 --fp8-format --exit-duration-in-mins
--exit-signal-handler --data-path --split --data-cache-path --tokenizer-type --tokenizer-model --mock-data --save --load
--save-interval --ckpt-format --async-save --no-load-optim --no-load-rng --finetune --use-checkpoint-args --log-interval
--eval-interval --eval-iters --tensorboard-dir --wandb-project --log-throughput
""")
"""What Megatron users type, beside the fields of ``TransformerConfig`` (those are tested against Megatron-Core)."""


def load(*argv: str, saved: Any = None) -> LoadedConfig:
    return load_run_config(list(argv), transformer_fields=TRANSFORMER_FIELDS, saved=saved)


def rows(kind: type) -> list[Any]:
    return [pytest.param(name, alias, id=name) for name, alias in ALIASES.items() if isinstance(alias, kind)]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@pytest.mark.parametrize(("name", "alias"), rows(Rename))
def test_renamed(name: str, alias: Rename) -> None:
    words = [] if "bool" in str(TRANSFORMER_FIELDS.get(alias.field)) else [WORDS.get(alias.field, "2")]
    loaded = load(flag(name), *words)
    own = load(flag(alias.field), *words)
    assert lookup(loaded.config, alias.field) == lookup(own.config, alias.field)
    assert lookup(loaded.config, alias.field) not in (
        None,
        fields()[alias.field].default if alias.field in fields() else 0,
    )
    assert loaded.origins[alias.field] == f"flag {flag(name)}"


@pytest.mark.parametrize(("name", "alias"), rows(Set))
def test_set(name: str, alias: Set) -> None:
    assert lookup(load(flag(name)).config, alias.field) == alias.value
    with pytest.raises(UserError, match="takes no value"):
        load(f"{flag(name)}=1")


@pytest.mark.parametrize(("name", "alias"), rows(Accept))
def test_accepted(name: str, alias: Accept) -> None:
    needed = [flag(alias.needs), "2"] if alias.needs else []
    loaded = load(flag(name), *needed)
    assert any(flag(name) in note and alias.note in note for note in loaded.notes)
    if alias.needs:
        with pytest.raises(UserError, match=flag(alias.needs)):
            load(flag(name))


@pytest.mark.parametrize(("name", "alias"), rows(Choice))
def test_choice(name: str, alias: Choice) -> None:
    for word in alias.values:
        load(flag(name), word)
    with pytest.raises(UserError) as caught:
        load(flag(name), "other")
    for part in (flag(name), "other", alias.reason, alias.cure):
        assert part in str(caught.value)
    assert alias.reason and alias.cure


@pytest.mark.parametrize(("name", "alias"), rows(Refuse))
def test_refused(name: str, alias: Refuse) -> None:
    for argv in ([flag(name)], [flag(name), "value"], [f"{flag(name)}=value"]):
        with pytest.raises(UserError) as caught:
            load(*argv)
        for part in (flag(name), alias.reason, alias.cure):
            assert part in str(caught.value)


def test_rows_are_well_formed() -> None:
    for name, alias in ALIASES.items():
        assert name not in fields(), f"{name} is a field already"
        assert "-" not in name
        if isinstance(alias, Rename | Set):
            assert alias.field in fields() or alias.field in TRANSFORMER_FIELDS
        assert describe_alias(alias)
        assert f"\n  {flag(name)}: " in help_text(TRANSFORMER_FIELDS)


@pytest.mark.parametrize("spelled", MEGATRON_FLAGS)
def test_every_flag_megatron_users_type_is_known(spelled: str) -> None:
    name = spelled[2:].replace("-", "_")
    assert name in fields() or name in ALIASES


def test_qk_layernorm() -> None:
    assert load("--qk-layernorm").config.model.norm_scheme == "pre_qk"
    saved = {"model": {"norm_scheme": "hybrid_star"}}
    with pytest.raises(UserError, match=r"norm_scheme='hybrid_star' is configured"):
        load("--load", "x", "--qk-layernorm", saved=saved)
    with pytest.raises(UserError, match="contradict"):
        load("--qk-layernorm", "--norm-scheme", "hybrid")
    assert load("--qk-layernorm", "--norm-scheme", "pre_qk").config.model.norm_scheme == "pre_qk"


def test_two_spellings_that_disagree() -> None:
    with pytest.raises(UserError, match=r"--swiglu.*--no-gated-linear-unit.*contradict"):
        load("--swiglu", "--no-gated-linear-unit")
    with pytest.raises(UserError, match="contradict"):
        load("--tokenizer", "byte", "--tokenizer-model", "dir")


def test_alias_whose_field_this_megatron_lacks() -> None:
    with pytest.raises(UserError, match=r"TransformerConfig\.fp8.*does not have"):
        load_run_config(["--fp8-format", "hybrid"], transformer_fields={})


def test_a_megatron_command_line() -> None:
    argv = shlex.split("""
        --use-mcore-models --num-layers 16 --hidden-size 2048 --num-attention-heads 32
        --group-query-attention
        --num-query-groups 8 --seq-length 4096 --max-position-embeddings 4096 --position-embedding-type rope
        --rotary-base 500000 --swiglu --normalization RMSNorm --norm-epsilon 1e-6 --disable-bias-linear
        --untie-embeddings-and-output-weights --micro-batch-size 2 --global-batch-size 1024 --train-samples 1000
        --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --bf16 --exit-signal-handler --ckpt-format torch_dist
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model /tok --data-path 0.7 A 0.3 B --split 949,50,1
        --tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer --overlap-grad-reduce
        --use-checkpoint-args --log-throughput""")
    config = load(*argv).config
    assert (config.model.num_query_groups, config.model.layernorm_epsilon) == (8, 1e-6)
    assert config.model.untie_embeddings_and_output_weights is True
    assert config.data.data_path == ["0.7", "A", "0.3", "B"]
    assert config.data.tokenizer == "/tok"
    assert config.parallel.sequence_parallel is True


@pytest.mark.parametrize(
    ("flag", "word"),
    [
        ("--rl-profile", "reinforcement learning"),
        ("--bert-load", "another kind of model"),
        ("--muon-momentum", "AdamW"),
        ("--use-precision-aware-optimizer", "AdamW"),
        ("--ddp-num-buckets", "ddp_bucket_size"),
        ("--tp-comm-overlap-cfg", "Transformer Engine"),
        ("--num-distributed-optimizer-instances", "use_distributed_optimizer"),
        ("--yarn-beta-fast", "rotary-base"),
        ("--inprocess-restart", "MAX_RESTARTS"),
        ("--dataloader-fast-cache-load", "prepare"),
        ("--head-lr-mult", "decoupled_lr"),
        ("--warmup", "lr_warmup_fraction"),
    ],
)
def test_megatrons_flags_that_have_no_place_here_are_refused_by_name(flag: str, word: str) -> None:
    with pytest.raises(UserError, match="is a flag of Megatron-LM that has no place here") as said:
        parse_flags([flag, "1"], {})
    assert flag in str(said.value) and word in str(said.value)


@pytest.mark.parametrize(
    ("typo", "meant"), [("--trian-data-path", "train-data-path"), ("--ddp-buckt-size", "ddp-bucket-size")]
)
def test_a_slip_in_a_flag_of_ours_is_no_flag_of_megatrons(typo: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"did you mean --{meant}"):
        parse_flags([typo, "1"], {})


def test_no_flag_that_is_taken_is_refused_by_a_pattern_first() -> None:
    for name in ("ddp_bucket_size", "train_data_path", "ckpt_format", "dataloader_type"):
        value = {"ckpt_format": "torch_dist", "dataloader_type": "single"}.get(name, "5")
        parsed = parse_flags([f"--{name.replace('_', '-')}", value], {})
        taken = {"ddp_bucket_size": {"ddp_bucket_size": 5}, "train_data_path": {"train_data_path": ["5"]}}.get(name, {})
        assert parsed.values == taken  # the others ask for what is done anyway


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["--loss-scale", "1024", "--fp16"], {"loss_scale": 1024.0, "fp16": True}),
        (["--initial-loss-scale", "65536", "--hysteresis", "3"], {"initial_loss_scale": 65536.0, "hysteresis": 3}),
        (
            ["--start-weight-decay", "0", "--end-weight-decay", "0.1"],
            {"start_weight_decay": 0.0, "end_weight_decay": 0.1},
        ),
        (["--lr-warmup-init", "1e-5", "--decoupled-lr", "1e-4"], {"lr_warmup_init": 1e-5, "decoupled_lr": 1e-4}),
        (["--grad-reduce-in-bf16"], {"accumulate_allreduce_grads_in_fp32": False}),
        (["--use-checkpoint-opt_param-scheduler"], {"use_checkpoint_opt_param_scheduler": True}),
    ],
)
def test_flags_of_megatron_that_are_fields(words: list[str], values: dict[str, object]) -> None:
    assert parse_flags(words, {}).values == values
