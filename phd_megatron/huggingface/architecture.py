"""What a decoder is, in the words that a run's configuration and a Hugging Face directory share."""

from __future__ import annotations

from dataclasses import dataclass

from phd_megatron.config import architecture
from phd_megatron.config.moe import SAID_BY_MOE
from phd_megatron.config.schema import ModelConfig
from phd_megatron.config.transformer_fields import transformer_role
from phd_megatron.errors import UserError

_NEUTRAL = {"softmax_type": "vanilla", "glu_linear_offset": 0.0, "mlp_chunks_for_prefill": 1}


@dataclass(frozen=True, kw_only=True)
class Architecture(architecture.Architecture):
    """A decoder as both formats describe it; ``vocab_size`` is the true one."""

    vocab_size: int

    @classmethod
    def from_model(cls, model: ModelConfig, vocab_size: int) -> Architecture:
        """From a resolved configuration.

        Raises:
            UserError: for something the exported model could not honour.
        """
        for name, value in model.transformer.items():
            unset = value is None or value is False or _NEUTRAL.get(name) == value or name in SAID_BY_MOE
            if not unset and transformer_role(name).is_architecture:
                raise UserError(
                    f"{name}={value!r}: the exported model has nothing that corresponds to it, so its logits would "
                    "differ; train without it to export"
                )
        missing = [name for name in architecture.NEEDED if getattr(model, name) is None]
        if missing:
            raise UserError(
                f"the checkpoint's configuration does not say {', '.join(missing)}; use one that was resolved"
            )
        return cls(**vars(architecture.architecture_of(model)), vocab_size=vocab_size)

    @property
    def copies(self) -> dict[str, int | str | None]:
        """Fields of a :class:`ModelConfig` that say how often a token is repeated and how its copies differ."""
        return {
            "phd_repeat": self.policy.repeat,
            "phd_window": self.policy.window,
            "phd_chunk": self.policy.chunk,
            "phd_copy_positions": self.copy_positions,
            "phd_copy_embedding": self.copy_embedding,
        }

    @property
    def name(self) -> str:
        """For people: the scheme, the paper's name of the variant, and what tells copies apart."""
        words = [self.norm_scheme, self.policy.name]
        if self.copy_positions != "token":
            words.append(f"copy positions {self.copy_positions}")
        if self.copy_embedding != "none":
            words.append(f"copy embedding {self.copy_embedding}")
        return ", ".join(words)
