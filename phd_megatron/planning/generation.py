"""The least that a prompt or a decoding step takes: operations, and bytes that have to move.

Conventions as in :mod:`~phd_megatron.planning.flops`: a multiply-add is two operations, attention counts the pairs that
:class:`KVPolicy` shows, norms, RoPE, softmax and look-ups are not counted. Hidden copies are computed where the wanted
logits see them (the prefill cone), and the last layer computes the last copy of the last token alone, as exports do.
Bytes: every weight that is multiplied once, and each key and value that is in the cache before or after, once.
"""

from __future__ import annotations

from dataclasses import dataclass

from phd_megatron.config.architecture import Architecture


@dataclass(frozen=True)
class Work:
    """Of one pass over all sequences.

    Attributes:
        linear, attention: operations.
        weights, originals, hidden: bytes.
    """

    linear: int
    attention: int
    weights: int
    originals: int
    hidden: int

    @property
    def flops(self) -> int:
        """All operations."""
        return self.linear + self.attention

    @property
    def bytes(self) -> int:
        """All bytes."""
        return self.weights + self.originals + self.hidden


def pass_work(a: Architecture, vocab_size: int, *, past: int, new: int, batch: int = 1, element: int = 2) -> Work:
    """A pass over ``new`` tokens of each sequence behind ``past`` cached ones, for the logits after the last one.

    Args:
        a: of a dense model.
        element: bytes of a number.
    """
    if a.moe is not None:
        raise ValueError("which experts' weights a pass reads depends on its tokens; this counts dense models")
    policy, layers, end = a.policy, a.num_layers, past + new
    copies, wanted = policy.repeat - 1, end - 1
    # First position whose hidden copies go into each layer; behind the last layer there is the wanted one.
    starts = [max(policy.cone_start(wanted, number, layers), past) for number in range(1, layers + 1)]
    query, key = a.heads * a.head_dim, a.groups * a.head_dim
    ffn = a.hidden_size * a.ffn_hidden_size * (3 if a.gated else 2)
    entry = 2 * key * element
    linear = 2 * a.hidden_size * vocab_size
    attention = originals = hidden = 0
    for layer, start in enumerate(starts):
        rows = new + copies * (end - start)
        last = layer == layers - 1
        leaving = 1 if last else new + copies * (end - starts[layer + 1])
        linear += 2 * (rows * a.hidden_size * 2 * key + leaving * (2 * a.hidden_size * query + ffn))
        attention += 4 * query * (_last_pairs(a, wanted) if last else _pairs(a, past, end, starts[layer + 1]))
        originals += entry * end
        if copies:
            kept = past - policy.retained_from(past) if past else 0
            hidden += entry * copies * (kept + end - start)
    matrices = layers * (2 * a.hidden_size * (query + key) + ffn) + a.hidden_size * vocab_size
    return Work(batch * linear, batch * attention, element * matrices, batch * originals, batch * hidden)


def _pairs(a: Architecture, first: int, end: int, hidden_from: int) -> int:
    """Pairs of queries that are originals from ``first`` on, and hidden copies from ``hidden_from`` on."""
    repeat = a.policy.repeat
    seen = (first + 1 + end) * (end - first) // 2
    if repeat == 1:
        return seen
    of_all, hidden = a.policy.pairs(end, slices=(range(hidden_from, end),))
    return seen + of_all * (repeat - 1) // repeat + hidden


def _last_pairs(a: Architecture, wanted: int) -> int:
    return sum(a.policy.pairs(wanted + 1, 1, (range(wanted, wanted + 1),)))
