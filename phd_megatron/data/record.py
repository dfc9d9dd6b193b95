"""``training_data.json`` of an export: the data of the run and how it was split, so that evaluation finds it again.

A checkpoint says the same in its ``run_config.yaml``.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from phd_megatron.config.catalog import fields
from phd_megatron.config.files import read_json
from phd_megatron.config.plain import Plain
from phd_megatron.config.schema import DataConfig, RunConfig
from phd_megatron.config.serialize import assign, lookup
from phd_megatron.config.values import check_value
from phd_megatron.data.blend import SPLIT_NAMES, SPLITS, parse_blend, plan_splits
from phd_megatron.errors import UserError

RECORD = "training_data.json"
_FIELDS = (
    "data_path",
    "split",
    "train_data_path",
    "valid_data_path",
    "test_data_path",
    "eod_mask_loss",
    "reset_attention_mask",
    "reset_position_ids",
    "seq_length",
)
_ADDED = ("reset_attention_mask", "reset_position_ids")  # records of older exports do not have them
_LARGEST = 1 << 20  # bytes of a record


def _sizes(prefix: str) -> list[int] | None:
    """Bytes of ``PREFIX.bin`` and ``PREFIX.idx``; None where they cannot be read."""
    try:
        return [Path(f"{prefix}{suffix}").stat().st_size for suffix in (".bin", ".idx")]
    except (OSError, ValueError):
        return None


def prefixes_of(data: DataConfig) -> set[str]:
    """Every prefix that a run's data section names."""
    blends = {name: getattr(data, name) for name in _FIELDS if name.endswith("data_path")}
    return {prefix for name, words in blends.items() if words for prefix in parse_blend(words, name)[0]}


@dataclass(frozen=True)
class TrainingData:
    """``values`` by field name, and per prefix the bytes of its two files, where they could be read."""

    values: dict[str, Plain]
    sizes: dict[str, list[int]]

    @classmethod
    def of_run(cls, run: RunConfig) -> TrainingData | None:
        """None for a run that names no data, such as an imported model."""
        prefixes = sorted(prefixes_of(run.data))
        if not prefixes:
            return None
        sizes = {prefix: found for prefix in prefixes if (found := _sizes(prefix)) is not None}
        return cls({name: lookup(run, name) for name in _FIELDS}, sizes)

    @classmethod
    def read(cls, directory: Path) -> TrainingData | None:
        """The record in an exported directory; None where there is none.

        Raises:
            UserError: for a file that is no such record, whoever wrote it.
        """
        path = directory / RECORD
        if not os.path.lexists(path):
            return None
        try:
            return cls._checked(read_json(path, "an export writes it", _LARGEST))
        except (ValueError, RecursionError, UserError) as error:
            raise UserError(
                f"{path} is no record of training data ({error}); export the model again, or delete the file and name "
                "the data with --data-path"
            ) from None

    @classmethod
    def _checked(cls, content: Plain) -> TrainingData:
        if isinstance(content, dict):
            content = {**{name: fields()[name].default for name in _ADDED}, **content}
        if not isinstance(content, dict) or content.keys() != {*_FIELDS, "files"}:
            raise ValueError(f"it must hold {', '.join(_FIELDS)} and files, and nothing else")
        values = {name: check_value(name, content[name], fields()[name].annotation, RECORD) for name in _FIELDS}
        files = content["files"]
        if not isinstance(files, dict) or not all(
            isinstance(pair, list) and len(pair) == 2 and all(type(size) is int for size in pair)
            for pair in files.values()
        ):
            raise ValueError("files must hold two sizes for each prefix")
        texts = [word for value in values.values() for word in (value if isinstance(value, list) else [value])]
        if not all(text.isprintable() for text in [*texts, *files] if isinstance(text, str)):
            raise ValueError("a path has characters that cannot be printed")
        length = values["seq_length"]
        if not isinstance(length, int) or length < 1:
            raise ValueError(f"seq_length {length} is below 1")
        record = cls(values, files)
        run = RunConfig()
        record.put_into(run)
        plan_splits(run.data)
        return record

    def write(self, directory: Path) -> None:
        """Write the file."""
        text = json.dumps({**self.values, "files": self.sizes}, indent=2, ensure_ascii=False)
        (directory / RECORD).write_text(text + "\n", encoding="utf-8")

    def put_into(self, run: RunConfig) -> None:
        """Set the fields of ``run``."""
        for name, value in self.values.items():
            assign(run, name, value)

    def check_unchanged(self, run: RunConfig, subset: str) -> None:
        """Refuse files of another size than they had at the export.

        Raises:
            UserError: with the sizes.
        """
        plan = plan_splits(run.data)[SPLITS.index(subset)]
        for prefix in plan.prefixes if plan is not None else ():
            noted, found = self.sizes.get(prefix), _sizes(prefix)
            if noted is not None and found != noted:
                raise UserError(
                    f"{prefix}.bin and .idx have {found} bytes, and had {noted} when the model was exported: they are "
                    f"not the data of its training; restore them, or evaluate on what is there with --data-path"
                )


def names_recorded_data(words: list[str], data: DataConfig) -> bool:
    """Whether every prefix in a ``--data-path`` is one that ``data`` splits."""
    if not data.data_path:
        return False
    recorded = {Path(prefix).resolve() for prefix in parse_blend(data.data_path, "data-path")[0]}
    return all(Path(prefix).resolve() in recorded for prefix in parse_blend(words, "data-path")[0])


def require_files(source: Path, run: RunConfig, subset: str) -> None:
    """Check that the data which ``source``, a model's directory, was trained on is still there.

    Raises:
        UserError: with what is missing.
    """
    plan = plan_splits(run.data)[SPLITS.index(subset)]
    for prefix in plan.prefixes if plan is not None else ():
        if _sizes(prefix) is None:
            place = "" if Path(prefix).is_absolute() else f" from {Path.cwd()}, where this command runs"
            raise UserError(
                f"{source} takes its {SPLIT_NAMES[SPLITS.index(subset)]} split from {prefix}.bin and .idx, which "
                f"cannot be read{place}; bring them back, or name prepared data with --data-path"
            )
