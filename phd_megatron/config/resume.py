"""What a run that loads a checkpoint takes over from the run that saved it, and what it may change.

It takes over no place to write, no identity and nothing that belongs to one start: a checkpoint may come from somebody
else, or from a run that somebody still needs.
"""

from __future__ import annotations

from phd_megatron.config.catalog import fields, role
from phd_megatron.config.facts import FORM, GRADIENT_BUFFERS, OPTIMIZER_STATES, PIPELINE_CUT, PLACE, SCHEDULE, Belongs
from phd_megatron.config.plain import Plain, Values
from phd_megatron.config.schema import RunConfig
from phd_megatron.config.serialize import of_values, values_of
from phd_megatron.errors import raise_all, shown

_ENDS = {"train_iters": "lr_decay_iters", "train_samples": "lr_decay_samples"}
"""Length of a run -> length of a schedule that follows from it."""

_CHOSEN_WITH = (
    ("pipeline_model_parallel_size", PIPELINE_CUT),
    ("optimizer", OPTIMIZER_STATES),
    ("deepspeed", OPTIMIZER_STATES),
    ("deepspeed", GRADIENT_BUFFERS),
)
"""Field -> the group that is chosen anew where it is given another value."""

_ADDS_FROM_ZERO = ("phd_copy_embedding", "none")
"""Field and value from which ``finetune`` may add parameters, because they start at zero and change nothing."""


def inherited(saved: Values, given: Values) -> dict[str, Plain]:
    """The saved values that a run takes over which is given those; name -> value."""
    chosen_anew = [
        group
        for field, group in _CHOSEN_WITH
        if given.get(field) not in (None, saved.get(field, fields()[field].default))
    ]
    return {
        name: value
        for name, value in saved.items()
        if role(name).is_inherited and not any(_belongs(name, group) for group in chosen_anew)
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


def drop_what_is_lost(values: dict[str, Plain], origins: dict[str, str], source: str) -> None:
    """Forget inherited values that mean nothing without what was not inherited, such as save_interval without save."""
    while lost := [name for name in _without_their_needs(values) if origins[name] == source]:  # one may need another
        for name in lost:
            del values[name]
            origins[name] = "default"


def for_reading(saved: RunConfig) -> RunConfig:
    """What a command takes over from a checkpoint that it only reads: nothing that names a place or is of one start."""
    values = {name: value for name, value in values_of(saved).items() if role(name).is_inherited}
    while lost := _without_their_needs(values):
        for name in lost:
            del values[name]
    return of_values(values)


def _without_their_needs(values: Values) -> list[str]:
    needing = {name: info.needs for name, info in fields().items() if info.needs is not None}
    return [
        name
        for name, needs in needing.items()
        if name in values and values[name] != fields()[name].default and not needs.are_met(values)
    ]


def not_taken_over(saved: Values, values: Values, load: str) -> list[str]:
    """What to tell of places that the saved run wrote to and this one does not."""
    left = [
        f"{name}={shown(value)}"
        for name, value in saved.items()
        if role(name) is PLACE and value is not None and values.get(name) is None
    ]
    if not left:
        return []
    return [f"not taken over from {load}: {', '.join(left)}; where a run writes is said anew at each start"]


def _belongs(name: str, group: Belongs) -> bool:
    return name in fields() and group in fields()[name].groups


def check_resume(saved: RunConfig, new: RunConfig) -> list[str]:
    """Compare two resolved configurations.

    Returns:
        One line per field that changed and may change.

    Raises:
        UserError: if architecture differs, with every field that does. With ``new.checkpoint.finetune``, architecture
            that has no parameters may change.
    """
    notes, refused = [], []
    old, given = values_of(saved), values_of(new)
    if saved.optimizer.optimizer != new.optimizer.optimizer and not (
        new.checkpoint.finetune or new.checkpoint.no_load_optim
    ):
        refused.append(
            f"optimizer={new.optimizer.optimizer}: the checkpoint in {new.checkpoint.load} has the states of "
            f"optimizer={saved.optimizer.optimizer}; add --no-load-optim or --finetune, or leave the field out"
        )
    for name in {**old, **given}:  # ours first
        before, after = old.get(name), given.get(name)
        what = role(name)
        if before == after or not what.is_inherited:
            continue
        may_change = what is FORM or (name, before) == _ADDS_FROM_ZERO
        change = f"{name}: {_show(name, before)} -> {_show(name, after)}"
        if not what.is_architecture:
            notes.append(f"changed since the checkpoint: {change}")
        elif name == "vocab_size" and after is None:
            continue  # the tokenizer has not been read yet
        elif name == "phd_repeat" and saved.model.phd_repeat > 1 and saved.model.phd_copy_embedding == "vector":
            refused.append(
                f"phd_repeat={after}: the checkpoint in {new.checkpoint.load} has a learned vector for each of its "
                f"phd_repeat={before} copies but the first, which another number of copies has no place for; keep "
                "phd_repeat, or train a new model without --load"
            )
        elif new.checkpoint.finetune and may_change:
            notes.append(f"changed for fine-tuning: {change}")
        else:
            refused.append(
                f"{name}={_show(name, after)}: the checkpoint in {new.checkpoint.load} has "
                f"{name}={_show(name, before)}, and architecture cannot change on resume; "
                + ("add --finetune, or " if may_change else "")
                + "leave the field out, or train a new model without --load"
            )
    raise_all(refused)
    return notes


def _show(name: str, value: Plain) -> str:
    return "Megatron-Core's default" if value is None and name not in fields() else repr(value)
