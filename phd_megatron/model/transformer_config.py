"""From a run's configuration to Megatron-Core's ``TransformerConfig``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from phd_megatron.config.architecture import kv_policy
from phd_megatron.config.rope import Scaling, scaling_of
from phd_megatron.config.schema import ModelConfig, ParallelConfig, RunConfig
from phd_megatron.config.values import decode
from phd_megatron.errors import UserError
from phd_megatron.norm.schemes import BlockNorm, norm_plan, norm_scheme
from phd_megatron.phd.kv_policy import KVPolicy
from phd_megatron.runtime.dtypes import params_dtype
from phd_megatron.runtime.pipeline_split import PipelineSplit

_Fields = dict[str, Any]  # of PHDTransformerConfig, by name


@dataclass
class PHDTransformerConfig(TransformerConfig):
    """Megatron-Core's configuration plus what PHD and the norm scheme add."""

    kv_policy: KVPolicy = field(default_factory=KVPolicy)
    rope: Scaling | None = None  #: how RoPE's frequencies are changed for a longer context
    copy_positions: str = "token"  #: by what RoPE turns the copies of a token (phd.copy_positions)
    reset_position_ids: bool = False  #: RoPE takes the batch's positions, which count from each document's start
    copy_embedding: str = "none"  #: what is added to copies 2 to K after the embedding
    norm_plan: tuple[BlockNorm, ...] = ()
    embed_norm: bool = False  #: a norm follows the embedding
    phd_attention_backend: str = "auto"
    phd_last_layer_pruning: bool = True
    transformer_engine: bool = False  #: linear layers and norms are Transformer Engine's
    fused_norms: bool = False  #: a norm that only a linear layer reads is computed inside it
    device: torch.device | None = None  #: where our modules make their tensors; None is torch's default
    experts_backend: str = "sequential"  #: how experts multiply (runtime.expert_backends), auto resolved
    copies_dropped_at_head: bool = False  #: the head has a pipeline stage of its own, and all copies travel there
    keep_copies: bool = False  #: no copy is dropped: the model gives the losses of all of them (a diagnostic)
    init_scheme: str = "normal"
    head_init_method_std: float | None = None  #: of an untied head; None is init_method_std
    init_gain: float = 1.0  #: of value, attention-output and FFN weights, by the norm scheme

    @property
    def last_layer_drops_copies(self) -> bool:
        """Whether the last copy alone leaves the last decoder layer."""
        return not (self.copies_dropped_at_head or self.keep_copies)


def transformer_field_types() -> dict[str, Any]:
    """Name to annotation of every ``TransformerConfig`` field, for the command line and YAML."""
    return {f.name: f.type for f in dataclasses.fields(TransformerConfig) if f.init}


def _leave_alone(weight: torch.Tensor) -> torch.Tensor:
    return weight


def build_transformer_config(run: RunConfig, keep_copies: bool = False) -> PHDTransformerConfig:
    """Translate a resolved run configuration.

    Args:
        keep_copies: for a model that only evaluates, see :class:`~phd_megatron.model.gpt_model.PHDGPTModel`.

    Raises:
        UserError: for a combination that Megatron-Core or PHD attention cannot compute.
    """
    values: _Fields = {
        # A step computes in the order a single rank would; the fused kernels below need a compiler or TE.
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        # phd_megatron.model.initialisation draws the values, equal in every layout. Not perform_initialization=False:
        # Megatron would also leave out the marks by which the gradient norm counts tensor-parallel weights.
        "init_method": _leave_alone,
        "output_layer_init_method": _leave_alone,
        "embedding_init_method": _leave_alone,
        **decode(run.model.transformer, transformer_field_types()),
        # The graph around a step is phd_megatron.training.cuda_graph's. By this word Megatron-Core would make managers
        # for graphs of its own; the scope stays, by which Transformer Engine's cross-entropy can be recorded.
        "cuda_graph_impl": "none",
        **_shape(run.model),
        **_layout(run.parallel),
        **_precision(run),
        **_copies_and_norms(run, keep_copies),
        # Megatron-Core's word for Transformer Engine's experts, which it wants for recomputing what all grouped ones
        # can; which experts they are the machine decides (phd_megatron.runtime.expert_backends).
        "moe_grouped_gemm": "moe_act" in (run.model.transformer.get("recompute_modules") or []),
    }
    try:
        return PHDTransformerConfig(**values)
    except (ValueError, AssertionError, TypeError) as error:
        raise UserError(f"Megatron-Core refuses the model configuration: {error}") from error


