"""The GPT model with K copies of every token inside the decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from phd_megatron.errors import UserError
from phd_megatron.kernels.cross_entropy import cross_entropy
from phd_megatron.kernels.qkv_rope import rope_table
from phd_megatron.kernels.triton_support import runs_on_gpu
from phd_megatron.model.copy_embedding import CopyEmbedding
from phd_megatron.model.layer_modules import wide_norm
from phd_megatron.model.rotary import rotary_frequencies
from phd_megatron.phd.copies import join_copies, last_copy, repeat_tokens, split_copies
from phd_megatron.phd.copy_positions import rotary_positions
from phd_megatron.phd.documents import starts_of_borders

if TYPE_CHECKING:
    from megatron.core.inference.contexts import BaseInferenceContext
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear


class PHDGPTModel(GPTModel):
    """``GPTModel`` that repeats tokens after the embedding (PHD-Transformer, Sec. 2).

    The copies are dropped inside the last decoder layer, or before the head where it has a pipeline stage of its own,
    so the final norm, the head and the loss see the last copy only; with ``config.keep_copies`` they see all of them,
    and the losses are ``[K, b, s]``, those of the last copy last. ``vocab_size`` is the padded one; logits beyond
    ``true_vocab_size`` are minus infinity everywhere. A norm follows the embedding where the scheme has one, and then
    copies 2 to K get a vector each where the configuration says so.

    Args:
        true_vocab_size: tokens of the tokenizer.
        kwargs: as :class:`megatron.core.models.gpt.GPTModel`.
    """

    def __init__(self, *, true_vocab_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.repeat = self.config.kv_policy.repeat
        # of the tensor-parallel group, whose rows attention and the head gather
        self.ranks = self.pg_collection.tp.size() if self.config.sequence_parallel else 1
        if self.pre_process and self.config.embed_norm:
            self.embed_norm = wide_norm(self.config)
        self.copy_embedding: CopyEmbedding | None = None
        if self.pre_process and self.config.copy_embedding == "vector":
            self.copy_embedding = CopyEmbedding(self.config)
        self.frequencies, self.attention_factor = rotary_frequencies(self)
        self.rotary_pos_emb_cache: dict[int, Tensor] = {}
        if self.post_process:
            _mask_vocabulary_padding(self.output_layer, true_vocab_size)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor] | None) -> None:
        """Rows of the stage before, ``[K * s, b, h]``; a stage with the head alone goes on with ``[s, b, h]``."""
        super().set_input_tensor(input_tensor)
        if self.decoder.input_tensor is not None and self.config.copies_dropped_at_head and not self.decoder.layers:
            self.decoder.set_input_tensor(last_copy(self.decoder.input_tensor, self.repeat))

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As Megatron-Core's.

        Args:
            attention_mask: ``[b, s]`` int64 on the host: where the document of each token begins, if documents are kept
                apart (:mod:`phd_megatron.phd.documents`); None otherwise.
            packed_seq_params: instead of it, ``cu_seqlens_q`` of the documents of one sample (``b = 1``).
        """
        if packed_seq_params is not None:
            attention_mask = _starts_of(packed_seq_params, input_ids)
        output: Tensor = super().forward(input_ids, position_ids, attention_mask, *args, **kwargs)
        return output

    def _preprocess(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        decoder_input: Tensor | None = None,
        inference_context: BaseInferenceContext | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Embeds and repeats on the first stage; lays out RoPE for every stage."""
        if inference_context is not None or packed_seq_params is not None or padding_mask is not None:
            raise UserError(
                "Megatron-Core's inference contexts, packed sequences inside its schedules and padding masks are not "
                "supported by the PHD model; generate from an export instead (phd-megatron generate)"
            )
        if decoder_input is None and self.pre_process:
            embedded = self.embedding(input_ids=input_ids, position_ids=position_ids)
            if self.config.embed_norm:
                embedded = self.embed_norm(embedded)
            decoder_input = (
                repeat_tokens(embedded, self.repeat) if self.copy_embedding is None else self.copy_embedding(embedded)
            )
        rows: Tensor = decoder_input if decoder_input is not None else self.decoder.input_tensor
        table = None
        if self.decoder.layers and self.config.reset_position_ids:
            table = self._table_of(position_ids.t().to(rows.device))
        elif self.decoder.layers:
            table = self._rotary_table(rows.size(0), rows.device)
        return decoder_input, table, None, None, None, None

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Losses ``[b, s]`` of ``labels [b, s]`` under ``logits [s, b, V / tp]``: on a GPU without float32 logits.

        Megatron-Core's fused losses run where ``cross_entropy_loss_fusion`` asks for them. Of kept copies there are
        losses ``[K, b, s]``, of logits ``[K * s, b, V / tp]``.
        """
        if not self.config.keep_copies:
            return self._losses(labels, logits)
        copies = labels.transpose(0, 1).expand(self.repeat, -1, -1)  # [K, s, b]
        losses = self._losses(join_copies(copies, self.ranks).transpose(0, 1), logits)  # [b, ranks*K*s_rank]
        return split_copies(losses.transpose(0, 1), self.repeat, self.ranks).transpose(1, 2).contiguous()

    def _losses(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Losses ``[b, rows]`` of ``labels [b, rows]`` under ``logits [rows, b, V / tp]``."""
        if self.config.cross_entropy_loss_fusion or not runs_on_gpu(logits.device, logits.dtype):
            return super().compute_language_model_loss(labels, logits)
        losses = cross_entropy(logits.contiguous(), labels.transpose(0, 1).contiguous(), self.pg_collection.tp)
        return losses.transpose(0, 1).contiguous()

    def _rotary_table(self, rows: int, device: torch.device) -> Tensor:
        """RoPE table for attention's rows ``[ranks, K, s_rank]``; positions are those of the whole sequence."""
        if rows not in self.rotary_pos_emb_cache:
            config, group = self.config, self.pg_collection.cp
            length = rows // self.repeat * self.ranks * group.size()
            slices = config.kv_policy.context_parallel_slices(length, group.size(), group.rank())
            tokens = torch.cat([torch.arange(part.start, part.stop, device=device) for part in slices])
            self.rotary_pos_emb_cache = {rows: self._table_of(tokens[:, None])}
        return self.rotary_pos_emb_cache[rows]

    def _table_of(self, tokens: Tensor) -> Tensor:
        """RoPE table ``[2, ranks*K*s_rank, b, 1, hn/2]`` of token positions ``[s, b]``, or of ``[s, 1]`` for any b."""
        copies = torch.arange(1, self.repeat + 1, device=tokens.device)[:, None, None]
        positions = rotary_positions(tokens, copies, self.repeat, self.config.copy_positions)  # [K, s, b]
        angles = positions[..., None, None] * self.frequencies.to(tokens.device)
        angles = join_copies(torch.cat([angles, angles], -1), self.ranks)  # [ranks*K*s_rank, b, 1, hn]
        return rope_table(angles, self.config.params_dtype, self.attention_factor)


def _starts_of(packed: PackedSeqParams, input_ids: Tensor) -> Tensor:
    """Where documents begin, of Megatron-Core's description of them."""
    borders = packed.cu_seqlens_q.tolist()
    if input_ids.size(0) != 1 or borders[0] != 0 or borders[-1] != input_ids.size(1):
        raise UserError(
            f"packed_seq_params with cu_seqlens_q {borders} and input_ids {tuple(input_ids.shape)}: packed sequences "
            "are one sample, [1, s], whose documents fill it from 0 to s"
        )
    return starts_of_borders(borders)[None]


def _mask_vocabulary_padding(output_layer: nn.Module, true_vocab_size: int) -> None:
    """Set the logits of padding rows to minus infinity, in loss, evaluation and generation alike.

    In place and outside autograd: the loss gives such a logit a gradient of exactly zero by itself.
    """

    def mask(module: ColumnParallelLinear, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor | None]) -> None:
        logits = outputs[0]
        first = 0 if module.gather_output else module.tp_group.rank() * logits.size(-1)
        with torch.no_grad():
            logits[..., max(true_vocab_size - first, 0) :].fill_(float("-inf"))

    output_layer.register_forward_hook(mask)
