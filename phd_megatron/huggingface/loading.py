"""Load a Hugging Face directory with classes that are installed, and refuse one that does not fit together."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from annotated_types import Ge, Le

from phd_megatron.config.catalog import fields
from phd_megatron.config.facts import Bound, violates
from phd_megatron.data.generation import TOKEN_IDS, checked, read_generation
from phd_megatron.errors import UserError
from phd_megatron.huggingface import installed
from phd_megatron.huggingface.families import BUNDLED
from phd_megatron.huggingface.json_values import JSON
from phd_megatron.huggingface.weights import Place, check_config, read_json, tensor_places

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)
_AT_MOST, _SMALL = 8, 50_000_000  # parameters: a wrong size of a small model is named more exactly when it is loaded
_WORDS = 600  # characters of another library's message
_PROBLEMS = {
    "missing_keys": "it lacks",
    "unexpected_keys": "its config.json has no place for",
    "mismatched_keys": "its config.json says another shape for",
}


def load_config(directory: Path) -> PreTrainedConfig:
    """The configuration of a directory, by an installed class; its own code does not run.

    Raises:
        UserError: if it cannot be read, or no installed class is for it.
    """
    from transformers import AutoConfig

    own = is_our_export(directory)
    loader = installed.config_class() if own else AutoConfig
    try:
        # An installed class would do nothing with the word.
        return loader.from_pretrained(directory, local_files_only=True, **({} if own else {"trust_remote_code": False}))
    except Exception as error:  # transformers' strict classes raise many kinds
        path, words = directory / "config.json", first_words(error)
        if "trust_remote_code" in words:
            raise UserError(
                f"{path} cannot be loaded: its model is of a type that only code of its own knows, which is not run; "
                "where you trust it, give --trust-remote-code (generate and evaluate have it)"
            ) from error
        raise UserError(f"{path} cannot be loaded: it is refused by transformers: {words}; correct it") from error


def is_our_export(directory: Path) -> bool:
    """Whether ``config.json`` names the bundled model.

    Raises:
        UserError: if it cannot be read, or has options of a later release, which would be ignored.
    """
    path = directory / "config.json"
    content = read_json(path)
    if content.get("model_type") != BUNDLED.model_type:
        return False
    known = set(inspect.signature(installed.config_class()).parameters)
    _check_types(path, content)
    if later := sorted(name for name in content if name.startswith("phd_") and name not in known):
        raise UserError(
            f"{path} has {', '.join(later)}, which this release does not know: the model would be computed without; "
            "update phd-megatron"
        )
    return True


def _check_types(path: Path, content: Mapping[str, JSON]) -> None:
    """The bundled class takes what it is given, so its plain fields are looked at here."""
    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    for name, annotation in installed.config_class().__annotations__.items():
        options = get_args(annotation) or (annotation,)
        value = content.get(name)
        if value is None or not set(options) <= {*kinds, type(None)}:
            continue
        allowed = {*options, int} if float in options else set(options)
        if type(value) not in allowed:
            what = " or ".join(kinds[option] for option in options if option in kinds)
            raise UserError(f"{path} says {name}={str(value)[:80]}: it must be {what}; correct it")
        if type(value) is int and (range_ := violates(value, _bounds(name))):
            raise UserError(f"{path} says {name}={str(value)[:80]}: it must be {range_}; correct it")


def _bounds(name: str) -> tuple[Bound, ...]:
    """A run's own limits where the field has the name it has there."""
    return (fields()[name].bounds if name in fields() else ()) or (Ge(-1), Le(2**31 - 1))


def load_directory(directory: Path, named: str | Path, run_its_code: bool = False) -> PreTrainedModel:
    """The model, in the type of its files; ``named`` is what an error calls the directory.

    Args:
        run_its_code: load as the export's users do, with the Python files that it brings.

    Raises:
        UserError: for a file that is missing or damaged, or tensors that are not those of ``config.json``.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    content = read_json(directory / "config.json")
    read_generation(directory)
    checked({name: content.get(name) for name in TOKEN_IDS}, directory / "config.json")
    own = not run_its_code and is_our_export(directory)
    if not run_its_code:
        places = _places(directory, named)
        check_config(directory / "config.json", content, places)
        _check_described(directory, own, content, places, named)
    if own and (others := installed.differing_files(directory)):
        logger.warning(
            "%s brings Python files that are not this release's (%s and so on); they do not run", named, others[0]
        )
    loader = installed.model_class() if own else AutoModelForCausalLM
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # With sizes that do not match transformers would point to a report in its log.
        model, info = loader.from_pretrained(
            directory,
            trust_remote_code=run_its_code,
            local_files_only=True,
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **({} if run_its_code else {"use_safetensors": True}),
        )
    except Exception as error:  # what a damaged directory makes transformers raise is of many kinds
        raise UserError(f"{named} cannot be loaded: {first_words(error)}; export or copy it again") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    for what, problem in _PROBLEMS.items():
        if found := sorted(map(str, info.get(what) or ())):
            raise UserError(f"{named} cannot be loaded: {problem} {', '.join(found[:3])}; export or copy it again")
    return model


def _places(directory: Path, named: str | Path) -> dict[str, Place]:
    try:
        return tensor_places(directory)
    except UserError as error:
        raise UserError(f"{named} cannot be loaded: {error}") from error


def _check_described(
    directory: Path, own: bool, content: Mapping[str, JSON], places: Mapping[str, Place], named: str | Path
) -> None:
    """Refuse a configuration whose model would take far more memory than the files; the model is outlined only."""
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(directory)
    try:
        with torch.device("meta"):
            outline = (
                installed.model_class()(config)
                if own
                else AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            )
    except Exception as error:
        raise UserError(
            f"{named} cannot be loaded: no model can be made of its config.json ({first_words(error)}); correct it, or "
            "export or copy it again"
        ) from error
    described = sum(parameter.numel() for parameter in outline.parameters())
    held = sum(prod(place.shape) for place in places.values())
    if described > _AT_MOST * held + _SMALL:
        raise UserError(
            f"{named} cannot be loaded: its config.json describes a model of {described:,} parameters, and its files "
            f"hold {held:,}; correct it, or copy the directory again"
        )


def first_words(error: BaseException) -> str:
    """What an exception of a library says, in one line; its kind where it says nothing."""
    text = " ".join(str(error).split())
    text = text if len(text) <= _WORDS else f"{text[:_WORDS]} ..."
    return text if text and not isinstance(error, (KeyError, IndexError)) else f"{type(error).__name__} {text}".strip()
