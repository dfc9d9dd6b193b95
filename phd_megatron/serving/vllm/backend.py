"""PHD's attention as vLLM sees it: a layer that attends, and beside it the cache of hidden copies.

A decoder layer has two of vLLM's ``Attention`` objects. The first one attends: its cache has the originals, as that of
a vanilla model, and it writes both caches in one call. The second one only says what the cache of hidden copies is: a
sliding window of ``min(W, C)`` positions, whose blocks vLLM gives back when the window has passed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from phd_megatron.phd.kv_policy import KVPolicy
from phd_megatron.serving.vllm.attend import Batch, add_hidden, attend_originals, write

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import KVCacheSpec


class PHDMetadataBuilder(AttentionMetadataBuilder[Batch]):
    """vLLM's description of a batch as :class:`Batch`."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Batch:
        """The same for both caches, but for blocks and slots."""
        common = common_attn_metadata
        return Batch(
            starts=common.query_start_loc,
            lengths=common.seq_lens,
            blocks=common.block_table_tensor,
            slots=common.slot_mapping,
            longest_query=common.max_query_len,
            longest=common.max_seq_len,
        )


class PHDAttentionImpl(AttentionImpl[Batch]):
    """Attention of ``J`` copies' queries over originals and hidden copies.

    Args:
        num_heads: ``J`` times the query heads of this rank.
        num_kv_heads: ``G`` of this rank.
        policy: who sees what.
        hidden: name of the layer that has the hidden copies' cache.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        policy: KVPolicy | None = None,
        query_copies: int = 1,
        hidden: str = "",
    ) -> None:
        if kv_cache_dtype not in ("auto", "float16", "bfloat16", "float32"):
            raise ValueError(
                f"kv_cache_dtype={kv_cache_dtype!r}: hidden copies are cached as they are; leave it at auto"
            )
        self.kv_cache_dtype = kv_cache_dtype
        self.num_heads, self.head_size, self.num_kv_heads, self.scale = num_heads, head_size, num_kv_heads, scale
        self.policy, self.copies, self.hidden = policy, query_copies, hidden

    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Batch | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Cache the new entries and attend.

        Args:
            query: [T, G J r, d].
            key, value: [T K, G, d].
            output: [T, G J r, d], written in place.
        """
        assert self.policy is not None
        if attn_metadata is None:  # vLLM measures memory
            return output.zero_()
        batch = attn_metadata
        tokens, groups = batch.slots.size(0), self.num_kv_heads
        key, value = (x.unflatten(0, (-1, self.policy.repeat))[:tokens] for x in (key, value))  # [T, K, G, d]
        hidden_batch, _, hidden_cache, _ = get_attention_context(self.hidden)
        write(kv_cache, batch.slots, key[:, 0], value[:, 0])
        write(hidden_cache, hidden_batch.slots, key[:, 1:].flatten(1, 2), value[:, 1:].flatten(1, 2))

        query = query[:tokens].unflatten(1, (groups, -1))  # [T, G, J r, d]
        if current_platform.is_cuda():
            out, lse = flash_originals(query, kv_cache, batch, self.scale)
        else:
            out, lse = attend_originals(query, kv_cache, batch, self.scale)
        by_copy = (self.copies, -1)
        out, lse, query = out.unflatten(2, by_copy), lse.unflatten(2, by_copy), query.unflatten(2, by_copy)
        out = add_hidden(out, lse, query, hidden_cache, hidden_batch, self.policy, self.scale)
        output[:tokens] = out.flatten(1, 3).to(output.dtype)
        return output


def flash_originals(query: Tensor, cache: Tensor, batch: Batch, scale: float) -> tuple[Tensor, Tensor]:
    """:func:`attend_originals` with vLLM's FlashAttention. Not run yet: vLLM has not been on a GPU with this."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    keys, values = cache.transpose(1, 2).chunk(2, dim=-1)  # [blocks, block, G, d]
    out, lse = flash_attn_varlen_func(
        q=query.flatten(1, 2).contiguous(),
        k=keys,
        v=values,
        cu_seqlens_q=batch.starts,
        max_seqlen_q=batch.longest_query,
        seqused_k=batch.lengths,
        max_seqlen_k=batch.longest,
        softmax_scale=scale,
        causal=True,
        block_table=batch.blocks,
        return_softmax_lse=True,
    )
    return out.view(query.shape).float(), lse.transpose(0, 1).unflatten(1, query.shape[1:3])


class PHDAttentionBackend(AttentionBackend):
    """What vLLM asks about :class:`PHDAttentionImpl`."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    forward_includes_kv_cache_update: bool = True

    @staticmethod
    def get_name() -> str:
        """One of vLLM's names: that of a backend from outside."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[PHDAttentionImpl]:
        """What computes."""
        return PHDAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[PHDMetadataBuilder]:
        """What describes a batch."""
        return PHDMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        """FlashAttention wants sixteens of the originals; hidden entries are gathered one by one."""
        return [MultipleOf(1 if isinstance(kv_cache_spec, SlidingWindowSpec) else 16)]

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """The hidden copies' cache is one."""
        return True


class HiddenCache(Attention):
    """The cache of a layer's hidden copies; it never attends itself.

    Its pages are as large as the originals': a block has so many positions less as there are hidden copies, or the next
    smaller divisor of the originals' block, so that vLLM's prefixes end at common borders.
    """

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """Sliding window of ``min(W, C)`` positions."""
        whole = vllm_config.cache_config.block_size
        originals = FullAttentionSpec(
            block_size=whole,
            num_kv_heads=self.num_kv_heads // self.impl.copies,
            head_size=self.head_size,
            dtype=self.kv_cache_torch_dtype,
        )
        size = max((n for n in range(1, whole // self.impl.copies + 1) if whole % n == 0), default=1)
        spec = SlidingWindowSpec(
            block_size=size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=self.kv_cache_torch_dtype,
            sliding_window=self.sliding_window,
        )
        page = originals.page_size_bytes
        if spec.page_size_bytes < page:
            spec = SlidingWindowSpec(**{**vars(spec), "page_size_padded": page})
        return spec
