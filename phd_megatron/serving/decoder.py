"""Forward passes of a model whose rows come and go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from phd_megatron.errors import UserError
from phd_megatron.huggingface.loading import first_words
from phd_megatron.serving import row_cache

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


class Decoder:
    """A model, and the cache of the rows that it is computing.

    Attributes:
        joins: whether several rows can be in one pass; a few families of transformers keep a cache that allows none.

    Raises:
        UserError: for a model that keeps no cache, or cannot compute a token.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._cache: Cache | None = None
        self._lengths: list[int] = []
        self._name = "past_key_values"
        self.vocabulary: int = model.get_input_embeddings().num_embeddings
        try:
            with torch.inference_mode():
                cache = self._forward(torch.zeros(1, 1, dtype=torch.long), None, 1)[1]
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise UserError(
                f"the model cannot compute a token: {first_words(error)}; export it again, or use another one"
            ) from error
        if cache is None or not hasattr(cache, "layers"):
            raise UserError(f"{type(model).__name__} keeps no KV cache, and only models that do can be served")
        self.joins = row_cache.is_joinable(cache)

    @property
    def rows(self) -> int:
        """Rows in the cache."""
        return len(self._lengths)

    @torch.inference_mode()
    def prefill(self, prompt: Sequence[int], copies: int, every: bool) -> Tensor:
        """Add ``copies`` rows of one prompt, behind those that are there.

        Returns:
            Logits ``[1, vocabulary]`` of the next token, with ``every`` those after each token of the prompt, ``[n,
            vocabulary]``.
        """
        tokens = torch.tensor([list(prompt)])
        logits, cache = self._forward(tokens, None, 0 if every else 1)
        if copies > 1:
            cache.batch_repeat_interleave(copies)
        self._cache = cache if self._cache is None else row_cache.join([self._cache, cache])
        self._lengths += [len(prompt)] * copies
        return logits[0]

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Add one token to each row; logits ``[rows, vocabulary]`` of the next ones."""
        cache = self._cache
        assert cache is not None  # of rows
        self._lengths = [length + 1 for length in self._lengths]
        return self._forward(torch.tensor(tokens)[:, None], cache, 1)[0][:, -1]

    def keep(self, rows: Sequence[int]) -> None:
        """Leave these rows, by their number, and forget the others."""
        if len(rows) == self.rows:
            return
        self._lengths = [self._lengths[row] for row in rows]
        if not rows or self._cache is None:
            self._cache = None
            return
        with torch.inference_mode():
            row_cache.keep(self._cache, rows, self._lengths)

    def _forward(self, tokens: Tensor, cache: Cache | None, wanted: int) -> tuple[Tensor, Cache]:
        """Logits and cache after ``tokens`` ``[b, n]``; ``wanted`` logits at the end, 0 for all."""
        device = self._model.device
        places = {}
        if cache is not None and not row_cache.is_phd(cache):
            slots = cache.get_seq_length() + tokens.size(1)
            places["attention_mask"] = row_cache.attention_mask(self._lengths, slots, device)
            places["position_ids"] = torch.tensor(self._lengths, device=device)[:, None] - 1
        given = {} if cache is None else {self._name: cache}
        output = self._model(input_ids=tokens.to(device), use_cache=True, logits_to_keep=wanted, **places, **given)
        # transformers 5.24 calls it `cache`, in arguments too; earlier versions, `past_key_values`.
        self._name = "cache" if "cache" in output else "past_key_values"
        return output.logits, output.get(self._name)
