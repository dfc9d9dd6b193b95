"""RoPE's frequencies as Megatron-Core has them; tables are made of them for the positions of copies."""

from __future__ import annotations

from typing import Any

from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from phd_megatron.config.rope import Yarn


class _Yarn(YarnRotaryEmbedding):
    def _set_cos_sin_cache(self, *args: Any, **kwargs: Any) -> None:
        """Nobody reads it, and it would hold every position of the old context."""


def rotary_frequencies(model: GPTModel) -> tuple[Tensor, float]:
    """Frequencies ``[r/2]`` of a model that was built with RoPE, and by what its cosines and sines are multiplied.

    Plain and Llama 3.1's are those that GPTModel has made. YaRN's it would make over whole heads, whatever share of
    them is turned; here they are over that share, as in transformers.
    """
    config = model.config
    scaling = config.rope
    if not isinstance(scaling, Yarn):
        return model.rotary_pos_emb.inv_freq, 1.0
    rotary = _Yarn(
        kv_channels=int(config.kv_channels * model.rotary_percent),
        rotary_base=model.rotary_base,
        use_cpu_initialization=config.use_cpu_initialization,
        scaling_factor=scaling.factor,
        original_max_position_embeddings=scaling.original,
        beta_fast=scaling.beta_fast,
        beta_slow=scaling.beta_slow,
        mscale=scaling.mscale,
        mscale_all_dim=scaling.mscale_all_dim,
        correction_range_round_to_int=scaling.round_range,
        cp_group=model.pg_collection.cp,
    )
    angles, factor = rotary.get_emb(2)  # [2, 1, 1, r]; the frequencies themselves it keeps to itself
    return angles[1, 0, 0, : angles.size(-1) // 2].clone(), factor
