"""Every word of an exported ``config.json`` that changes the numbers: Megatron-Core's model with another value of it.

Logits are Megatron's by value. And with the word as it was before, the export would give others: so a value that is
dropped, or is the class's default by chance, is seen.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import ParallelConfig, RunConfig
from phd_megatron.errors import UserError
from phd_megatron.huggingface.architecture import Architecture
from phd_megatron.huggingface.bundle_files import write_bundle
from phd_megatron.huggingface.config_json import TokenIds, write_config
from phd_megatron.huggingface.families import export_family
from phd_megatron.huggingface.loading import load_directory
from phd_megatron.huggingface.mapping import model_rules
from phd_megatron.runtime.context import Runtime

SIZES = {"num_layers": 2, "hidden_size": 48, "ffn_hidden_size": 80, "num_attention_heads": 6, "num_query_groups": 2}
SIZES |= {"seq_length": 24, "vocab_size": 257, "untie_embeddings_and_output_weights": True}
PHD = {"phd_repeat": 3, "phd_window": 4, "phd_chunk": 8, "norm_scheme": "hybrid_star", "kv_channels": 8}
EXPERTS = {"num_moe_experts": 6, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
SIGMOID = {**EXPERTS, "moe_router_score_function": "sigmoid", "moe_router_topk": 3}

#: class, the model, and what of it is another value
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    f"{name}: {word}": (cls, base, change)
    for name, cls, base, changes in (
        ("Llama", "LlamaForCausalLM", {"norm_scheme": "pre"}, "plain"),
        ("Qwen3", "Qwen3ForCausalLM", {"norm_scheme": "pre_qk"}, "plain"),
        ("Olmo2", "Olmo2ForCausalLM", {"norm_scheme": "olmo2"}, "plain"),
        ("Mixtral", "MixtralForCausalLM", {"norm_scheme": "pre", "transformer": EXPERTS}, "experts"),
        ("Qwen3Moe", "Qwen3MoeForCausalLM", {"norm_scheme": "pre_qk", "transformer": EXPERTS}, "experts"),
        (
            "Olmoe",
            "OlmoeForCausalLM",
            {"norm_scheme": "olmoe", "transformer": {**EXPERTS, "moe_router_pre_softmax": True}},
            "experts",
        ),
        ("PHD", "PHDForCausalLM", PHD, "bundled"),
        ("PHD with experts", "PHDForCausalLM", {**PHD, "transformer": EXPERTS}, "bundled experts"),
        ("PHD with sigmoid", "PHDForCausalLM", {**PHD, "transformer": SIGMOID}, "bundled sigmoid"),
    )
    for word, change in {
        "plain": {
            "epsilon": {"layernorm_epsilon": 0.3},
            "rotary base": {"rotary_base": 300.0},
            "wide heads": {"kv_channels": 16},
            "tied": {"untie_embeddings_and_output_weights": False},
        },
        "experts": {
            "epsilon": {"layernorm_epsilon": 0.3},
            "rotary base": {"rotary_base": 300.0},
            "top k": {"transformer": {"moe_router_topk": 3}},
        },
        "bundled": {
            "epsilon": {"layernorm_epsilon": 0.3},
            "rotary base": {"rotary_base": 300.0},
            "rotary share": {"rotary_percent": 0.5},
            "wide heads": {"kv_channels": 16},
            "tied": {"untie_embeddings_and_output_weights": False},
            "kind of norm": {"normalization": "LayerNorm"},
            "GELU without a gate": {"gated_linear_unit": False},
            "copies": {"phd_repeat": 2},
            "window": {"phd_window": 3},
            "chunk": {"phd_chunk": 7},
            "no chunks": {"phd_chunk": None},
            "copy positions": {"phd_copy_positions": "fraction"},
            "copy positions, repeated": {"phd_copy_positions": "repeated"},
            "copy embedding": {"phd_copy_embedding": "vector"},
            "scheme": {"norm_scheme": "hybrid"},
        },
        "bundled experts": {
            "top k": {"transformer": {"moe_router_topk": 3}},
            "dense layer": {"transformer": {"moe_layer_freq": [1, 0]}},
            "softmax over all": {"transformer": {"moe_router_pre_softmax": True}},
            "sigmoid": {"transformer": {"moe_router_score_function": "sigmoid"}},
            "scale": {"transformer": {"moe_router_topk_scaling_factor": 2.5}},
            "shared": {"transformer": {"moe_shared_expert_intermediate_size": 16}},
        },
        "bundled sigmoid": {
            "bias": {"transformer": {"moe_router_enable_expert_bias": True}},
            "groups": {"transformer": {"moe_router_num_groups": 3, "moe_router_group_topk": 1, "moe_router_topk": 2}},
            "gate": {
                "transformer": {"moe_shared_expert_intermediate_size": 16, "moe_shared_expert_gate": True},
            },
        },
    }[changes].items()
}


@pytest.fixture(scope="module")
def runtime():
    with Runtime.start(ParallelConfig(device="cpu"), verbose=False) as started:
        yield started


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    place = tmp_path_factory.mktemp("counts")
    write_bundle(place)
    return place


def configured(*changes: dict[str, Any]) -> RunConfig:
    run = RunConfig()
    extra: dict[str, Any] = {}
    for change in changes:
        for field, value in change.items():
            if field == "transformer":
                extra |= value
            else:
                assert hasattr(run.model, field)
                setattr(run.model, field, value)
    run.model.transformer = extra
    resolve(run)
    return run


def written(directory, run: RunConfig, model_class: str):
    """``config.json`` of a run's export; the rules of its tensors."""
    architecture = Architecture.from_model(run.model, 257)
    family = export_family(architecture)
    assert family.model_class == model_class
    config = write_config(architecture, family, "float32", TokenIds())
    (directory / "config.json").write_text(json.dumps(config))
    return model_rules(architecture, family)


