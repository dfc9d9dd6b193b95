"""Self-attention with PHD's core attention and the norm scheme's norms on q, k, v and the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from torch import Tensor, nn

from phd_megatron.errors import UserError
from phd_megatron.kernels.phd_attention import ContextParallel, phd_attention
from phd_megatron.kernels.qkv_norm_rope import gpu_problem, is_chosen, qkv_norm_rope
from phd_megatron.kernels.qkv_rope import rope, split_qkv_rope
from phd_megatron.model.full_width_norm import FullWidthNorm
from phd_megatron.norm.modules import norm_class, sum_gradient_over_tensor_parallel
from phd_megatron.phd.copies import join_copies, split_copies

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from phd_megatron.model.transformer_config import PHDTransformerConfig


@dataclass
class PHDSelfAttentionSubmodules(SelfAttentionSubmodules):
    """Adds the norms on q, k and v: ``heads`` and ``qk_norm_width`` of the block's record."""

    head_norms: str = ""
    qk_norm_width: str = "head"


def per_head_norm(config: TransformerConfig, head_dim: int) -> nn.Module:
    """A norm of one head at a time, whose weight all heads of all tensor-parallel ranks share."""
    norm = norm_class(config.normalization)(config, head_dim, config.layernorm_epsilon)
    return sum_gradient_over_tensor_parallel(norm)