def _shape(model: ModelConfig) -> _Fields:
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.kv_channels,
        "normalization": model.normalization,
        "layernorm_epsilon": model.layernorm_epsilon,
        "gated_linear_unit": model.gated_linear_unit,
        "use_te_activation_func": model.gated_linear_unit,  # the slot that takes our SwiGLU
        "activation_func": F.silu if model.gated_linear_unit else F.gelu,
        "add_bias_linear": model.add_bias_linear,
        "add_qkv_bias": model.add_qkv_bias,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "init_method_std": model.init_method_std,
        "head_init_method_std": model.head_init_method_std,
    }


def _layout(parallel: ParallelConfig) -> _Fields:
    split = PipelineSplit.from_config(parallel)
    overlap_p2p = split.vpp > 1 and parallel.overlap_p2p_comm is not False
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": split.vpp if split.vpp > 1 else None,
        "num_layers_in_first_pipeline_stage": split.first,
        "num_layers_in_last_pipeline_stage": split.last,
        "pipeline_model_parallel_layout": parallel.pipeline_model_parallel_layout,
        "account_for_embedding_in_pipeline_split": split.embedding,
        "account_for_loss_in_pipeline_split": split.loss,
        "microbatch_group_size_per_vp_stage": parallel.microbatch_group_size_per_vp_stage,
        "overlap_p2p_comm": overlap_p2p,
        "batch_p2p_comm": not overlap_p2p,
        "overlap_p2p_comm_warmup_flush": parallel.overlap_p2p_comm_warmup_flush,
        "context_parallel_size": parallel.context_parallel_size,
        "cp_comm_type": parallel.cp_comm_type,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "variable_seq_lengths": False,
    }


def _precision(run: RunConfig) -> _Fields:
    dtype = params_dtype(run)
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": run.training.bf16,
        "fp16": run.training.fp16,
        # Losses are summed and divided by the global token count, so that unequal loss masks give the same
        # gradient in every layout.
        "calculate_per_token_loss": True,
    }


def _copies_and_norms(run: RunConfig, keep_copies: bool) -> _Fields:
    model = run.model
    policy = kv_policy(model)
    scheme, layers = norm_scheme(model.norm_scheme), model.num_layers or 0
    split = PipelineSplit.from_config(run.parallel)
    # Rows between stages are K * s everywhere, so a head without a decoder layer on its stage gets all copies.
    lone_head = model.num_layers is not None and split.layers(model.num_layers)[-1] == 0
    return {
        "kv_policy": policy,
        "rope": scaling_of(model),
        "copy_positions": model.phd_copy_positions,
        "reset_position_ids": run.data.reset_position_ids,
        "copy_embedding": model.phd_copy_embedding if policy.repeat > 1 else "none",
        "norm_plan": norm_plan(model.norm_scheme, layers),
        "embed_norm": scheme.embed_norm,
        "phd_attention_backend": model.phd_attention_backend,
        "phd_last_layer_pruning": model.phd_last_layer_pruning and not lone_head and not keep_copies,
        "copies_dropped_at_head": lone_head and not keep_copies,
        "keep_copies": keep_copies,
        "init_scheme": model.init,
        "init_gain": scheme.init_gain(layers) if scheme.init_gain else 1.0,
    }
