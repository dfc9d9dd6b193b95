"""Every field says what it is, and what follows from that holds for every field."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from fnmatch import fnmatchcase
from typing import Any

import pytest

from phd_megatron.config.catalog import PASSTHROUGH, fields, role
from phd_megatron.config.facts import FORM, PLACE, START, Ge, Gt, Le, Lt, Role, role_of
from phd_megatron.config.inherit import for_reading
from phd_megatron.config.load import load_run_config
from phd_megatron.config.resolve import resolve
from phd_megatron.config.resume import check_resume
from phd_megatron.config.schema import RunConfig
from phd_megatron.config.serialize import assign, lookup, to_dict
from phd_megatron.config.transformer_fields import ROLES
from phd_megatron.config.unsupported import is_refused_by_name
from phd_megatron.config.validate import problems
from phd_megatron.config.values import simplify
from phd_megatron.errors import UserError
from phd_megatron.model.transformer_config import transformer_field_types

_UNIONS = (typing.Union, types.UnionType)
NUMBERS = [name for name, info in fields().items() if info.bounds]


def _other(name: str) -> Any:
    """A value of the field's type that is not its default."""
    info = fields()[name]
    kinds = typing.get_args(info.annotation) if typing.get_origin(info.annotation) in _UNIONS else (info.annotation,)
    kind = next(kind for kind in kinds if kind is not type(None))
    if typing.get_origin(kind) is typing.Literal:
        return next(choice for choice in typing.get_args(kind) if choice != info.default)
    if typing.get_origin(kind) is list:
        return ["other"] if kind == list[str] else [3, 3, 3]
    if kind is float:
        return 0.5
    return {bool: not info.default, int: 3, str: "other"}[kind]


def test_every_field_of_ours_has_one_role_and_a_help_text() -> None:
    for name, info in fields().items():  # building the catalogue refuses a field with none or two
        assert isinstance(info.role, Role), name
        assert info.help, name
    with pytest.raises(TypeError, match="has 0 roles"):
        role_of(int)


def test_every_number_has_a_range() -> None:
    for name, info in fields().items():
        leaves = str(info.annotation)
        if "int" in leaves.replace("Literal", "") or "float" in leaves:
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
    for pattern in ROLES:
        assert any(fnmatchcase(name, pattern) for name in names), f"{pattern} classifies nothing"


@pytest.mark.parametrize("name", [name for name in fields() if name not in ("load",)])
def test_a_resume_takes_over_what_it_may_and_nothing_else(name: str) -> None:
    info, value = fields()[name], _other(name)
    saved = RunConfig()
    assign(saved, name, value)
    for need in info.needs.names if info.needs else ():
        assign(saved, need, _other(need))
    config = load_run_config(["--load", "ckpt"], transformer_fields={}, saved=to_dict(saved)).config
    needs_a_place = info.needs is not None and any(not fields()[n].role.is_inherited for n in info.needs.names)
    is_taken = lookup(config, name) == value
    needs_lost = info.needs is not None and not any(lookup(config, n) not in (None, False) for n in info.needs.names)
    assert is_taken == (info.role not in (PLACE, START) and not needs_lost), (info.role, needs_a_place)


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


def _resolved(**values: Any) -> RunConfig:
    config = RunConfig()
    for name, value in {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, **values}.items():
        assign(config, name, value)
    resolve(config)
    return config


@pytest.mark.parametrize("name", [name for name, info in fields().items() if info.role.is_architecture])
def test_architecture_may_not_change_on_resume(name: str) -> None:
    saved, new = _resolved(), _resolved(load="ckpt")
    assign(new, name, _other(name))
    with pytest.raises(UserError, match=f"{name}=") as said:
        check_resume(saved, new)
    assert ("--finetune" in str(said.value)) == (role(name) is FORM or name == "phd_copy_embedding")


@pytest.mark.parametrize("name", ["cross_entropy_fusion_impl", "cross_entropy_loss_fusion", "moe_router_dtype"])
def test_how_a_step_is_computed_may_change_on_resume(name: str) -> None:
    new = _resolved(load="ckpt")
    new.model.transformer[name] = "other"
    (note,) = check_resume(_resolved(), new)
    assert name in note


def _outside(bound: Any) -> tuple[float, float]:
    """The last value inside and the first outside."""
    match bound:
        case Ge(ge=limit):
            return limit, limit - 1
        case Gt(gt=limit):
            return math.nextafter(limit, math.inf), limit
        case Le(le=limit):
            return limit, limit * 2
        case Lt(lt=limit):
            return (math.nextafter(limit, 0), limit) if isinstance(limit, float) or limit == 1 else (limit - 1, limit)
    raise AssertionError(bound)


@pytest.mark.parametrize("name", NUMBERS)
def test_values_out_of_range_are_refused_with_the_range(name: str) -> None:
    info = fields()[name]
    for bound in info.bounds:
        inside, outside = _outside(bound)
        config = RunConfig()
        assign(config, name, [outside] if isinstance(info.default, list) or "list" in str(info.annotation) else outside)
        found = [
            problem for problem in problems(config) if problem.startswith(f"{name}=") and "out of range" in problem
        ]
        assert len(found) == 1 and "use a value of" in found[0], (name, bound)
        assign(config, name, [inside] if "list" in str(info.annotation) else inside)
        assert not [problem for problem in problems(config) if problem.startswith(f"{name}=") and "range" in problem]


@pytest.mark.parametrize("name", [name for name, info in fields().items() if info.needs])
def test_a_field_without_what_it_needs_is_refused(name: str) -> None:
    needs = fields()[name].needs
    assert needs is not None
    config = RunConfig()
    assign(config, name, _other(name))
    assert any(problem.startswith(f"{name}=") and needs.reason in problem for problem in problems(config))


def test_sections_hold_nothing_but_fields() -> None:
    for section in dataclasses.fields(RunConfig):
        names = {field.name for field in dataclasses.fields(section.default_factory)}  # type: ignore[arg-type]
        assert names - {PASSTHROUGH} <= fields().keys()


@pytest.mark.parametrize("name", [name for name, info in fields().items() if not info.role.is_inherited])
def test_reading_a_checkpoint_takes_no_place_and_no_start_from_it(name: str) -> None:
    saved = RunConfig()
    assign(saved, name, _other(name))
    assign(saved, "lr", 0.5)
    saved.model.transformer = {"config_logger_dir": "/elsewhere", "recompute_granularity": "full"}
    read = for_reading(saved)
    assert lookup(read, name) == fields()[name].default
    assert (read.optimizer.lr, read.model.transformer) == (0.5, {"recompute_granularity": "full"})
    assert lookup(saved, name) == _other(name), "what was read stays as it is"


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
