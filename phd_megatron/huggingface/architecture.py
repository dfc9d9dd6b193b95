"""What the exported ``config.json`` says, derived from a run's configuration."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from typing import Any

from phd_megatron.config import architecture
from phd_megatron.config.moe import MoE
from phd_megatron.config.schema import ModelConfig
from phd_megatron.config.transformer_fields import transformer_role
from phd_megatron.errors import UserError

BUNDLED = "PHDForCausalLM"
_MODEL_TYPES = {
    BUNDLED: "phd_transformer",
    "LlamaForCausalLM": "llama",
    "Qwen3ForCausalLM": "qwen3",
    "Olmo2ForCausalLM": "olmo2",
    "MixtralForCausalLM": "mixtral",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "OlmoeForCausalLM": "olmoe",
}
_NATIVE_SCHEMES = {"pre": "LlamaForCausalLM", "pre_qk": "Qwen3ForCausalLM", "olmo2": "Olmo2ForCausalLM"}
_NATIVE_SCHEMES_WITH_EXPERTS = {
    "pre": "MixtralForCausalLM",
    "pre_qk": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
}
_AUTO_MAP = {
    "AutoConfig": "configuration_phd.PHDConfig",
    "AutoModel": "modeling_phd.PHDModel",
    "AutoModelForCausalLM": "modeling_phd.PHDForCausalLM",
}

#: fields that :class:`~phd_megatron.config.moe.MoE` speaks for
_EXPERTS = (
    *("num_moe_experts", "moe_router_topk", "moe_layer_freq", "moe_ffn_hidden_size"),
    *("moe_shared_expert_intermediate_size", "moe_shared_expert_gate", "moe_router_score_function"),
    *("moe_router_pre_softmax", "moe_router_enable_expert_bias", "moe_router_num_groups", "moe_router_group_topk"),
    "moe_router_topk_scaling_factor",
)
_NEUTRAL = {"softmax_type": "vanilla", "glu_linear_offset": 0.0, "mlp_chunks_for_prefill": 1}


@dataclass(frozen=True)
class TokenIds:
    """Special tokens, or None where the tokenizer has none."""

    bos: int | None = None
    eos: int | list[int] | None = None
    pad: int | None = None


@dataclass(frozen=True, kw_only=True)
class Architecture(architecture.Architecture):
    """A decoder as both formats describe it; ``vocab_size`` is the true one."""

    vocab_size: int

    @classmethod
    def from_model(cls, model: ModelConfig, vocab_size: int) -> Architecture:
        """From a resolved configuration.

        Raises:
            UserError: for something the exported model could not honour.
        """
        for name, value in model.transformer.items():
            unset = value is None or value is False or _NEUTRAL.get(name) == value or name in _EXPERTS
            if not unset and transformer_role(name).is_architecture:
                raise UserError(
                    f"{name}={value!r}: the exported model has nothing that corresponds to it, so its logits would "
                    "differ; train without it to export"
                )
        missing = [name for name in architecture.NEEDED if getattr(model, name) is None]
        if missing:
            raise UserError(
                f"the checkpoint's configuration does not say {', '.join(missing)}; use one that was resolved"
            )
        return cls(**vars(architecture.architecture_of(model)), vocab_size=vocab_size)

    @property
    def copies(self) -> dict[str, Any]:
        """Fields of a :class:`ModelConfig` that say how often a token is repeated and how its copies differ."""
        return {
            "phd_repeat": self.policy.repeat,
            "phd_window": self.policy.window,
            "phd_chunk": self.policy.chunk,
            "phd_copy_positions": self.copy_positions,
            "phd_copy_embedding": self.copy_embedding,
        }

    @property
    def name(self) -> str:
        """For people: the scheme, the paper's name of the variant, and what tells copies apart."""
        words = [self.norm_scheme, self.policy.name]
        if self.copy_positions != "token":
            words.append(f"copy positions {self.copy_positions}")
        if self.copy_embedding != "none":
            words.append(f"copy embedding {self.copy_embedding}")
        return ", ".join(words)

    def model_class(self, native: bool = True) -> str:
        """The transformers class that computes this model: one of its own where it is exact, else the bundled one."""
        plain = (
            self.policy.repeat == 1
            and self.normalization == "RMSNorm"
            and self.gated
            and not self.qkv_bias
            and not self.linear_bias
            and self.rotary_percent == 1.0
            and self.hidden_size % self.heads == 0
        )
        if not native or not plain:
            return BUNDLED
        if self.moe is None:
            return _NATIVE_SCHEMES.get(self.norm_scheme, BUNDLED)
        moe = self.moe
        name = _NATIVE_SCHEMES_WITH_EXPERTS.get(self.norm_scheme, BUNDLED)
        simple = moe.score_function == "softmax" and moe.groups is None and moe.scaling == 1.0
        if not simple or moe.shared_hidden_size or moe.router_dtype not in (None, "fp32"):
            return BUNDLED
        if name != "Qwen3MoeForCausalLM" and not all(moe.layers):
            return BUNDLED
        if name == "MixtralForCausalLM" and moe.pre_softmax:
            return BUNDLED  # its weights add up to 1
        return name

    def hf_config(self, model_class: str, dtype: str, tokens: TokenIds) -> dict[str, Any]:
        """The content of ``config.json``."""
        config: dict[str, Any] = {
            "architectures": [model_class],
            "model_type": _MODEL_TYPES[model_class],
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "head_dim": self.head_dim,
            "hidden_act": "silu" if self.gated else "gelu",
            "max_position_embeddings": self.max_position_embeddings,
            "initializer_range": self.init_std,
            "rms_norm_eps": self.epsilon,
            "rope_parameters": {"rope_type": "default", "rope_theta": float(self.rotary_base)},
            "tie_word_embeddings": self.tied,
            "attention_bias": self.qkv_bias,
            "use_cache": True,
            "bos_token_id": tokens.bos,
            "eos_token_id": tokens.eos,
            "pad_token_id": tokens.pad,
            **self.copies,
            "norm_scheme": self.norm_scheme,
            "dtype": dtype,
            "transformers_version": importlib.metadata.version("transformers"),
        }
        if model_class in (BUNDLED, "LlamaForCausalLM"):
            config["mlp_bias"] = self.linear_bias
        if self.moe is not None:
            config |= _experts_config(self.moe, model_class)
        if model_class == BUNDLED:
            config |= {
                "auto_map": _AUTO_MAP,
                "mlp_gated": self.gated,
                "normalization": self.normalization,
                "attention_output_bias": self.linear_bias,
            }
            if self.rotary_percent != 1.0:
                config["rope_parameters"]["partial_rotary_factor"] = self.rotary_percent
        else:
            # transformers 4 reads these and does not know rope_parameters, so it would take a theta of its own.
            config |= {"rope_theta": float(self.rotary_base), "torch_dtype": dtype}
        return config


