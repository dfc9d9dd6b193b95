"""Megatron's spellings, through the command line: what arrives is written here by hand, and not read from the table."""

# ruff: noqa: UP045  (annotations written as Megatron-Core writes them)
from __future__ import annotations

import shlex
from typing import Any, Literal, Optional, get_args

import pytest

from phd_megatron.config.aliases import ALIASES
from phd_megatron.config.catalog import fields
from phd_megatron.config.flags import parse_flags
from phd_megatron.config.help import help_text
from phd_megatron.config.load import LoadedConfig, load_run_config
from phd_megatron.config.schema import ModelConfig
from phd_megatron.config.serialize import assign, lookup
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


ARRIVES: list[tuple[str, dict[str, Any]]] = [
    # what is typed, as Megatron-LM takes it, and what then stands in the configuration
    ("--swiglu", {"gated_linear_unit": True}),
    ("--norm-epsilon 1e-6", {"layernorm_epsilon": 1e-6}),
    ("--disable-bias-linear", {"add_bias_linear": False}),
    ("--qk-layernorm", {"norm_scheme": "pre_qk"}),
    ("--apply-layernorm-1p", {"layernorm_zero_centered_gamma": True}),
    ("--num-experts 8", {"num_moe_experts": 8}),
    ("--fp8-format hybrid", {"fp8": "hybrid"}),
    ("--fp4-format e2m1", {"fp4": "e2m1"}),
    ("--fp8-param-gather", {"fp8_param": True}),
    ("--num-virtual-stages-per-pipeline-rank 3", {"virtual_pipeline_model_parallel_size": 3}),
    ("--no-overlap-p2p-communication", {"overlap_p2p_comm": False}),
    ("--decoder-first-pipeline-num-layers 3", {"num_layers_in_first_pipeline_stage": 3}),
    ("--decoder-last-pipeline-num-layers 5", {"num_layers_in_last_pipeline_stage": 5}),
    ("--grad-reduce-in-bf16", {"accumulate_allreduce_grads_in_fp32": False}),
    ("--recompute-activations", {"recompute_granularity": "selective"}),
    ("--no-bias-swiglu-fusion", {"bias_activation_fusion": False}),
    ("--no-bias-gelu-fusion", {"bias_activation_fusion": False}),
    ("--no-bias-dropout-fusion", {"bias_dropout_fusion": False}),
    ("--tokenizer-model /tok", {"tokenizer": "/tok"}),
    ("--muon-use-nesterov", {"muon_nesterov": True}),
    ("--muon-no-split-qkv", {"muon_split_qkv": False}),
    ("--tokenizer-type HuggingFaceTokenizer", {}),
    ("--dataloader-type single", {}),
    ("--ckpt-format torch_dist", {}),
    ("--group-query-attention --num-query-groups 4", {"num_query_groups": 4}),
    *(
        (each, {})
        for each in shlex.split("""
            --use-rotary-position-embeddings --no-position-embedding --use-mcore-models --use-flash-attn
            --exit-signal-handler --calculate-per-token-loss --override-opt_param-scheduler --no-masked-softmax-fusion
            --no-rope-fusion --no-persist-layer-norm --no-create-attention-mask-in-dataloader --use-checkpoint-args
            --use-dist-ckpt --dist-ckpt-optim-fully-reshardable --use-pytorch-profiler --log-throughput
        """)
    ),
]
OTHER_WORDS = {
    # one value is taken, every other one is refused with these words
    "--distributed-backend": ["nccl", "follows the device", "--device cpu|cuda"],
    "--tokenizer-type": ["GPT2BPETokenizer", "`byte` or a directory", "--tokenizer-model DIRECTORY"],
    "--dataloader-type": ["cyclic", "once in a fixed order", "use single"],
    "--ckpt-format": ["zarr", "torch_dist directories", "use torch_dist"],
}
REFUSED = {
    "--squared-relu": ["SwiGLU or GELU", "--no-gated-linear-unit"],
    "--quick-geglu": ["SwiGLU or GELU", "--no-gated-linear-unit"],
    "--moe-use-upcycling": ["does not change the model", "import --upcycle-experts"],
    "--spec": ["--norm-scheme and the --phd-* fields", "leave it out"],
    "--use-megatron-fsdp": ["FSDP is not available", "--use-distributed-optimizer"],
    "--use-torch-fsdp2": ["FSDP is not available", "--use-distributed-optimizer"],
    "--use-tp-pp-dp-mapping": ["tp-cp-ep-dp-pp", "leave it out"],
    "--init-method-xavier-uniform": ["truncated normal", "--init-method-std"],
    "--manual-gc": ["garbage collection", "leave it out"],
    "--vocab-file": ["read from a directory", "--tokenizer DIRECTORY"],
    "--merge-file": ["read from a directory", "--tokenizer DIRECTORY"],
    "--mock-data": ["no made-up data", "phd-megatron prepare"],
    "--no-mmap-bin-files": ["memory-mapped", "leave it out"],
    "--no-save-optim": ["always holds everything", "--no-load-optim"],
    "--no-save-rng": ["always holds everything", "--no-load-rng"],
    "--pretrained-checkpoint": ["one --load", "--load DIR --finetune"],
    "--ckpt-step": ["newest checkpoint of a directory", "--load DIR/iter_0000100"],
    "--non-persistent-save-interval": ["one kind of checkpoint", "--keep-last"],
    "--save-retain-interval": ["kept by count", "--keep-last N"],
    "--log-params-norm": ["norm is not logged", "leave it out"],
    "--log-num-zeros-in-grad": ["not counted", "leave it out"],
    "--timing-log-level": ["no timer levels", "leave it out"],
}
SWITCHES = shlex.split("""
gated_linear_unit use_rope_scaling yarn_correction_range_round_to_int
add_bias_linear add_qkv_bias untie_embeddings_and_output_weights phd_last_layer_pruning
account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split overlap_p2p_comm
overlap_p2p_comm_warmup_flush sequence_parallel use_distributed_optimizer overlap_grad_reduce overlap_param_gather
reset_position_ids reset_attention_mask eod_mask_loss allow_changed_data bf16 fp16 accumulate_allreduce_grads_in_fp32
decay_norms decay_embeddings muon_nesterov muon_split_qkv async_save verify_checkpoint exit_on_missing_checkpoint rewind
finetune no_load_optim
no_load_rng use_checkpoint_opt_param_scheduler profile deepspeed
""")
"""Fields of ours that are true or false."""


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def test_every_row_has_its_expectation() -> None:
    typed = {word for words, _ in ARRIVES for word in words.split() if word.startswith("--")} - {"--num-query-groups"}
    assert {flag(name) for name in ALIASES} == {each.replace("_", "-") for each in typed} | OTHER_WORDS.keys() | {
        *REFUSED
    }
    # A flag with one value that is taken stands in both; any other one in one place only.
    assert {*REFUSED}.isdisjoint(typed) and OTHER_WORDS.keys() - typed == {"--distributed-backend"}


