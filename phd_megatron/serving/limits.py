"""How much a server takes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from phd_megatron.errors import UserError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MOST_ROWS, _MOST_WAITING, _MOST_BODY = 4096, 1_000_000, 1 << 30
#: bytes that the smallest body with a prompt may need
_LEAST_BODY = 1024


@dataclass(frozen=True)
class Limits:
    """What is refused beyond.

    Attributes:
        max_model_len: tokens of prompt and answer together.
        max_batch_size: rows that one forward pass computes.
        max_queue: rows that wait beside those.
        max_body_bytes: of one request.
    """

    max_model_len: int
    max_batch_size: int = 32
    max_queue: int = 256
    max_body_bytes: int = 4 << 20

    @property
    def rows(self) -> int:
        """Rows that may run and wait at all."""
        return self.max_batch_size + self.max_queue


def check_amounts(max_batch_size: int, max_queue: int, max_body_bytes: int, shutdown_seconds: float) -> None:
    """Refuse numbers that cannot be, before a model is loaded.

    Raises:
        UserError: with the flag, its value and its range.
    """
    for flag, value, low, high in (
        ("--max-batch-size", max_batch_size, 1, _MOST_ROWS),
        ("--max-queue", max_queue, 0, _MOST_WAITING),
        ("--max-body-bytes", max_body_bytes, _LEAST_BODY, _MOST_BODY),
        ("--shutdown-seconds", shutdown_seconds, 0, 86_400),
    ):
        if not low <= value <= high:
            raise UserError(f"{flag} {shown(value)}: it must be at least {low:,} and at most {high:,}")


def model_length(model: PreTrainedModel, asked: int | None) -> int:
    """Tokens of the longest text: what was ``asked`` for, else all that the model was made for.

    Raises:
        UserError: for more than that, or less than a prompt and its answer have.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    trained = positions if isinstance(positions, int) and positions > 0 else None
    if asked is None:
        if trained is None:
            raise UserError("the model's config.json does not say how long a text may be; give --max-model-len")
        return trained
    if asked < 2:
        raise UserError(f"--max-model-len {asked}: a token of a prompt and one of the answer are 2; use at least 2")
    if trained is not None and asked > trained:
        raise UserError(
            f"--max-model-len {asked}: the model was made for {trained} positions (max_position_embeddings), and says "
            "nothing of use beyond; use at most that"
        )
    return asked
