"""PHD-Transformer with HybridNorm-family norms, for transformers 5.

Every token is repeated ``K`` times inside the decoder (arXiv 2504.14992): copy 1 is the original, whose hidden states
are a vanilla transformer's; the last copy gives the logits. ``kv_policy.py`` says what each copy sees,
``norm_schemes.py`` where each block normalises (arXiv 2503.04598), ``rows_phd.py`` which copies a forward pass has to
compute.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .cache_phd import PHDCache
from .configuration_phd import PHDConfig
from .feed_forward_phd import PHDMLP, PHDExperts, PHDRouter
from .norm_schemes import BlockNorm, SublayerNorm, norm_plan, norm_scheme
from .rotary_phd import apply_rotary, rotary_tables
from .rows_phd import LayerRows, StepRows, kept_slots, packed_documents

# transformers 5.24 calls the cache `cache`, in arguments and outputs; earlier versions, `past_key_values`.
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


class PHDRMSNorm(nn.Module):
    """RMSNorm over the last dimension, computed and scaled in float32 or better, as in training."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, self.weight.shape, self.weight, self.eps)


def make_norm(config: PHDConfig, size: int | None = None) -> nn.Module:
    """The configured kind of norm; ``size`` defaults to the model width."""
    kind = PHDRMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
    return kind(config.hidden_size if size is None else size, eps=config.rms_norm_eps)


class PHDAttention(nn.Module):
    """Grouped-query attention over copy-major rows, with the scheme's q/k/v/c norms."""

    def __init__(self, config: PHDConfig, block: BlockNorm):
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_output_bias)
        self.add_norms(config, block)

    def add_norms(self, config: PHDConfig, block: BlockNorm) -> None:
        """Those of q, k, v and the context, of heads or of the full width."""
        self.full_width = block.qk_norm_width == "full"
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads} if self.full_width else {}
        widths = {name: count * config.head_dim for name, count in heads.items()}

        def norm(name: str) -> nn.Module:
            return make_norm(config, widths.get(name, config.head_dim)) if name in block.heads else nn.Identity()

        self.q_norm, self.k_norm, self.v_norm, self.c_norm = (norm(name) for name in "qkvc")

    def _heads(self, projected: Tensor, norm: nn.Module) -> Tensor:
        """``[b, rows, heads * d]`` to ``[b, rows, heads, d]``, normed before or after it is cut into heads."""
        heads = (-1, self.head_dim)
        return norm(projected).unflatten(-1, heads) if self.full_width else norm(projected.unflatten(-1, heads))

    def forward(self, hidden: Tensor, rows: LayerRows, cache: PHDCache | None, layer_index: int) -> Tensor:
        """``[b, rows.in, h]`` to ``[b, rows.out, h]``."""
        query = self._heads(self.q_proj(rows.select(hidden)), self.q_norm)
        key = self._heads(self.k_proj(hidden), self.k_norm)
        value = self.v_norm(self.v_proj(hidden).unflatten(-1, (-1, self.head_dim)))
        query_table, key_table = rotary_tables(self.config, rows, query)
        query, key = apply_rotary(query, query_table), apply_rotary(key, key_table)
        keys, values = key.transpose(1, 2), value.transpose(1, 2)
        if cache is not None:
            keys, values = cache.update(keys, values, layer_index, rows.step.cache_step)
        if rows.is_full:
            context = rows.attend_full(query, key, value, reference=self.config._attn_implementation == "eager")
        else:
            context = rows.attend(query.transpose(1, 2), keys, values)
        return self.o_proj(self.c_norm(context).flatten(2))


def join(residual: Tensor, output: Tensor, norms: SublayerNorm, norm: nn.Module) -> Tensor:
    """A sublayer's residual and output, as its record says; ``norm`` is the one after the sublayer, if any."""
    if norms.residual_scale != 1:
        residual = residual * norms.residual_scale
    return residual + norm(output) if norms.output_norm == "branch" else norm(residual + output)


class PHDDecoderLayer(GradientCheckpointingLayer):
    """One block; its norms and residuals come from one record of the norm plan."""

    def __init__(self, config: PHDConfig, block: BlockNorm, layer_index: int):
        super().__init__()
        self.block = block
        self.layer_index = layer_index
        self.self_attn = PHDAttention(config, block)
        self.mlp = PHDExperts(config) if config.has_experts(layer_index) else PHDMLP(config, config.intermediate_size)
        self.add_norms(config, block)

    def add_norms(self, config: PHDConfig, block: BlockNorm) -> None:
        """Those around both sublayers."""

        def norm(wanted: bool) -> nn.Module:
            return make_norm(config) if wanted else nn.Identity()

        self.input_layernorm = norm(block.attention.input_norm)
        self.attention_output_layernorm = norm(block.attention.output_norm is not None)
        self.post_attention_layernorm = norm(block.mlp.input_norm)
        self.mlp_output_layernorm = norm(block.mlp.output_norm is not None)

    def forward(self, hidden: Tensor, rows: LayerRows, cache: PHDCache | None = None) -> Tensor:
        """``[b, rows.in, h]`` to ``[b, rows.out, h]``."""
        normed = self.input_layernorm(hidden)
        norms = self.block.attention
        residual = rows.select(normed if norms.residual == "normed" else hidden)
        output = self.self_attn(normed, rows, cache, self.layer_index)
        hidden = join(residual, output, norms, self.attention_output_layernorm)
        normed = self.post_attention_layernorm(hidden)
        norms = self.block.mlp
        residual = normed if norms.residual == "normed" else hidden
        return join(residual, self.mlp(normed), norms, self.mlp_output_layernorm)


