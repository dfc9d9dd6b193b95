"""``PHDForCausalLM`` in vLLM: the exports' model, of vLLM's parallel layers.

vLLM sees one token at a position. Inside, the state is ``[T, K, h]``: originals and hidden copies of ``T`` tokens. All
copies of a prompt are computed, since vLLM may cut it anywhere and other prompts may begin with it; the last layer
computes the last copy alone. Norms, RoPE, routing and where a block normalises are the exported code's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from phd_megatron.huggingface.installed import bundled
from phd_megatron.norm.schemes import BlockNorm, norm_plan, norm_scheme
from phd_megatron.phd.copy_positions import rotary_positions
from phd_megatron.phd.kv_policy import KVPolicy
from phd_megatron.serving.vllm.backend import HiddenCache, PHDAttentionBackend
from phd_megatron.serving.vllm.experts import PHDExperts
from phd_megatron.serving.vllm.feed_forward import PHDMLP
from phd_megatron.serving.vllm.weights import load

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sequence import IntermediateTensors

_MODEL, _ROTARY = bundled("modeling_phd"), bundled("rotary_phd")
if TYPE_CHECKING:
    from phd_megatron.huggingface.bundle.modeling_phd import PHDAttention as ExportedAttention
    from phd_megatron.huggingface.bundle.modeling_phd import PHDDecoderLayer as ExportedLayer
else:
    ExportedAttention, ExportedLayer = _MODEL.PHDAttention, _MODEL.PHDDecoderLayer


@dataclass(frozen=True)
class Rows:
    """Which copies leave a layer, in the place of the exported code's rows.

    Attributes:
        copies: ``K``, or 1 for the last one alone.
        table: cosines and sines [T, K, 1, rotary].
    """

    copies: int
    table: tuple[Tensor, Tensor]

    def select(self, states: Tensor) -> Tensor:
        """The copies that leave, of ``[T, K, ...]``."""
        return states[:, -self.copies :]


class PHDAttention(ExportedAttention):
    """Grouped-query attention of a token's copies.

    Args:
        query_copies: copies whose output is wanted: ``K``, or 1 for the last one alone.
    """

    def __init__(self, vllm_config: VllmConfig, block: BlockNorm, index: int, query_copies: int, prefix: str) -> None:
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_config
        policy: KVPolicy = config.kv_policy()
        d, bias = config.head_dim, config.attention_bias
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        self.qkv_proj = QKVParallelLinear(config.hidden_size, d, heads, groups, bias=bias, prefix=f"{prefix}.qkv_proj")
        self.o_proj = RowParallelLinear(
            heads * d, config.hidden_size, bias=config.attention_output_bias, prefix=f"{prefix}.o_proj"
        )
        self.heads, self.groups, self.head_dim = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads, d
        self.add_norms(config, block)
        if self.full_width and get_tensor_model_parallel_world_size() > 1:
            raise ValueError(
                f"norm_scheme={config.norm_scheme!r} norms all heads at once, which are on "
                f"{get_tensor_model_parallel_world_size()} GPUs; use --tensor-parallel-size 1"
            )
        shared = {"head_size": d, "scale": d**-0.5, "quant_config": vllm_config.quant_config}
        cache = vllm_config.cache_config
        if policy.repeat == 1:
            name = f"{prefix}.attn"
            self.attn = Attention(self.heads, num_kv_heads=self.groups, cache_config=cache, prefix=name, **shared)
            return
        # vLLM sorts layers by the number in their names, and each has one; the caches of hidden copies come behind.
        names = f"{prefix}.attn", f"model.layers.{index + config.num_hidden_layers}.hidden"
        how = {"attn_backend": PHDAttentionBackend, "policy": policy, "hidden": names[1], **shared}
        self.attn = Attention(
            query_copies * self.heads,
            num_kv_heads=self.groups,
            cache_config=cache,
            prefix=names[0],
            query_copies=query_copies,
            **how,
        )
        hidden = policy.repeat - 1
        self.hidden = HiddenCache(
            hidden * self.groups,
            num_kv_heads=hidden * self.groups,
            cache_config=replace(cache, sliding_window=policy.span),
            prefix=names[1],
            query_copies=hidden,
            **how,
        )

    def forward(  # type: ignore[override]  # vLLM has the cache
        self, hidden: Tensor, rows: Rows, cache: None, layer_index: int
    ) -> Tensor:
        """``[T, K, h]`` to ``[T, J, h]``."""
        sizes = [self.heads * self.head_dim, self.groups * self.head_dim, self.groups * self.head_dim]
        query, key, value = self.qkv_proj(hidden)[0].split(sizes, dim=-1)
        query = self._heads(rows.select(query), self.q_norm)
        key = self._heads(key, self.k_norm)
        value = self.v_norm(value.unflatten(-1, (-1, self.head_dim)))
        cos, sin = rows.table
        query = _ROTARY.apply_rotary(query, (rows.select(cos), rows.select(sin)))
        key = _ROTARY.apply_rotary(key, rows.table)
        # All copies' queries of a KV head side by side, as grouped attention reads them: [T, G, J, r, d]
        query = query.unflatten(2, (self.groups, -1)).transpose(1, 2)
        context = self.attn(query.flatten(1), key.flatten(1), value.flatten(1))
        context = context.view(query.shape).transpose(1, 2).flatten(2, 3)  # [T, J, heads, d]
        return self.o_proj(self.c_norm(context).flatten(2))[0]


class PHDDecoderLayer(ExportedLayer):
    """The exported block, of vLLM's layers; ``copies`` leave it."""

    def __init__(self, vllm_config: VllmConfig, block: BlockNorm, index: int, copies: int, prefix: str) -> None:
        nn.Module.__init__(self)  # and not its own, which makes whole layers
        config = vllm_config.model_config.hf_config
        self.block, self.layer_index = block, index
        self.self_attn = PHDAttention(vllm_config, block, index, copies, f"{prefix}.self_attn")
        name = f"{prefix}.mlp"
        experts = config.has_experts(index)
        mlp = PHDExperts(config, name) if experts else PHDMLP(config, config.intermediate_size, name)
        self.mlp = mlp  # type: ignore[assignment]  # another class's, called alike
        self.add_norms(config, block)