@pytest.mark.parametrize(("words", "values"), ARRIVES, ids=lambda each: each if isinstance(each, str) else "")
def test_what_arrives(words: str, values: dict[str, Any]) -> None:
    """That value in that field, and every other field as without the flag."""
    argv = words.split()
    loaded, plain = load(*argv), load()
    for name, value in values.items():
        found = lookup(loaded.config, name)
        assert found == value and type(found) is type(value), name
        spelled = argv[0] if name != "num_query_groups" else "--num-query-groups"
        assert loaded.origins[name] == f"flag {spelled}"
        plain.config.model.transformer.pop(name, None)
        assign(plain.config, name, value)
    assert loaded.config == plain.config
    if len(argv) == 1 or argv[1].startswith("--"):
        with pytest.raises(UserError, match=r"takes no value|is not true or false"):
            load(f"{argv[0]}=1", *argv[1:])
        if not values or "--num-query-groups" in words:
            assert any(note.startswith(f"{argv[0]}: ") for note in loaded.notes)
    else:
        with pytest.raises(UserError, match=f"{argv[0]} has no value"):
            load(argv[0])


def test_grouped_queries_need_their_number() -> None:
    with pytest.raises(UserError, match="--num-query-groups"):
        load("--group-query-attention")


@pytest.mark.parametrize("name", OTHER_WORDS)
def test_other_choices_are_refused(name: str) -> None:
    word, *parts = OTHER_WORDS[name]
    with pytest.raises(UserError) as caught:
        load(name, word)
    for part in (f"{name} {word}: ", *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    for argv in ([name], [name, "value"], [f"{name}=value"]):
        with pytest.raises(UserError) as caught:
            load(*argv)
        for part in (f"{name}: ", *REFUSED[name]):
            assert part in str(caught.value)


def test_switches_and_their_negations() -> None:
    """``--x`` and ``--no-x`` of every field that is true or false, also with the word after or behind ``=``."""
    assert {name for name, info in fields().items() if bool in (info.annotation, *get_args(info.annotation))} == {
        *SWITCHES
    }
    for name in SWITCHES:
        needed = ["--load", "x"]
        for words, value in (
            ([flag(name)], True),
            (["--no-" + flag(name)[2:]], False),
            ([flag(name), "true"], True),
            ([flag(name), "false"], False),
            ([f"{flag(name)}=False"], False),
            (["--no_" + name], False),
        ):
            assert lookup(load(*needed, *words).config, name) is value, words
    assert load("--no-bias-dropout-fusion").config.model.transformer == {"bias_dropout_fusion": False}
    with pytest.raises(UserError, match="unknown flag --no-lr"):
        load("--no-lr")


def test_help_names_every_row() -> None:
    text = help_text(TRANSFORMER_FIELDS)
    assert text.index("--phd-repeat") < text.index("\n\nMegatron-LM's other flags:\n") < text.index("--norm-epsilon")
    for row in (
        "--norm-epsilon: same as --layernorm-epsilon",
        "--disable-bias-linear: sets add_bias_linear to false",
        "--recompute-activations: sets recompute_granularity to selective",
        "--use-flash-attn: accepted: ",
        "--muon-no-split-qkv: sets muon_split_qkv to false",
        "--distributed-backend: refused: ",
        "--ckpt-step: refused: ",
    ):
        assert f"\n  {row}" in text
    for name in ALIASES:
        assert f"\n  {flag(name)}: " in text
        assert "-" not in name and name not in fields(), f"{name} is a field already"


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


ROPE: list[tuple[str, dict[str, Any]]] = [
    ("--use-rope-scaling --rope-scaling-factor 32", {"use_rope_scaling": True, "rope_scaling_factor": 32.0}),
    ("--position-embedding-type rope --rope-scaling-factor 8", {}),  # Megatron-LM's default
    (
        "--position-embedding-type yarn --yarn-rotary-scaling-factor 4 --yarn-original-max-position-embeddings 4096 "
        "--yarn-mscale 0.7 --no-yarn-correction-range-round-to-int",
        {
            **{"position_embedding_type": "yarn", "yarn_rotary_scaling_factor": 4.0, "yarn_mscale": 0.7},
            **{"yarn_original_max_position_embeddings": 4096, "yarn_correction_range_round_to_int": False},
        },
    ),
]


@pytest.mark.parametrize(("typed", "expected"), ROPE)
def test_flags_of_a_longer_context(typed: str, expected: dict[str, Any]) -> None:
    model = load(*shlex.split(typed)).config.model
    changed = {name: value for name, value in vars(model).items() if value != getattr(ModelConfig(), name)}
    assert changed == expected


@pytest.mark.parametrize("kind", ["learned_absolute", "mrope", "none", "relative"])
def test_positions_of_another_kind_are_refused(kind: str) -> None:
    with pytest.raises(UserError, match=rf"position_embedding_type='{kind}'.*rope, yarn"):
        load("--position-embedding-type", kind)


@pytest.mark.parametrize(
    ("flag", "word"),
    [
        ("--rl-profile", "reinforcement learning"),
        ("--bert-load", "another kind of model"),
        ("--muon-scalar-optimizer", "AdamW"),
        ("--lion-beta1", "adam and muon"),
        ("--use-precision-aware-optimizer", "adam and muon"),
        ("--ddp-num-buckets", "ddp_bucket_size"),
        ("--tp-comm-overlap-cfg", "Transformer Engine"),
        ("--num-distributed-optimizer-instances", "use_distributed_optimizer"),
        ("--rotary-scaling-factor", "yarn_rotary_scaling_factor"),
        ("--mscale-all-dim", "yarn_mscale"),
        ("--rope-type", "position_embedding_type"),
        ("--rotary-seq-len-interpolation-factor", "use_rope_scaling"),
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
