"""Layer specs: which module sits in which slot of Megatron-Core's transformer layer, read from the norm plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor, nn

from phd_megatron.config.moe import layer_pattern
from phd_megatron.kernels.swiglu import swiglu
from phd_megatron.model.attention import PHDCoreAttention, PHDSelfAttention, PHDSelfAttentionSubmodules
from phd_megatron.model.layer_modules import LayerModules, layer_modules
from phd_megatron.model.moe import moe_spec
from phd_megatron.model.residual import SublayerResidual
from phd_megatron.runtime.mcore_versions import submodules

if TYPE_CHECKING:
    from phd_megatron.model.transformer_config import PHDTransformerConfig
    from phd_megatron.norm.schemes import SublayerNorm

#: a norm inside the linear layer that reads it, as Megatron-Core names it -> the name of its role
NORMS_IN_LINEAR = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}

# One checkpoint name per role, whatever slot of Megatron-Core's layer the scheme uses for it.
_CHECKPOINT_NAMES = {
    "pre_cross_attn_layernorm.": "pre_mlp_layernorm.",
    "residual_layernorm.": "input_layernorm.",
    "self_attn_bda.output_norm.": "attention_output_layernorm.",
    "mlp_bda.output_norm.": "mlp_output_layernorm.",
    "self_attention.core_attention.c_layernorm.": "self_attention.c_layernorm.",
    **NORMS_IN_LINEAR,
}


class NormedResidualLayer(TransformerLayer):
    """A layer whose attention has its normed input for residual too; Megatron-Core has no slot before the two part.

    Args:
        residual_norm: class of that norm.
    """

    def __init__(
        self, config: PHDTransformerConfig, *args: Any, residual_norm: Callable[..., nn.Module], **kwargs: Any
    ) -> None:
        super().__init__(config, *args, **kwargs)
        self.residual_layernorm = residual_norm(config, config.hidden_size, eps=config.layernorm_epsilon)

    def _forward_attention(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return super()._forward_attention(self.residual_layernorm(hidden_states), *args, **kwargs)


class SwiGLU(MegatronModule):
    """The FFN's activation in the slot that Megatron-Core has for Transformer Engine's."""

    def forward(self, gate_and_up: Tensor) -> Tensor:
        """``[rows, b, 2f]`` to ``[rows, b, f]``."""
        return swiglu(gate_and_up)


def layer_spec(config: PHDTransformerConfig, layer_number: int) -> ModuleSpec:
    """Spec of the layer with 1-based global number ``layer_number``.

    The FFN's norm sits in the slot before Megatron-Core's (absent) cross-attention when its output is also the
    residual (HybridNorm, Eq. 6): what leaves that slot becomes input and residual of the FFN. For attention there is
    :class:`NormedResidualLayer`. A norm that the linear layer alone reads is computed inside that layer where there is
    a module for both.
    """
    block = config.norm_plan[layer_number - 1]
    modules = layer_modules(config)
    norm = modules.norm
    qkv_linear = norm_and_linear(modules, block.attention)
    last_layer = layer_number == config.num_layers
    prune = config.phd_last_layer_pruning
    drop_after = last_layer and not prune and config.last_layer_drops_copies
    normed_residual = block.mlp.residual == "normed"
    ffn = _ffn_spec(config, layer_number)
    inside_ffn = getattr(submodules(ffn), "linear_fc1", modules.column) is not modules.column
    layer = ModuleSpec(module=TransformerLayer)
    input_norm = norm if block.attention.input_norm and qkv_linear is modules.column else IdentityOp
    if block.attention.residual == "normed":
        layer, input_norm = ModuleSpec(module=NormedResidualLayer, params={"residual_norm": norm}), IdentityOp
    return replace(
        layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=input_norm,
            self_attention=ModuleSpec(
                module=PHDSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=PHDSelfAttentionSubmodules(
                    linear_qkv=qkv_linear,
                    core_attention=partial(PHDCoreAttention, context_norm="c" in block.heads),
                    linear_proj=modules.row,
                    head_norms=block.heads,
                    qk_norm_width=block.qk_norm_width,
                ),
            ),
            self_attn_bda=_residual(config, block.attention, drop_copies=last_layer and prune),
            pre_cross_attn_layernorm=norm if normed_residual else IdentityOp,
            pre_mlp_layernorm=IdentityOp if inside_ffn or normed_residual or not block.mlp.input_norm else norm,
            mlp=ffn,
            mlp_bda=_residual(config, block.mlp, drop_copies=drop_after),
            sharded_state_dict_keys_map=_CHECKPOINT_NAMES,
        ),
    )


def norm_and_linear(modules: LayerModules, norms: SublayerNorm) -> type:
    """The first linear layer of a sublayer, with the norm of its input inside where nothing else reads that."""
    alone = norms.input_norm and norms.residual == "raw"
    return modules.norm_and_column if alone and modules.norm_and_column is not None else modules.column


def _ffn_spec(config: PHDTransformerConfig, layer_number: int) -> ModuleSpec:
    activation = SwiGLU if config.gated_linear_unit else None
    has_experts = config.num_moe_experts is not None
    if has_experts and layer_pattern(config.moe_layer_freq, config.num_layers)[layer_number - 1]:
        return moe_spec(config, activation)
    modules = layer_modules(config)
    first = norm_and_linear(modules, config.norm_plan[layer_number - 1].mlp)
    return ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=first, linear_fc2=modules.row, activation_func=activation)
    )


def _residual(config: PHDTransformerConfig, norms: SublayerNorm, drop_copies: bool) -> ModuleSpec:
    params = {"config": config, "norms": norms, "drop_copies": drop_copies}
    return ModuleSpec(module=SublayerResidual, params=params)


def block_spec(config: PHDTransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Specs of the layers that this pipeline stage holds, following the global layer numbers."""
    offset = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    layers = [layer_spec(config, offset + index + 1) for index in range(count)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=layer_modules(config).norm)
