"""Where an export may go: what is an export of ours, and may be replaced by another, and what is not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from phd_megatron.checkpoint.store import iteration_of
from phd_megatron.data.record import RECORD
from phd_megatron.data.tokenizer_files import TOKENIZER_FILES
from phd_megatron.errors import UserError
from phd_megatron.huggingface.bundle_files import bundle_files
from phd_megatron.runtime import output as outputs

CARD, CONFIG, GENERATION, INDEX = "README.md", "config.json", "generation_config.json", "model.safetensors.index.json"
#: line of every model card that an export wrote, of this release and the earlier ones
EXPORTED_BY = "| Exported by | phd-megatron "
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_OURS = ("phd_repeat", "norm_scheme")  # in the config.json of every export, whatever its class
_LARGEST = 1 << 24  # bytes of a text that is looked at
NotOurs: TypeAlias = "Callable[[Path], str | None]"


def not_our_export(directory: Path) -> str | None:
    """Why a directory is not an export and nothing else; None for one that is."""
    known = {CARD, CONFIG, GENERATION, INDEX, RECORD, *TOKENIZER_FILES, *bundle_files()}
    for path in sorted(directory.iterdir()):
        if path.is_symlink() or not path.is_file():
            if path.name == "__pycache__" and not path.is_symlink() and path.is_dir():
                continue
            return f"{path.name} in it is no file that an export wrote"
        if path.name not in known and not _WEIGHTS.fullmatch(path.name):
            return f"{path.name} in it is not an export's"
    config, card = directory / CONFIG, directory / CARD
    try:
        if max(config.stat().st_size, card.stat().st_size) > _LARGEST:
            return f"its {CONFIG} or {CARD} is not an export's"
        content = json.loads(config.read_bytes())
        ours = isinstance(content, dict) and all(name in content for name in _OURS)
        if not ours or EXPORTED_BY not in card.read_text(encoding="utf-8"):
            return f"its {CONFIG} and {CARD} do not say that phd-megatron exported it"
    except FileNotFoundError as error:
        return f"it has no {Path(str(error.filename)).name}, so it is no export"
    except (OSError, ValueError, RecursionError) as error:
        return f"its {CONFIG} or {CARD} cannot be read ({error})"
    return None


def check_output(output: str | Path, overwrite: bool, not_ours: NotOurs = not_our_export) -> None:
    """Refuse an ``--output`` that cannot be one, before the checkpoint is read.

    Args:
        not_ours: why a directory is no such export.

    Raises:
        UserError: it stands for something else than an export, or lies inside a checkpoint.
    """
    place = outputs.check_directory(output, overwrite=overwrite, not_ours=not_ours)
    for parent in (place, *place.parents):
        if iteration_of(parent) is not None and (parent / ".metadata").exists():
            raise UserError(
                f"{output} is {'' if parent == place else 'in '}a checkpoint's directory, {parent}, which goes when "
                f"older checkpoints are deleted; choose another --output, for example {parent.parent / 'hf'}"
            )
