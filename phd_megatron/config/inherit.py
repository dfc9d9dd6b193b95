"""What a run that loads a checkpoint takes over from the run that saved it.

Never a place to write, an identity or what belongs to one start: a checkpoint may come from somebody else, or from
a run that somebody still needs.
"""

from __future__ import annotations

from phd_megatron.config.catalog import fields, role
from phd_megatron.config.facts import PIPELINE_CUT, PLACE, SCHEDULE, Belongs
from phd_megatron.config.plain import Plain, Values
from phd_megatron.config.schema import RunConfig
from phd_megatron.config.serialize import assign, from_dict, lookup, to_dict
from phd_megatron.config.validate import is_met
from phd_megatron.errors import shown

_ENDS = {"train_iters": "lr_decay_iters", "train_samples": "lr_decay_samples"}
"""Length of a run -> length of a schedule that follows from it."""


def inherited(saved: Values, given: Values) -> dict[str, Plain]:
    """The saved values that a run takes over which is given those; name -> value."""
    stages = given.get("pipeline_model_parallel_size")
    is_cut_anew = stages not in (None, saved.get("pipeline_model_parallel_size"))
    return {
        name: value
        for name, value in saved.items()
        if role(name).is_inherited and not (is_cut_anew and _belongs(name, PIPELINE_CUT))
    }


def schedule_of(saved: Values, given: Values) -> dict[str, Plain]:
    """With ``use_checkpoint_opt_param_scheduler`` the saved schedule, which then wins over what is given; else nothing.

    A decay as long as the run is written down as such, so that a longer run does not stretch it.
    """
    if not given.get("use_checkpoint_opt_param_scheduler"):
        return {}
    schedule = {name: value for name, value in saved.items() if _belongs(name, SCHEDULE)}
    if all(schedule.get(name) is None for name in _ENDS.values()):
        schedule |= {decay: saved[length] for length, decay in _ENDS.items() if saved.get(length) is not None}
    return schedule


def drop_what_is_lost(config: RunConfig, origins: dict[str, str], source: str) -> None:
    """Forget inherited values that mean nothing without what was not inherited, such as save_interval without save."""
    for _ in fields():  # one may need another that is dropped
        lost = [name for name in _without_their_needs(config) if origins[name] == source]
        if not lost:
            return
        for name in lost:
            assign(config, name, fields()[name].default)
            origins[name] = "default"


def for_reading(saved: RunConfig) -> RunConfig:
    """What a command takes over from a checkpoint that it only reads: nothing that names a place or is of one start."""
    config = from_dict(to_dict(saved))
    for name in fields():
        if not role(name).is_inherited:
            assign(config, name, fields()[name].default)
    config.model.transformer = {n: v for n, v in config.model.transformer.items() if role(n).is_inherited}
    while lost := _without_their_needs(config):
        for name in lost:
            assign(config, name, fields()[name].default)
    return config


def _without_their_needs(config: RunConfig) -> list[str]:
    return [
        name
        for name, info in fields().items()
        if info.needs is not None and lookup(config, name) != info.default and not is_met(info.needs, config)
    ]


def not_taken_over(saved: Values, config: RunConfig, load: str) -> list[str]:
    """What to tell of places that the saved run wrote to and this one does not."""
    left = [
        f"{name}={shown(value)}"
        for name, value in saved.items()
        if role(name) is PLACE and value is not None and lookup(config, name) is None
    ]
    if not left:
        return []
    return [f"not taken over from {load}: {', '.join(left)}; where a run writes is said anew at each start"]


def _belongs(name: str, group: Belongs) -> bool:
    return name in fields() and group in fields()[name].groups
