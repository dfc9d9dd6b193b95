"""Load a Hugging Face directory through ``AutoModelForCausalLM``, and refuse one that does not fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from phd_megatron.errors import UserError

_PROBLEMS = {
    "missing_keys": "it lacks",
    "unexpected_keys": "its config.json has no place for",
    "mismatched_keys": "its config.json says another shape for",
}


def load_directory(directory: Path, named: str | Path) -> Any:
    """The model, in the type of its files; ``named`` is what an error calls the directory.

    Raises:
        UserError: for a file that is missing or damaged, or tensors that are not those of ``config.json``.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    _check_files(directory, named)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # With sizes that do not match transformers would point to a report in its log.
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            trust_remote_code=True,
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