def bundled_config(**values: Any) -> dict[str, Any]:
    """A ``config.json`` of the bundled class, its defaults but for ``values``."""
    return {"architectures": [BUNDLED], "model_type": _MODEL_TYPES[BUNDLED], "auto_map": _AUTO_MAP, **values}


def _experts_config(moe: MoE, model_class: str) -> dict[str, Any]:
    """What ``config.json`` says about experts, in the words of ``model_class``."""
    if model_class == "MixtralForCausalLM":
        return {
            "num_local_experts": moe.experts,
            "num_experts_per_tok": moe.topk,
            "intermediate_size": moe.ffn_hidden_size,
        }
    config: dict[str, Any] = {
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.topk,
        "norm_topk_prob": not moe.pre_softmax,
    }
    if model_class == "OlmoeForCausalLM":
        return {**config, "intermediate_size": moe.ffn_hidden_size}
    config |= {
        "moe_intermediate_size": moe.ffn_hidden_size,
        "mlp_only_layers": [index for index, has_experts in enumerate(moe.layers) if not has_experts],
    }
    if model_class == BUNDLED:
        config |= {
            "scoring_func": moe.score_function,
            "use_expert_bias": moe.expert_bias,
            "n_group": moe.groups,
            "topk_group": moe.group_topk,
            "routed_scaling_factor": moe.scaling,
            "shared_expert_intermediate_size": moe.shared_hidden_size,
            "use_shared_expert_gate": moe.shared_gate,
            "router_dtype": moe.router_dtype,
        }
    else:
        config["decoder_sparse_step"] = 1
    return config