class PHDModel(nn.Module):
    """The decoder without the head."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = self.config = vllm_config.model_config.hf_config
        config.check()
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
        )
        self.embed_norm = _MODEL.make_norm(config) if norm_scheme(config.norm_scheme).embed_norm else nn.Identity()
        vector = config.phd_copy_embedding == "vector" and config.phd_repeat > 1
        self.copy_embedding = _MODEL.PHDCopyEmbedding(config) if vector else None
        plan = norm_plan(config.norm_scheme, config.num_hidden_layers)
        self.leaving = [config.phd_repeat] * (len(plan) - 1) + [1]  # copies that leave each layer
        self.layers = nn.ModuleList(
            PHDDecoderLayer(vllm_config, block, index, copies, f"{prefix}.layers.{index}")
            for index, (block, copies) in enumerate(zip(plan, self.leaving, strict=True))
        )
        self.norm = _MODEL.make_norm(config)

    def forward(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        """``[T, h]`` at positions ``[T]`` to the last copy's states ``[T, h]``."""
        config = self.config
        hidden = self.embed_norm(embeddings)[:, None].repeat(1, config.phd_repeat, 1)  # [T, K, h]
        if self.copy_embedding is not None:
            hidden[:, 1:] += self.copy_embedding.weight
        copy = torch.arange(1, config.phd_repeat + 1, device=positions.device)
        turned = rotary_positions(positions[:, None], copy, config.phd_repeat, config.phd_copy_positions)
        table = _ROTARY.rotary_table(config, turned, hidden.dtype)
        for layer, copies in zip(self.layers, self.leaving, strict=True):
            hidden = layer(hidden, Rows(copies, table))
        return self.norm(hidden[:, -1])


class PHDForCausalLM(nn.Module):
    """What vLLM makes for an export of ours."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = self.config = vllm_config.model_config.hf_config
        self.model = PHDModel(vllm_config, f"{prefix}.model" if prefix else "model")
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix="lm_head")
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """``[T]`` to ``[T, h]``."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Last copy's states ``[T, h]`` of tokens at their positions in their sequences."""
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed_input_ids(input_ids)
        return self.model(inputs_embeds, positions)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """``[rows, h]`` to ``[rows, vocabulary]``."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Read an export's tensors; says which parameters are set."""
        return load(self, weights, self.config.tie_word_embeddings, self.config.num_experts)
