"""Every field says what it is, and what follows from that holds for every field."""

from __future__ import annotations

import dataclasses
import re
import typing
from fnmatch import fnmatchcase

import pytest

from phd_megatron.config.catalog import PASSTHROUGH, fields
from phd_megatron.config.facts import Role, role_of
from phd_megatron.config.load import load_run_config
from phd_megatron.config.resume import for_reading
from phd_megatron.config.schema import RunConfig
from phd_megatron.config.serialize import assign
from phd_megatron.config.transformer_fields import ROLES
from phd_megatron.config.unsupported import is_refused_by_name
from phd_megatron.config.values import simplify
from phd_megatron.model.transformer_config import transformer_field_types
from phd_megatron.runtime.mcore_versions import absent_fields


def test_every_field_of_ours_has_one_role_and_a_help_text() -> None:
    for name, info in fields().items():  # building the catalogue refuses a field with none or two
        assert isinstance(info.role, Role), name
        assert info.help, name
    with pytest.raises(TypeError, match="has 0 roles"):
        role_of(int)


def test_every_number_has_a_range() -> None:
    for name, info in fields().items():
        leaves = str(info.annotation)
        if re.search(r"\b(int|float)\b", re.sub(r"'\w+'", "", leaves)):
            assert info.bounds, f"{name}: {leaves} has no range"
            assert typing.get_origin(info.annotation) is not dict


def test_every_usable_field_of_transformer_config_is_classified_once() -> None:
    names = [
        name
        for name, annotation in transformer_field_types().items()
        if name not in fields() and simplify(annotation) is not None and not is_refused_by_name(name)
    ]
    assert len(names) > 50
    for name in names:
        rows = [pattern for pattern in ROLES if fnmatchcase(name, pattern)]
        assert len(rows) == 1, f"{name}: {rows}"
    for pattern in ROLES.keys() - absent_fields():
        assert any(fnmatchcase(name, pattern) for name in names), f"{pattern} classifies nothing"


def test_what_is_not_taken_over_is_told() -> None:
    saved = {"checkpoint": {"save": "A", "keep_last": 1, "save_interval": 5, "async_save": True}}
    saved |= {"logging": {"metrics_file": "A/metrics.jsonl", "wandb_project": "P", "wandb_exp_name": "run A"}}
    loaded = load_run_config(["--load", "A"], transformer_fields={}, saved=saved)
    (note,) = (note for note in loaded.notes if "not taken over" in note)
    for word in (
        "save='A'",
        "keep_last=1",
        "metrics_file='A/metrics.jsonl'",
        "wandb_project='P'",
        "wandb_exp_name='run A'",
    ):
        assert word in note
    assert (loaded.config.checkpoint.save_interval, loaded.config.checkpoint.async_save) == (None, False)
    kept = load_run_config(["--load", "A", "--save", "B"], transformer_fields={}, saved=saved).config.checkpoint
    assert (kept.save, kept.save_interval, kept.async_save, kept.keep_last) == ("B", 5, True, None)


def test_a_place_of_megatrons_own_is_not_taken_over() -> None:
    saved = {"model": {"transformer": {"config_logger_dir": "/elsewhere", "recompute_granularity": "full"}}}
    config = load_run_config(["--load", "A"], transformer_fields={}, saved=saved).config
    assert config.model.transformer == {"recompute_granularity": "full"}


def test_sections_hold_nothing_but_fields() -> None:
    for section in dataclasses.fields(RunConfig):
        names = {field.name for field in dataclasses.fields(section.default_factory)}  # type: ignore[arg-type]
        assert names - {PASSTHROUGH} <= fields().keys()


def test_reading_drops_what_needs_a_place() -> None:
    saved = RunConfig()
    for name, value in {"save": "A", "save_interval": 3, "async_save": True, "log_layer_statistics": 2}.items():
        assign(saved, name, value)
    saved.logging.metrics_file = "A/metrics.jsonl"
    read = for_reading(saved)
    assert (read.checkpoint.save_interval, read.checkpoint.async_save, read.logging.log_layer_statistics) == (
        None,
        False,
        0,
    )
