"""What a decoder is, in the words that a run's configuration and a Hugging Face directory share."""

from __future__ import annotations

from dataclasses import dataclass

from phd_megatron.config.moe import MoE
from phd_megatron.config.schema import ModelConfig
from phd_megatron.config.transformer_fields import transformer_role
from phd_megatron.errors import UserError
from phd_megatron.norm.schemes import BlockNorm, norm_plan
from phd_megatron.phd.kv_policy import KVPolicy

#: fields that :class:`~phd_megatron.config.moe.MoE` speaks for
_EXPERTS = (
    *("num_moe_experts", "moe_router_topk", "moe_layer_freq", "moe_ffn_hidden_size"),
    *("moe_shared_expert_intermediate_size", "moe_shared_expert_gate", "moe_router_score_function"),
    *("moe_router_pre_softmax", "moe_router_enable_expert_bias", "moe_router_num_groups", "moe_router_group_topk"),
    "moe_router_topk_scaling_factor",
)
_NEUTRAL = {"softmax_type": "vanilla", "glu_linear_offset": 0.0, "mlp_chunks_for_prefill": 1}


@dataclass(frozen=True)
class Architecture:
    """A decoder as both formats describe it. Sizes in elements; ``vocab_size`` is the true one."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    heads: int
    groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rotary_base: float
    rotary_percent: float
    normalization: str
    epsilon: float
    gated: bool
    qkv_bias: bool
    linear_bias: bool
    tied: bool
    init_std: float
    norm_scheme: str
    policy: KVPolicy
    copy_positions: str = "token"
    copy_embedding: str = "none"
    moe: MoE | None = None

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
        missing = [n for n in ("num_layers", "hidden_size", "num_attention_heads") if getattr(model, n) is None]
        if missing:
            raise UserError(
                f"the checkpoint's configuration does not say {', '.join(missing)}; use one that was resolved"
            )
        assert model.num_layers and model.hidden_size and model.num_attention_heads
        policy, _ = KVPolicy.from_options(model.phd_repeat, model.phd_window, model.phd_chunk)
        return cls(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size or 4 * model.hidden_size,
            heads=model.num_attention_heads,
            groups=model.num_query_groups or model.num_attention_heads,
            head_dim=model.kv_channels or model.hidden_size // model.num_attention_heads,
            vocab_size=vocab_size,
            max_position_embeddings=model.max_position_embeddings or model.seq_length,
            rotary_base=model.rotary_base,
            rotary_percent=model.rotary_percent,
            normalization=model.normalization,
            epsilon=model.layernorm_epsilon,
            gated=model.gated_linear_unit,
            qkv_bias=model.add_qkv_bias or model.add_bias_linear,
            linear_bias=model.add_bias_linear,
            tied=not model.untie_embeddings_and_output_weights,
            init_std=model.init_method_std or (2.5 * model.hidden_size) ** -0.5,
            norm_scheme=model.norm_scheme,
            policy=policy,
            copy_positions=model.phd_copy_positions if policy.repeat > 1 else "token",
            copy_embedding=model.phd_copy_embedding if policy.repeat > 1 else "none",
            moe=MoE.from_model(model),
        )

    @property
    def blocks(self) -> tuple[BlockNorm, ...]:
        """Norm record of every layer."""
        return norm_plan(self.norm_scheme, self.num_layers)

    @property
    def copies(self) -> dict[str, int | str | None]:
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
