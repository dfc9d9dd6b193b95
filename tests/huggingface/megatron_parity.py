"""Program of ``test_against_megatron.py``: one rank saves real checkpoints; argument 1 is a directory to work in.

Prints one JSON line a case: name, class of the export, relative error of its logits against the Megatron model's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import RunConfig
from phd_megatron.runtime.context import Runtime

SIZES = {
    "num_layers": 3,
    "hidden_size": 48,
    "ffn_hidden_size": 80,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "kv_channels": 8,
    "seq_length": 48,
    "vocab_size": 257,
}
POLICIES = {"1": {}, "2": {"phd_repeat": 2, "phd_window": 4, "phd_chunk": 8}, "3": {"phd_repeat": 3, "phd_window": 5}}
CASES = {
    f"{scheme} K={repeat}": {"norm_scheme": scheme, **policy}
    for scheme in ("pre", "pre_qk", "post", "hybrid", "hybrid_star")
    for repeat, policy in POLICIES.items()
}
CASES["olmo2 K=1"] = {"norm_scheme": "olmo2"}
CASES["pre_qkvc_post K=2"] = {"norm_scheme": "pre_qkvc_post", **POLICIES["2"]}
CASES |= {
    "hybrid_star K=3, repeated and vector": {
        **{"norm_scheme": "hybrid_star", **POLICIES["3"]},
        **{"phd_copy_positions": "repeated", "phd_copy_embedding": "vector"},
    },
    "embed_norm K=2, fraction and vector": {
        **{"norm_scheme": "embed_norm", **POLICIES["2"]},
        **{"phd_copy_positions": "fraction", "phd_copy_embedding": "vector"},
    },
}
CASES["biases, LayerNorm, GELU, own head, partial RoPE"] = {
    **{"norm_scheme": "hybrid_star", **POLICIES["2"], "normalization": "LayerNorm", "add_bias_linear": True},
    **{"gated_linear_unit": False, "untie_embeddings_and_output_weights": True},
    **{"rotary_percent": 0.5, "rotary_base": 500.0},
}
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
SHARED = {"moe_shared_expert_intermediate_size": 16, "moe_shared_expert_gate": True, "moe_layer_freq": [0, 1, 1]}
SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
GROUPS = {"moe_router_num_groups": 2, "moe_router_group_topk": 1, "moe_router_topk_scaling_factor": 2.5}
CASES |= {
    "experts as Mixtral": {"norm_scheme": "pre", "transformer": EXPERTS},
    "experts as Qwen3": {"norm_scheme": "pre_qk", "transformer": {**EXPERTS, "moe_layer_freq": [1, 0, 1]}},
    "experts as Qwen3, softmax over all": {
        "norm_scheme": "pre_qk",
        "transformer": {**EXPERTS, "moe_router_pre_softmax": True, "moe_router_topk": 1},
    },
    "experts as OLMoE": {"norm_scheme": "olmoe", "transformer": {**EXPERTS, "moe_router_pre_softmax": True}},
    "experts pre-softmax": {"norm_scheme": "pre", "transformer": {**EXPERTS, "moe_router_pre_softmax": True}},
    "experts hybrid_star": {"norm_scheme": "hybrid_star", "transformer": {**EXPERTS, **SHARED}},
    "experts hybrid_star K=2": {
        **{"norm_scheme": "hybrid_star", **POLICIES["2"]},
        "transformer": {**EXPERTS, **SIGMOID, **SHARED, "moe_shared_expert_gate": False, "moe_router_dtype": "fp32"},
    },
    "experts in groups K=3": {
        **{"norm_scheme": "pre", **POLICIES["3"], "phd_copy_embedding": "vector"},
        "transformer": {**EXPERTS, **SIGMOID, **GROUPS},
    },
}
#: old contexts that are shorter than the text
YARN = {
    **{"position_embedding_type": "yarn", "yarn_rotary_scaling_factor": 4.0, "rotary_base": 500.0},
    **{"yarn_original_max_position_embeddings": 12, "yarn_beta_fast": 4.0, "yarn_beta_slow": 0.5},
}
CASES |= {
    "Llama 3.1's scaling": {"norm_scheme": "pre", "use_rope_scaling": True, "rotary_base": 5e5},
    "yarn as Qwen3": {"norm_scheme": "pre_qk", **YARN},
    "yarn K=2, fraction, partial RoPE": {
        **{"norm_scheme": "hybrid_star", **POLICIES["2"], **YARN, "phd_copy_positions": "fraction"},
        **{"rotary_percent": 0.5, "yarn_mscale": 0.5, "yarn_correction_range_round_to_int": False},
    },
    "Llama 3.1's scaling K=3, repeated": {
        **{"norm_scheme": "hybrid", **POLICIES["3"], "phd_copy_positions": "repeated"},
        **{"use_rope_scaling": True, "rope_scaling_factor": 32.0, "rotary_base": 1e6},
    },
}
CASES["QKV bias"] = {"norm_scheme": "pre", "add_qkv_bias": True}


def main(root: Path) -> None:
    runtime = Runtime.start(RunConfig().parallel, seed=1, verbose=False)

    import torch
    from transformers import AutoModelForCausalLM

    from phd_megatron.checkpoint.saver import CheckpointSaver
    from phd_megatron.data.tokenizers import load_tokenizer
    from phd_megatron.huggingface.export import export_checkpoint
    from phd_megatron.model.build import build_model

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(257, (2, 48), generator=generator)
    for number, (name, fields) in enumerate(CASES.items()):
        run = RunConfig()
        for field, value in {**SIZES, **fields}.items():
            setattr(run.model, field, value)
        resolve(run)
        model = build_model(run, 257, runtime.device)[0].eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():  # initial norms and biases would hide a mix-up
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * (0.2 if "norm" in key or "bias" in key else 0.1))
            for key, buffer in model.named_buffers():
                if key.endswith("expert_bias"):
                    buffer.add_(torch.randn(buffer.shape, generator=generator))
            expected = model(tokens, torch.arange(48).expand(2, -1), None)[..., :257]
        saver = CheckpointSaver(root / f"{number}", run_config=run, tokenizer=load_tokenizer("byte"), runtime=runtime)
        state = {"consumed_samples": 2}
        saver.save(iteration=1, models=[model], optimizer=None, scheduler=None, training_state=state)
        report = export_checkpoint(root / f"{number}", root / f"{number}-hf", verify="tensors")
        exported = AutoModelForCausalLM.from_pretrained(report.output, trust_remote_code=True).eval()
        with torch.no_grad():
            error = (exported(tokens).logits - expected).norm() / expected.norm()
        print(json.dumps([name, report.model_class, error.item()]), flush=True)
    runtime.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
