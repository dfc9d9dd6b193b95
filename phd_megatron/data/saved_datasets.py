"""Directories that ``save_to_disk`` of Hugging Face's datasets wrote: which of their Arrow files are the data."""

from __future__ import annotations

import os
from pathlib import Path

from phd_megatron.config.files import read_json
from phd_megatron.config.plain import Json
from phd_megatron.errors import UserError

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_AGAIN = "save the data set again with save_to_disk"
_LARGEST = 1 << 26  # bytes of either


def saved_files(directory: Path) -> list[Path] | None:
    """The data of a saved data set in its order; None for another directory.

    Other Arrow files of such a directory are caches of what was done with it.

    Raises:
        UserError: for one that has several splits or is damaged.
    """
    if (directory / _SPLITS).is_file():
        splits = _names(_mapping(directory / _SPLITS).get("splits"), directory / _SPLITS)
        if len(splits) != 1:
            raise UserError(
                f"input {str(directory)!r} is a data set with the splits {', '.join(splits) or 'of no name'}; give "
                f"those that are meant, such as {directory / (splits or ['train'])[0]}"
            )
        found = saved_files(directory / splits[0])
        if found is None:
            raise UserError(f"{directory / splits[0]} is no saved data set, but {_SPLITS} names it; {_AGAIN}")
        return found
    if not (directory / _STATE).is_file():
        return None
    path = directory / _STATE
    state = _mapping(path)
    if "_data_files" not in state:  # somebody else's
        return None
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise UserError(
            f"{path}: the data set is a selection of its rows, which is kept in files of its own; save it again after "
            "flatten_indices()"
        )
    listed = state["_data_files"]
    if isinstance(listed, list):
        listed = [item.get("filename") if isinstance(item, dict) else None for item in listed]
    files = [directory / name for name in _names(listed, path)]
    for file in files:
        if not file.is_file():
            raise UserError(f"{path} lists {file.name}, which is not there; copy or save the data set again")
    return files


def _mapping(path: Path) -> Json:
    content = read_json(path, _AGAIN, _LARGEST)
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object; {_AGAIN}")
    return content


def _names(value: object, path: Path) -> list[str]:
    """Names of files or directories, none of which leads out of the directory."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{path} is damaged: it lists no names of files; {_AGAIN}")
    for name in value:
        if not name or name in (".", "..") or os.path.basename(name) != name or "\0" in name:
            raise UserError(f"{path} lists {name[:80]!r}, which is no name of a file beside it; {_AGAIN}")
    return value
