"""The weight files of a Hugging Face directory: which there are, what they hold, and whether config.json can be true.

Only safetensors are read. Everything here looks at names, lengths and headers, so a directory that lies is refused
before memory is taken for what it claims.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from phd_megatron.errors import UserError
from phd_megatron.huggingface.json_values import JSON, Fields

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
#: a tokenizer's files that hold a mapping
TOKENIZER_JSON = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_LARGEST = 1 << 28  # bytes of a JSON file
#: numbers of modules, each of which has a tensor of its own
_LAYERS = re.compile(r"(n|num)_(hidden_|decoder_|encoder_)?layers?")
#: what some side of a tensor has rows for
_COUNTS = re.compile(r".*(_heads?|_experts)|num_experts_per_tok")
#: sides of a tensor
_SIZES = re.compile(r".*(_size|_dim|_embd|_inner|_model|_rank)|n_positions")
_FEW, _HARMLESS = 512, 1 << 20  # a field that a class does not read may have a default above the files'
EMBEDDINGS = ("model.embed_tokens.weight", "transformer.wte.weight", "gpt_neox.embed_in.weight")
_AT_LEAST_ONE = (
    "num_hidden_layers",
    "hidden_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
)
#: one for each layer, in some families
_LISTS = ("intermediate_size", "num_attention_heads", "num_key_value_heads")
#: what is refused wherever it stands, and why
_REFUSED = {
    "transformers_weights": "it names weights in another file than those that are checked: remove it",
    **dict.fromkeys(
        ("quantization_config", "compression_config"),
        "kernels that would be fetched compute quantised models: save the model unquantised, or, where you trust it, "
        "give --trust-remote-code (generate and evaluate have it)",
    ),
}


class Place(NamedTuple):
    """Where a tensor lies, and what its file's header says of it."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def read_json(path: Path) -> Fields:
    """The mapping in one of a directory's files.

    Raises:
        UserError: if it is missing, no JSON, or something else than a mapping.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is no regular file; copy the directory again")
        if path.stat().st_size > _LARGEST:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes, and {_LARGEST:,} are read; copy it again")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: give a directory that save_pretrained or our export wrote") from error
    except RecursionError as error:
        raise UserError(f"{path} cannot be read (it is nested too deeply); copy it again") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({_short(error)}); copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no mapping but a {type(content).__name__}; copy it again")
    return content


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that the model is made of.

    Raises:
        UserError: there are none, the weights are pickles, or the index names files that are missing or elsewhere.
    """
    if (directory / "adapter_config.json").exists():
        raise UserError(
            f"{directory} has an adapter_config.json, which names another model to load; merge the adapter into its "
            "model and save that, or remove the file"
        )
    if (directory / INDEX).exists():
        names = _indexed(directory / INDEX)
    elif (directory / SINGLE).exists():
        names = [SINGLE]
    else:
        raise UserError(_no_weights(directory))
    for name in names:
        path = directory / name
        if not path.is_file():
            raise UserError(f"{path} is missing; copy the whole directory again")
    return [directory / name for name in names]


def _indexed(path: Path) -> list[str]:
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise UserError(f"{path} has no weight_map that says which file holds a tensor; copy it again")
    for key, name in table.items():
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
            raise UserError(
                f"{path} says that {key[:80]} is in {str(name)[:80]!r}; only safetensors files in the directory itself "
                "are read, so copy the directory again"
            )
    return sorted(set(table.values()))


def _no_weights(directory: Path) -> str:
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if not pickles:
        return f"{directory} has no weights: neither {SINGLE} nor {INDEX} is in it; copy it again"
    return (
        f"{directory} has its weights in {pickles[0]}, a pickle, which can run code when it is read, so it is not; "
        "where you trust it, load it with transformers and save_pretrained it into another directory"
    )


def tensor_places(directory: Path) -> dict[str, Place]:
    """Tensor name to where it lies, of all of the model's files.

    Raises:
        UserError: a file is missing, or its header does not fit it.
    """
    places: dict[str, Place] = {}
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (the handle is not a mapping)
                    part = file.get_slice(key)
                    places[key] = Place(path, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError, ValueError, OverflowError, TypeError) as error:
            raise UserError(f"{path} is damaged ({_short(error)}); copy it again") from error
    return places