class PHDSelfAttention(SelfAttention):
    """Megatron-Core's self-attention with norms on q, k and v before RoPE (HybridNorm, Eq. 5; OLMo 2)."""

    def __init__(
        self,
        config: PHDTransformerConfig,
        submodules: PHDSelfAttentionSubmodules,
        layer_number: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, **kwargs)
        self.head_norms = submodules.head_norms
        # The fused kernel knows RMSNorm of single heads alone.
        self.can_fuse_norms = config.normalization == "RMSNorm" and submodules.qk_norm_width == "head"
        self.v_layernorm = None
        head_dim = self.hidden_size_per_attention_head
        full = {"q": config.num_attention_heads, "k": config.num_query_groups}
        for name in [name for name in "qkv" if name in self.head_norms]:
            full_width = submodules.qk_norm_width == "full" and name in full
            norm: nn.Module = (
                FullWidthNorm(config, full[name], head_dim, self.pg_collection.tp)
                if full_width
                else per_head_norm(config, head_dim)
            )
            setattr(self, f"{name}_layernorm", norm)

    def forward(
        self, hidden_states: Tensor, *args: Any, rotary_pos_emb: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As Megatron-Core's; ``rotary_pos_emb`` is a :func:`~phd_megatron.kernels.qkv_rope.rope_table`."""
        self._rope_table = (
            rotary_pos_emb  # applied below, so that Megatron-Core's own, slower rotation has nothing to do
        )
        return super().forward(hidden_states, *args, **kwargs)

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Projected, normed and turned: q ``[rows, b, np, hn]``, k and v ``[rows, b, ng, hn]``; v is not turned."""
        table = self._rope_table
        if self.config.num_query_groups < self.world_size:
            # A KV head is shared by several ranks: Megatron-Core gathers and cuts out this rank's heads.
            query, key, value = super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        else:
            mixed, _ = self.linear_qkv(hidden_states)
            mixed = mixed.unflatten(-1, (self.num_query_groups_per_partition, -1))  # [rows, b, ng, (np/ng + 2) * hn]
            heads_per_group = self.num_attention_heads_per_partition // self.num_query_groups_per_partition
            if self.can_fuse_norms and self._wants_fused_norms(mixed):
                norms = {"q": self.q_layernorm, "k": self.k_layernorm, "v": self.v_layernorm}
                weights = {name: norm.weight for name, norm in norms.items() if norm is not None}
                return qkv_norm_rope(mixed, heads_per_group, table, weights, self.config.layernorm_epsilon)
            early = None if self.head_norms else table
            query, key, value = split_qkv_rope(mixed, heads_per_group, early)
            if not self.head_norms:
                return query, key, value
            query, key = (
                norm(x) if norm is not None else x for norm, x in ((self.q_layernorm, query), (self.k_layernorm, key))
            )
        if self.v_layernorm is not None:
            value = self.v_layernorm(value)
        assert table is not None  # every model of ours has RoPE
        return rope(query, table), rope(key, table), value

    def _wants_fused_norms(self, mixed: Tensor) -> bool:
        problem = gpu_problem(mixed.device, mixed.dtype, self.hidden_size_per_attention_head)
        return is_chosen(self.config.phd_attention_backend, problem)


class PHDCoreAttention(nn.Module):
    """Core attention of Megatron-Core's protocol over copy-major rows.

    Rows arrive as ``[ranks*K*s_rank]``: under sequence parallelism the linear layer before gathered the
    tensor-parallel ranks, each of which holds ``[K, s_rank]``; without it ``ranks`` is 1. In a pruned last layer only
    the last copy's queries are computed, so ``[ranks*s_rank]`` rows leave. Under context parallelism the rows are
    this rank's two slices of the sequence, and keys and values are exchanged as ``cp_comm_type`` says.

    Args:
        context_norm: norm each head of the result (the C of the norm schemes).
    """

    def __init__(
        self,
        config: PHDTransformerConfig,
        layer_number: int,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        context_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        pg_collection = kwargs["pg_collection"]
        self.policy = config.kv_policy
        self.backend = config.phd_attention_backend
        self.scale = softmax_scale
        self.ranks = pg_collection.tp.size() if config.sequence_parallel else 1
        self.layer_number = layer_number
        self.c_layernorm = per_head_norm(config, config.kv_channels) if context_norm else None
        self.context_parallel: ContextParallel | None = None
        if config.context_parallel_size > 1:
            self.context_parallel = ContextParallel(pg_collection.cp, cp_comm_type or "all_gather")
        last_layer = layer_number == config.num_layers
        self.query_copies = 1 if last_layer and config.phd_last_layer_pruning else self.policy.repeat

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """q ``[rows, b, np, hn]``, k and v ``[rows, b, ng, hn]`` to ``[rows, b, np*hn]``.

        Args:
            attention_mask: no mask, but where documents begin: ``[b, s]`` int64 on the host
                (:mod:`phd_megatron.phd.documents`). Megatron-Core hands it through its layers and their recomputation.
        """
        if (attention_mask is not None and attention_mask.dim() != 2) or attention_bias is not None:
            raise UserError(
                "PHD attention takes its mask from KVPolicy and documents alone; give attention_mask as [b, s], where "
                "the document of each token begins, and no attention_bias"
            )
        if packed_seq_params is not None:
            raise UserError("the model turns packed sequences into documents; its layers take them as attention_mask")
        repeat = self.policy.repeat
        query = split_copies(query, repeat, self.ranks)[repeat - self.query_copies :]  # [Kq, s, b, np, hn]
        key = split_copies(key, repeat, self.ranks)  # [K, s, b, ng, hn]
        value = split_copies(value, repeat, self.ranks)
        context = phd_attention(
            query,
            key,
            value,
            self.policy,
            scale=self.scale,
            backend=self.backend,
            query_copies=self.query_copies,
            context=self.context_parallel,
            starts=attention_mask,
        )
        if self.c_layernorm is not None:
            context = self.c_layernorm(context)
        # [Kq, s, b, np, hn] -> [ranks*Kq*s_rank, b, np*hn]
        return join_copies(context, self.ranks).flatten(2)


def context_parallel_bytes(models: Sequence[nn.Module]) -> dict[int, dict[str, int]]:
    """Bytes that this rank has sent since the start, by layer number and kind of transfer; empty without CP."""
    cores = (module for model in models for module in model.modules() if isinstance(module, PHDCoreAttention))
    return {core.layer_number: dict(core.context_parallel.sent) for core in cores if core.context_parallel is not None}