class PHDCopyEmbedding(nn.Module):
    """A vector for each of copies 2 to ``K``, added after the embedding; zero in a new model."""

    def __init__(self, config: PHDConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.phd_repeat - 1, config.hidden_size))

    def forward(self, step: StepRows, embeddings: Tensor) -> Tensor:
        """``[b, n, h]`` to the rows the first layer reads."""
        return step.first_rows(embeddings, self.weight)


class PHDPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the family."""

    config_class = PHDConfig
    config: PHDConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PHDDecoderLayer"]  # noqa: RUF012 (transformers reads a plain list)
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this for parameters that a checkpoint lacks; `init` leaves loaded ones alone.
        if isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, PHDCopyEmbedding):
            init.zeros_(module.weight)
        elif isinstance(module, PHDRouter):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.e_score_correction_bias is not None:
                init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, (PHDRMSNorm, nn.LayerNorm)):
            init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)


class PHDModel(PHDPreTrainedModel):
    """Decoder without the head. ``last_hidden_state`` and ``hidden_states`` are the last copy's."""

    def __init__(self, config: PHDConfig):
        config.check()
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_norm = make_norm(config) if norm_scheme(config.norm_scheme).embed_norm else nn.Identity()
        self.copy_embedding: PHDCopyEmbedding | None = None
        if config.phd_copy_embedding == "vector" and config.phd_repeat > 1:
            self.copy_embedding = PHDCopyEmbedding(config)
        plan = norm_plan(config.norm_scheme, config.num_hidden_layers)
        self.layers = nn.ModuleList(PHDDecoderLayer(config, block, index) for index, block in enumerate(plan))
        self.norm = make_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PHDCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: PHDCache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Run the decoder over ``n`` new tokens of ``b`` sequences.

        Args:
            input_ids: [b, n]; or ``inputs_embeds`` [b, n, h].
            attention_mask: [b, p + n], 0 for padding on either side, ``p`` being the cached slots.
            position_ids: [b, n]; default from the mask and the cache. They count up by one in each sequence; or,
                without a cache, begin again at 0 with each document of a row, and no document sees another.
            cu_seq_lens_q: borders of the documents of one row, from 0 to n, instead of position ids that begin again.
            past_key_values, cache: a :class:`PHDCache` to continue, by the name of either generation of transformers.
            output_hidden_states: also return the last copy's states before each layer and after the final norm.
            logits_to_keep: as in :class:`PHDForCausalLM`; the rows before the first wanted slot are not computed.

        Raises:
            ValueError: for inputs this model cannot serve exactly.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions=True: attention weights are never materialised; leave it out")
        config = self.config
        use_cache = config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if past_key_values is not None and cache is not None:
            raise ValueError("past_key_values and cache are two names of one argument; give one of them")
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, PHDCache):
            raise ValueError(
                f"the cache is a {type(cache).__name__}, which has no place for hidden copies; "
                "leave it out or pass PHDCache(model.config), which model.make_cache() builds"
            )
        hidden = self.embed_norm(self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds)
        documents = None
        if cache is None or not cache.get_seq_length():
            documents = packed_documents(attention_mask, position_ids, cu_seq_lens_q, (hidden.size(0), hidden.size(1)))
        if use_cache and cache is None and documents is None:
            cache = PHDCache(config)
        step = StepRows.plan(
            config.kv_policy(),
            config.num_hidden_layers,
            hidden,
            attention_mask,
            position_ids,
            cache,
            0 if output_hidden_states else logits_to_keep,
            documents,
        )
        hidden = step.first_rows(hidden) if self.copy_embedding is None else self.copy_embedding(step, hidden)
        states = []
        for index, layer in enumerate(self.layers):
            rows = step.layer(index)
            if output_hidden_states:
                states.append(rows.last_copy(hidden))
            hidden = layer(hidden, rows, cache=cache)
        hidden = self.norm(hidden)
        if cache is not None and step.cache_step is not None:
            cache.end(step.cache_step)
        if output_hidden_states:
            states.append(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=tuple(states) if output_hidden_states else None,
            **{CACHE: cache},
        )

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value


class PHDForCausalLM(PHDPreTrainedModel, GenerationMixin):
    """The decoder with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: PHDConfig):
        super().__init__(config)
        self.model = PHDModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def make_cache(self) -> PHDCache:
        """An empty cache, to keep between calls."""
        return PHDCache(self.config)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PHDCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: PHDCache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token, and the mean loss when ``labels`` [b, n] are given (-100 is ignored).

        Args:
            logits_to_keep: 0 for all slots, ``m`` for the last ``m``, or a tensor of slot indices. Only what these
                logits need is computed (the prefill cone), so prefer it to slicing the result.

        The other arguments are those of :class:`PHDModel`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            logits_to_keep=logits_to_keep,
            cu_seq_lens_q=kwargs.pop("cu_seq_lens_q", None),
        )
        given = inputs_embeds if input_ids is None else input_ids
        assert given is not None  # the decoder refused it otherwise
        logits = self.lm_head(kept_slots(outputs.last_hidden_state, logits_to_keep, given.size(1)))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE: outputs.get(CACHE)},
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: this model generates with its own "
                "PHDCache, as small as vanilla's; leave cache_implementation out"
            )
        mask = model_kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and not bool(mask[:, -1].all()):
            raise ValueError(
                "the prompts are padded on the right, where the next token is read from; pad on the left "
                "(tokenizer.padding_side='left'). Forward passes take either side"
            )
        if model_kwargs.get(CACHE) is None and generation_config.use_cache:
            model_kwargs[CACHE] = self.make_cache()


__all__ = ["PHDCache", "PHDForCausalLM", "PHDModel", "PHDPreTrainedModel"]
