"""The next token of one row, chosen by that row's own numbers alone, whatever is computed beside it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """How a row's tokens are chosen and what is told of them.

    Attributes:
        temperature: logits are divided by it; 0 is the likeliest token each time.
        top_p: among the likeliest tokens that have this mass together.
        seed: of the row's own random numbers; None draws one.
        presence_penalty: taken from the logit of every token that the answer has.
        frequency_penalty: the same, once for each time that it has it.
        logit_bias: added to logits, by token.
        alternatives: how many of the likeliest tokens are told beside the chosen one; None tells no probabilities.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    alternatives: int | None = None


@dataclass(frozen=True)
class Told:
    """A token and its probability: natural logarithms, of the model itself (temperature 1, nothing added).

    ``likeliest`` holds other tokens, the likeliest first; ``offset`` is where the token's text begins in the answer,
    in characters.
    """

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...] = ()
    offset: int = 0


class Sampler:
    """Chooses one row's tokens."""

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        self.seen: Counter[int] = Counter()
        self._random = torch.Generator()  # on the CPU, so that a seed means the same on every device
        if choice.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(choice.seed)

    @property
    def is_plain(self) -> bool:
        """Whether the largest of the model's own logits is the choice."""
        choice = self.choice
        changed = choice.presence_penalty or choice.frequency_penalty or choice.logit_bias
        return choice.temperature == 0 and not changed

    def pick(self, logits: Tensor) -> Tensor:
        """The next token, a whole number on the device, by logits ``[vocabulary]``.

        In float64, and drawn along the vocabulary and not by rank: a last bit that another batch rounds differently
        moves the borders between tokens by as little, and never exchanges two of them.
        """
        scores = self._changed(logits.double())
        if self.choice.temperature == 0:
            return scores.argmax()
        mass = (scores / self.choice.temperature).softmax(-1)
        if self.choice.top_p < 1:
            ranked, order = mass.sort(descending=True)
            # A token stays while those before it have less than top_p, so the likeliest always does.
            beyond = ranked.cumsum(-1) - ranked >= self.choice.top_p
            mass = mass.masked_fill(torch.zeros_like(beyond).scatter(0, order, beyond), 0.0)
        borders = mass.cumsum(-1)
        drawn = torch.rand((), generator=self._random, dtype=torch.float64).to(borders.device) * borders[-1]
        # The first border above the number: a token without mass has that of the one before it, and is never met.
        last = mass.nonzero()[-1, 0]
        return torch.minimum(torch.searchsorted(borders, drawn, right=True), last)

    def took(self, token: int) -> None:
        """The row goes on with this token."""
        self.seen[token] += 1

    def _changed(self, scores: Tensor) -> Tensor:
        choice, changes = self.choice, dict(self.choice.logit_bias)
        if choice.presence_penalty or choice.frequency_penalty:
            for token, count in self.seen.items():
                taken = choice.presence_penalty + choice.frequency_penalty * count
                changes[token] = changes.get(token, 0.0) - taken
        if not changes:
            return scores
        where = torch.tensor(list(changes), device=scores.device)
        return scores.index_add(0, where, scores.new_tensor(list(changes.values())))


def told(logits: Tensor, tokens: Tensor, alternatives: int) -> list[Told]:
    """What the model thought of ``tokens`` ``[n]``, by its logits ``[n, vocabulary]`` before each of them."""
    found = []
    for part, wanted in zip(logits.split(256), tokens.split(256), strict=True):  # not all in float32 at once
        logprobs = part.float().log_softmax(-1)
        own = logprobs.gather(-1, wanted[:, None])[:, 0].tolist()
        best = logprobs.topk(min(alternatives, logprobs.size(-1)), dim=-1)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        rows = zip(wanted.tolist(), own, pairs, strict=True)
        found += [Told(token, value, tuple(zip(*pair, strict=True))) for token, value, pair in rows]
    return found
