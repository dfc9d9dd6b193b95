"""Load a Hugging Face directory with classes that are installed, and refuse one that does not fit together."""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from phd_megatron.errors import UserError
from phd_megatron.huggingface import installed

logger = logging.getLogger(__name__)
_PROBLEMS = {
    "missing_keys": "it lacks",
    "unexpected_keys": "its config.json has no place for",
    "mismatched_keys": "its config.json says another shape for",
}


def load_config(directory: Path) -> Any:
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
        raise UserError(f"{directory / 'config.json'} is refused by transformers: {error}") from error


def is_our_export(directory: Path) -> bool:
    """Whether ``config.json`` names the bundled model.

    Raises:
        UserError: if it cannot be read, or has options of a later release, which would be ignored.
    """
    path = directory / "config.json"
    content = read_json(path)
    if content.get("model_type") != installed.MODEL_TYPE:
        return False
    known = set(inspect.signature(installed.config_class()).parameters)
    if later := sorted(name for name in content if name.startswith("phd_") and name not in known):
        raise UserError(
            f"{path} has {', '.join(later)}, which this release does not know: the model would be computed without; "
            "update phd-megatron"
        )
    return True


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in one of a directory's files.

    Raises:
        UserError: if it is missing, no JSON, or something else than a mapping.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: give a directory that save_pretrained or our export wrote") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no mapping; copy it again")
    return content


def load_directory(directory: Path, named: str | Path, run_its_code: bool = False) -> Any:
    """The model, in the type of its files; ``named`` is what an error calls the directory.

    Args:
        run_its_code: load as the export's users do, with the Python files that it brings.

    Raises:
        UserError: for a file that is missing or damaged, or tensors that are not those of ``config.json``.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    _check_files(directory, named)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    own = not run_its_code and is_our_export(directory)
    if own and (others := installed.differing_files(directory)):
        logger.warning(
            "%s brings Python files that are not this release's (%s and so on); they do not run", named, others[0]
        )
    loader = installed.model_class() if own else AutoModelForCausalLM
    try:
        # With sizes that do not match transformers would point to a report in its log.
        model, info = loader.from_pretrained(
            directory,
            trust_remote_code=run_its_code,
            local_files_only=True,
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{named} cannot be loaded: {str(error).strip()}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    for what, problem in _PROBLEMS.items():
        if found := sorted(map(str, info.get(what) or ())):
            raise UserError(f"{named} cannot be loaded: {problem} {', '.join(found[:3])}; export or copy it again")
    return model


def _check_files(directory: Path, named: str | Path) -> None:
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(f"{named} cannot be loaded: {path.name} is damaged ({error}); copy it again") from error