def whole_tensors(model, group) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors, put together from their parts."""
    from phd_megatron.model.initialisation import sharded_tensors

    tensors: dict[str, torch.Tensor] = {}
    for part in sharded_tensors(model, group):
        place = tensors.setdefault(part.key, torch.full(tuple(part.global_shape), torch.nan))[part.global_slice()]
        place.copy_(part.data.view_as(place))
    return tensors


def logits(directory, tokens: torch.Tensor) -> torch.Tensor:
    return load_directory(directory, "the export", run_its_code=True).eval()(tokens).logits


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_it_is_in_the_export_and_it_counts(runtime, directory, case):
    from megatron.core import parallel_state

    from phd_megatron.model.build import build_model

    model_class, base, change = CASES[case]
    run = configured(SIZES, base, change)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(257, (2, 24), generator=generator)
    model = build_model(run, 257, runtime.device)[0].eval()
    for key, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(noise * (0.2 if "norm" in key or "bias" in key else 0.1))
    for key, buffer in model.named_buffers():
        if key.endswith("expert_bias"):
            buffer.add_(torch.randn(buffer.shape, generator=generator))
    expected = model(tokens, torch.arange(24).expand(2, -1), None)[..., :257]
    tensors = whole_tensors(model, parallel_state.get_data_parallel_group(with_context_parallel=True))

    weights: dict[str, torch.Tensor] = {}
    for rule in written(directory, run, model_class):
        weights |= rule.to_hf(tensors.pop(rule.mcore))
    assert not tensors
    weights = {key: tensor.contiguous() for key, tensor in weights.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    assert relative(expected, logits(directory, tokens)) < 1e-5

    written(directory, configured(SIZES, base), model_class)
    try:
        assert relative(expected, logits(directory, tokens)) > 1e-3
    except UserError as error:  # the weights do not fit the other model
        assert any(words in str(error) for words in ("it lacks", "no place for", "another shape"))


def relative(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
