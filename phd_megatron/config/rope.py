"""How RoPE's frequencies are changed for a longer context: what the fields say, and whether they fit together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from phd_megatron.config.schema import ModelConfig


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1's: waves longer than the old context are stretched, short ones are not, those between are blended.

    The constants are Megatron-Core's, which takes no others.
    """

    factor: float
    low_freq_factor: ClassVar[float] = 1.0
    high_freq_factor: ClassVar[float] = 4.0
    original: ClassVar[int] = 8192  #: positions of the old context


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071): stretched by turns in the old context; cosines and sines times ``attention_factor``."""

    factor: float
    original: int  #: positions of the old context
    beta_fast: float = 32.0  #: what turns more often stays as it was
    beta_slow: float = 1.0  #: what turns less often is stretched whole
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    round_range: bool = True  #: the dimensions between the two are rounded outwards to whole ones

    @property
    def attention_factor(self) -> float:
        """As Megatron-Core and transformers have it."""
        return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)

    def _mscale(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

    def mscale_for(self, attention_factor: float) -> float:
        """The ``mscale`` that gives it alone, without ``mscale_all_dim``.

        Raises:
            ValueError: there is none.
        """
        if self.factor <= 1 and attention_factor == 1:
            return 1.0
        if self.factor <= 1 or not 1 <= attention_factor < math.inf:
            raise ValueError(
                f"attention_factor={attention_factor!r} with factor={self.factor:g} is none that mscale gives: those "
                "are 1, or above 1 with a factor above 1"
            )
        return (attention_factor - 1) / (0.1 * math.log(self.factor))


Scaling: TypeAlias = Llama3 | Yarn


def scaling_of(model: ModelConfig) -> Scaling | None:
    """How a model's frequencies are changed; None where they are not."""
    if model.position_embedding_type == "yarn":
        assert model.yarn_rotary_scaling_factor is not None  # rope_problems
        assert model.yarn_original_max_position_embeddings is not None
        return Yarn(
            factor=model.yarn_rotary_scaling_factor,
            original=model.yarn_original_max_position_embeddings,
            beta_fast=model.yarn_beta_fast,
            beta_slow=model.yarn_beta_slow,
            mscale=model.yarn_mscale,
            mscale_all_dim=model.yarn_mscale_all_dim,
            round_range=model.yarn_correction_range_round_to_int,
        )
    return Llama3(model.rope_scaling_factor) if model.use_rope_scaling else None


def rope_problems(model: ModelConfig) -> Iterator[str]:
    """What is wrong with the fields together, one sentence each."""
    if model.position_embedding_type != "yarn":
        return
    for name in ("yarn_rotary_scaling_factor", "yarn_original_max_position_embeddings"):
        if getattr(model, name) is None:
            yield (
                f"position_embedding_type='yarn' without {name}, which has no default: it follows from the model that "
                "is stretched; set it, or use rope"
            )
    if model.use_rope_scaling:
        yield (
            "use_rope_scaling=True with position_embedding_type='yarn': each changes the frequencies in its own way; "
            "leave one of them out"
        )
    if model.yarn_beta_fast <= model.yarn_beta_slow:
        yield (
            f"yarn_beta_fast={model.yarn_beta_fast} is not above yarn_beta_slow={model.yarn_beta_slow}: what turns "
            "more often than the first stays as it was, and what turns less often than the second is stretched; "
            "raise the first"
        )
    if model.rotary_base <= 1:
        yield (
            f"rotary_base={model.rotary_base} with position_embedding_type='yarn': all dimensions turn alike, so none "
            "is slower than another; use a base above 1"
        )
