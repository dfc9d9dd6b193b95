"""Defaults of generation, as ``generation_config.json`` has them, on the way through import, training, export.

They lie beside a tokenizer's files and travel with them: end tokens, padding, temperature and so on. What such a file
may hold is a table; everything else is left out by name, so that a file from elsewhere brings plain values alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeGuard

from phd_megatron.config.plain import Plain
from phd_megatron.errors import UserError

GENERATION_FILE = "generation_config.json"
#: what a config.json says of them, too
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_LARGEST = 1 << 20  # bytes of the file
_LONGEST = 10_000  # entries of a list
Values = dict[str, Plain]


class _Kind(NamedTuple):
    what: str
    holds: Callable[[Plain], bool]


def _number(low: float, high: float, what: str) -> _Kind:
    def holds(value: Plain) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high

    return _Kind(what, holds)


def _is_count(value: Plain) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _list_of(check: Callable[[Plain], bool]) -> Callable[[Plain], bool]:
    return lambda value: isinstance(value, list) and 0 < len(value) <= _LONGEST and all(map(check, value))


_SHARE = _number(0.0, 1.0, "a number from 0 to 1")
_FACTOR = _number(1e-6, 1e6, "a number from 1e-6 to 1e6")
_ANY = _number(-1e6, 1e6, "a number from -1e6 to 1e6")
_COUNT = _Kind("a whole number of 0 or more", _is_count)
_FEW = _Kind("a whole number from 1 to 1000", lambda value: _is_count(value) and 1 <= value <= 1000)
_FLAG = _Kind("true or false", lambda value: isinstance(value, bool))
_TOKENS = _Kind("a token, or a list of tokens", lambda value: _is_count(value) or _list_of(_is_count)(value))
_TOKEN_LISTS = _Kind("a list of lists of tokens", _list_of(_list_of(_is_count)))
_TEXTS = _Kind(
    "a text, or a list of texts",
    lambda value: isinstance(value, str) or _list_of(lambda text: isinstance(text, str))(value),
)
_KINDS: dict[str, _Kind] = {
    **dict.fromkeys(("bos_token_id", "pad_token_id", "decoder_start_token_id"), _COUNT),
    **dict.fromkeys(("eos_token_id", "forced_bos_token_id", "forced_eos_token_id"), _TOKENS),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), _TOKENS),
    "bad_words_ids": _TOKEN_LISTS,
    "stop_strings": _TEXTS,
    **dict.fromkeys(("do_sample", "renormalize_logits", "remove_invalid_values"), _FLAG),
    "early_stopping": _Kind("true, false or never", lambda value: isinstance(value, bool) or value == "never"),
    "temperature": _number(0.0, 1e6, "a number from 0 to 1e6"),
    **dict.fromkeys(("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "penalty_alpha"), _SHARE),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "max_time"), _FACTOR),
    **dict.fromkeys(("length_penalty", "diversity_penalty", "guidance_scale"), _ANY),
    **dict.fromkeys(("top_k", "max_length", "max_new_tokens", "min_length", "min_new_tokens"), _COUNT),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), _COUNT),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), _FEW),
}
#: about the library that wrote the file, or about a program's memory and output, not about the model
_ABOUT_OTHERS = ("transformers_version", "_from_model_config", "use_cache", "cache_implementation", "low_memory")
_OUTPUTS = ("return_dict_in_generate", "output_")
_IDS = tuple(name for name in _KINDS if name.endswith(("token_id", "_tokens", "_ids")))


def read_generation(directory: Path) -> tuple[Values, list[str]]:
    """What ``generation_config.json`` of a directory says, and the names in it that are left out.

    Returns:
        Two empty values where there is none.

    Raises:
        UserError: it is damaged, or a value cannot be, with name and value.
    """
    path = directory / GENERATION_FILE
    if not path.exists():
        return {}, []
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            raise ValueError(f"it is no regular file of at most {_LARGEST} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no mapping")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy it again, or delete it to go without") from error
    return checked(content, path)


def checked(content: Mapping[str, Plain], path: Path) -> tuple[Values, list[str]]:
    """The values of ``content`` that are known, and the other names; ``path`` is where they come from.

    Raises:
        UserError: a value cannot be.
    """
    values: Values = {}
    left_out = []
    for name, value in content.items():
        if value is None or name in _ABOUT_OTHERS or name.startswith(_OUTPUTS):
            continue
        kind = _KINDS.get(name)
        if kind is None:
            left_out.append(name)
        elif not kind.holds(value) or (isinstance(value, float) and not math.isfinite(value)):
            shown = str(value)[:80] if not isinstance(value, int) else f"{value:.3g}"
            raise UserError(f"{path} says {name}={shown}: it must be {kind.what}; correct it, or leave it out")
        else:
            values[name] = value
    return values, sorted(left_out)


def outside(values: Mapping[str, Plain], vocab_size: int) -> list[str]:
    """Names of the values with tokens that a vocabulary of this size does not have."""
    return [name for name in _IDS if any(token >= vocab_size for token in _flat(values.get(name)))]


def _flat(value: Plain) -> list[int]:
    if isinstance(value, list):
        return [token for part in value for token in _flat(part)]
    return [value] if isinstance(value, int) else []


def write_generation(values: Mapping[str, Plain], directory: Path) -> None:
    """Write the file; nothing where there are no values."""
    if values:
        text = json.dumps(dict(values), indent=2, ensure_ascii=False)
        (directory / GENERATION_FILE).write_text(text + "\n", encoding="utf-8")
