"""``phd-megatron pretrain``: train a model, alone or under torchrun."""

from __future__ import annotations

from phd_megatron.training.start import run

__all__ = ["run"]
