"""RoPE in the words of ``config.json``, in both directions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from phd_megatron.config.rope import Llama3, Yarn
from phd_megatron.config.schema import ModelConfig
from phd_megatron.huggingface.json_values import JSON, Fields

if TYPE_CHECKING:
    from phd_megatron.config.architecture import Architecture

#: beside type, theta and share
SCALING_WORDS = (
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
    "truncate",
)


# ---------------------------------------------------------------- writing


def rope_words(a: Architecture) -> Fields:
    """The content of ``rope_parameters``."""
    words: Fields = {"rope_type": "default", "rope_theta": float(a.rotary_base)}
    if a.rotary_percent != 1.0:
        words["partial_rotary_factor"] = a.rotary_percent
    if isinstance(a.rope, Llama3):
        words |= {
            "rope_type": "llama3",
            "factor": a.rope.factor,
            "low_freq_factor": a.rope.low_freq_factor,
            "high_freq_factor": a.rope.high_freq_factor,
            "original_max_position_embeddings": a.rope.original,
        }
    elif a.rope is not None:
        words |= {
            "rope_type": "yarn",
            "factor": a.rope.factor,
            "original_max_position_embeddings": a.rope.original,
            "beta_fast": a.rope.beta_fast,
            "beta_slow": a.rope.beta_slow,
            "truncate": a.rope.round_range,
            **_growth(a.rope),
        }
    return words


def _growth(yarn: Yarn) -> Fields:
    """What says the attention factor: transformers reads ``mscale`` where both of its words are there and not zero."""
    if yarn.mscale and yarn.mscale_all_dim:
        return {"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim}
    if yarn.mscale == 1 and not yarn.mscale_all_dim:
        return {}  # its default
    return {"attention_factor": yarn.attention_factor}


# ---------------------------------------------------------------- reading


def read_rope(model: ModelConfig, value: JSON) -> None:
    """Take ``rope_parameters`` over.

    Raises:
        ValueError: for what Megatron-Core's RoPE does not compute.
    """
    if value is not None and not isinstance(value, Mapping):
        raise ValueError("it must be a mapping")
    left = dict(value or {})
    old = left.pop("type", "default")  # of transformers 4
    kind = left.pop("rope_type", old)
    if kind not in ("default", "llama3", "yarn"):
        raise ValueError(
            f"RoPE of type {kind!r} changes its frequencies in a way that the layers here do not have; those of "
            "default, llama3 and yarn can be imported"
        )
    model.rotary_base = _number(left.pop("rope_theta", 10000.0))
    model.rotary_percent = _number(left.pop("partial_rotary_factor", 1.0))
    if not 1 < model.rotary_base < math.inf:
        raise ValueError("rope_theta must be a finite number above 1")
    if not 0 < model.rotary_percent <= 1:
        raise ValueError("partial_rotary_factor must be above 0 and at most 1")
    if kind == "llama3":
        _read_llama3(model, left)
    elif kind == "yarn":
        _read_yarn(model, left)
    if left:
        raise ValueError(f"nothing here corresponds to {sorted(left)}")


def _read_llama3(model: ModelConfig, left: Fields) -> None:
    factor = _factor(left)
    wanted = {
        "low_freq_factor": Llama3.low_freq_factor,
        "high_freq_factor": Llama3.high_freq_factor,
        "original_max_position_embeddings": Llama3.original,
    }
    for name, constant in wanted.items():
        if _number(given := left.pop(name, None)) != constant:
            raise ValueError(f"{name}={given!r}: Megatron-Core's scaling of Llama 3.1 has {constant:g} alone")
    model.use_rope_scaling, model.rope_scaling_factor = True, factor


def _read_yarn(model: ModelConfig, left: Fields) -> None:
    factor, original = _factor(left), left.pop("original_max_position_embeddings", None)
    if type(original) is not int or original < 1:
        raise ValueError(f"original_max_position_embeddings={original!r}: it must be a whole number of at least 1")
    truncate = left.pop("truncate", None)
    if truncate not in (None, True, False):
        raise ValueError(f"truncate={truncate!r}: it must be true or false")
    # As transformers reads them: zero and null are the default, and mscale counts with mscale_all_dim alone.
    fast, slow = _number(left.pop("beta_fast", None) or 32), _number(left.pop("beta_slow", None) or 1)
    both = left.pop("mscale", None), left.pop("mscale_all_dim", None)
    mscale, mscale_all_dim = (_number(both[0]), _number(both[1])) if all(both) else (1.0, 0.0)
    attention_factor = left.pop("attention_factor", None)
    yarn = Yarn(factor, original, fast, slow, mscale, mscale_all_dim, truncate is not False)
    if attention_factor is not None and _number(attention_factor) != yarn.attention_factor:
        mscale, mscale_all_dim = yarn.mscale_for(_number(attention_factor)), 0.0
    model.position_embedding_type = "yarn"
    model.yarn_rotary_scaling_factor, model.yarn_original_max_position_embeddings = factor, original
    model.yarn_beta_fast, model.yarn_beta_slow = fast, slow
    model.yarn_mscale, model.yarn_mscale_all_dim = mscale, mscale_all_dim
    model.yarn_correction_range_round_to_int = yarn.round_range


def _factor(left: Fields) -> float:
    factor = _number(given := left.pop("factor", None))
    if not 1 <= factor < math.inf:
        raise ValueError(f"factor={given!r}: it must be at least 1, and finite")
    return factor


def _number(value: JSON) -> float:
    if not isinstance(value, (int, float, str)) or isinstance(value, bool):
        raise ValueError(f"{value!r} is no number")
    return float(value)
