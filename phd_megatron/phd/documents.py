"""Documents that lie one after the other in a sample, and know nothing of each other.

They are described by ``starts``: for each token the position, in the sample, of the first token of its document. That
is what the loader makes, what travels through the model in the place of an attention mask, and what attention reads;
it stays on the host. Needs torch alone, since it also ships inside an exported Hugging Face model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def starts_of_tokens(tokens: Tensor, end: int) -> Tensor:
    """``starts`` ``[..., s]`` int64 of ``tokens [..., s]``: a document ends with its token ``end``, as in Megatron."""
    first = torch.zeros_like(tokens, dtype=torch.bool)
    first[..., 1:] = tokens[..., :-1] == end
    return starts_of_first(first)


def starts_of_first(first: Tensor) -> Tensor:
    """The same of bool ``[..., s]``: whether a token is the first of its document. A sample's first token always is."""
    places = torch.arange(first.size(-1), device=first.device).expand(first.shape)
    return torch.where(first, places, 0).cummax(-1).values


def starts_of_borders(borders: Sequence[int]) -> Tensor:
    """The same ``[s]`` of the borders between the documents of one sample, from 0 to s."""
    lengths = [stop - start for start, stop in pairwise(borders)]
    return torch.tensor(borders[:-1]).repeat_interleave(torch.tensor(lengths))


def positions_in_documents(starts: Tensor) -> Tensor:
    """Positions ``[..., s]`` counted from each document's start."""
    return torch.arange(starts.size(-1), device=starts.device) - starts


def document_lengths(starts: Tensor) -> list[int]:
    """Of the documents of one sample, ``starts [s]``; the host reads them."""
    borders = [*starts.unique_consecutive().tolist(), starts.numel()]
    return [stop - start for start, stop in pairwise(borders)]