def check_config(path: Path, content: Mapping[str, JSON], places: Mapping[str, Place]) -> None:
    """Refuse a ``config.json`` whose sizes cannot be those of the files, or which names code to fetch.

    Raises:
        UserError: with the field and its value.
    """
    side = max((max(place.shape, default=1) for place in places.values()), default=0)
    elements = max((prod(place.shape) for place in places.values()), default=0)
    kinds = (
        (_LAYERS, len(places), f"{len(places):,} tensors"),
        (_COUNTS, max(side, _FEW), f"no tensor with a side above {side:,}"),
        (_SIZES, max(elements, _HARMLESS), f"no tensor of more than {elements:,} elements"),
    )
    _check_named(path, content)
    _check_heads(path, content)
    _check_embedding(path, content, places)
    for name, value in _fields(content):
        if name in ("rope_theta", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon") and not _is_positive(value):
            raise UserError(f"{path} says {name}={_short(value)}: it must be a finite number above 0; correct it")
        if name in _AT_LEAST_ONE and value is not None and (type(value) is not int or not 1 <= value < 2**31):
            raise UserError(f"{path} says {name}={_short(value)}: it must be a whole number from 1 to 2^31; correct it")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue  # what is no number is for the class to refuse
        for names, most, held in kinds:
            if names.fullmatch(name) and not -1 <= value <= most:
                raise UserError(
                    f"{path} says {name}={_short(value)}, which does not go with its files: they hold {held}; correct "
                    "it, or copy the directory again"
                )


def _fields(content: Mapping[str, JSON]) -> Iterator[tuple[str, JSON]]:
    """Fields, also of the parts that a model of several has, and of each layer where there is a list."""
    for name, value in content.items():
        yield from _single(name, value)
        if isinstance(value, dict) and name.endswith(("_config", "rope_parameters")):
            for inner, part in value.items():
                yield from _single(inner, part)


def _single(name: str, value: JSON) -> Iterator[tuple[str, JSON]]:
    items = value if name in _LISTS and isinstance(value, list) and value else [value]
    yield from ((name, item) for item in items)


def _check_named(path: Path, content: Mapping[str, JSON]) -> None:
    """Refuse what makes transformers fetch code or read other files, however deep it stands."""
    left: list[tuple[str, JSON]] = [("", content)]  # with the key that chooses an implementation, if in one
    while left:
        chooses, value = left.pop()
        if isinstance(value, str) and chooses and "/" in value:
            raise UserError(
                f"{path} says {chooses}={_short(value)!r}, code to be fetched; code of others is not run: remove it"
            )
        if isinstance(value, list):
            left += [(chooses, item) for item in value]
        if not isinstance(value, dict):
            continue
        for name, item in value.items():
            if name in _REFUSED and item is not None:
                raise UserError(f"{path} says {name}={_short(item)}: {_REFUSED[name]}")
            here = chooses or (name if "_implementation" in name else "")
            left += [(here, item), *([(here, name)] if chooses else [])]


def _check_heads(path: Path, content: Mapping[str, JSON]) -> None:
    heads, groups = content.get("num_attention_heads"), content.get("num_key_value_heads")
    if type(heads) is int and type(groups) is int and (heads < 1 or groups < 1 or heads % groups):
        raise UserError(
            f"{path} says num_attention_heads={heads} and num_key_value_heads={groups}: each KV head serves as many "
            "query heads as the others, so the first must be a multiple of the second; correct it"
        )


def _check_embedding(path: Path, content: Mapping[str, JSON], places: Mapping[str, Place]) -> None:
    rows = content.get("vocab_size")
    for name in EMBEDDINGS:
        if name in places and type(rows) is int and len(places[name].shape) == 2 and rows != places[name].shape[0]:
            raise UserError(
                f"{path} says vocab_size={_short(rows)}: the rows of {name}, {places[name].shape} in "
                f"{places[name].path.name}, do not fit config.json; correct it, or copy the directory again"
            )


def _is_positive(value: JSON) -> bool:
    return isinstance(value, (int, float)) and 0 < value < 1e300


def check_json(directory: Path, names: Iterable[str]) -> None:
    """Refuse a directory in which one of these files is there and holds no mapping.

    Raises:
        UserError: naming the first.
    """
    for name in names:
        if os.path.lexists(directory / name):
            read_json(directory / name)


def _short(what: object) -> str:
    try:
        text = " ".join(str(what).split())
    except ValueError:  # an integer of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]} ..."
