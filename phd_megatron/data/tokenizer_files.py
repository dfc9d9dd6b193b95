"""The files of a tokenizer's directory: which there are, whether they may be read, and how they are copied."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from phd_megatron.checkpoint.store import iteration_of
from phd_megatron.config.files import read_json, require_regular
from phd_megatron.config.plain import Json
from phd_megatron.data.generation import GENERATION_FILE
from phd_megatron.errors import UserError

#: What makes up a tokenizer directory, to be copied into checkpoints and exports.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
)
#: What a tokenizer directory of ours may hold.
SAVED_FILES = (*TOKENIZER_FILES, GENERATION_FILE)
_CURE = "copy the tokenizer directory again"


def read_mapping(path: Path) -> Json:
    """The object in ``path``, or {} when there is no such file. Raises UserError for anything but a JSON object."""
    if not os.path.lexists(path):
        return {}
    value = read_json(path, _CURE)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, not a JSON object; {_CURE}")
    return value


def check_tokenizer_files(directory: Path) -> None:
    """Refuse a tokenizer that is in part no regular files, before anything of it is read.

    Whoever names a directory has its links followed. The ``tokenizer`` of a checkpoint comes with that, so there a link
    may point to a file beside it, or in the hub's cache that the checkpoint is in, and nowhere else.

    Raises:
        UserError: naming the file.
    """
    parent = directory.absolute().parent
    if iteration_of(parent) is not None or (parent / ".metadata").exists():
        for path in (directory, *sorted(directory.glob("*"))):
            if path.is_symlink() and not _is_its_own(path):
                raise UserError(
                    f"{path} is a link to {os.readlink(path)}, outside the checkpoint, which would bring another file "
                    "of this machine into what is made of it; put a copy of the file in its place"
                )
    for name in (*TOKENIZER_FILES, "config.json"):
        if os.path.lexists(directory / name):
            require_regular(directory / name, f"put the file in its place, or {_CURE}")


def copy_tokenizer_files(source: Path, target: Path) -> None:
    """Copy the :data:`TOKENIZER_FILES` of ``source``, links followed, without the names of code to load.

    Raises:
        UserError: one of them may not be read, see :func:`check_tokenizer_files`; none is left out.
    """
    check_tokenizer_files(source)
    for name in TOKENIZER_FILES:
        path = source / name
        if not path.exists():
            continue
        settings = read_mapping(path) if name == "tokenizer_config.json" else {}
        if settings != (kept := harmless(settings)):
            text = json.dumps(kept, indent=2, ensure_ascii=False) + "\n"
            (target / name).write_text(text, encoding="utf-8")
        else:
            shutil.copyfile(path, target / name)


def harmless(settings: Json) -> Json:
    """The settings without those that name code."""
    return {name: value for name, value in settings.items() if name not in ("auto_map", "custom_pipelines")}


def _is_its_own(path: Path) -> bool:
    found, directory = path.resolve(), path.parent.resolve()
    caches = [parent.parent / "blobs" for parent in path.absolute().parents if parent.name == "snapshots"]
    return found.parent == directory or any(found.parent == cache.resolve() for cache in caches)
