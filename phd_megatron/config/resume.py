"""May a run with this configuration continue from a checkpoint that was saved with that one?"""

from __future__ import annotations

from phd_megatron.config.catalog import fields, role
from phd_megatron.config.facts import FORM
from phd_megatron.config.plain import Plain
from phd_megatron.config.schema import RunConfig
from phd_megatron.config.serialize import lookup
from phd_megatron.config.unsupported import raise_all

_ADDS_FROM_ZERO = ("phd_copy_embedding", "none")
"""Field and value from which ``finetune`` may add parameters, because they start at zero and change nothing."""


def check_resume(saved: RunConfig, new: RunConfig) -> list[str]:
    """Compare two resolved configurations.

    Returns:
        One line per field that changed and may change.

    Raises:
        UserError: if architecture differs, with every field that does. With ``new.checkpoint.finetune``, architecture
            that has no parameters may change.
    """
    notes, refused = [], []
    for name in _all_names(saved, new):
        before, after = lookup(saved, name), lookup(new, name)
        what = role(name)
        if before == after or not what.is_inherited:
            continue
        may_change = what is FORM or (name, before) == _ADDS_FROM_ZERO
        change = f"{name}: {_show(name, before)} -> {_show(name, after)}"
        if not what.is_architecture:
            notes.append(f"changed since the checkpoint: {change}")
        elif name == "vocab_size" and after is None:
            continue  # the tokenizer has not been read yet
        elif name == "phd_repeat" and before > 1 and lookup(saved, "phd_copy_embedding") == "vector":
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


def _all_names(*configs: RunConfig) -> list[str]:
    extra = {name: None for config in configs for name in config.model.transformer}
    return [*fields(), *extra]


def _show(name: str, value: Plain) -> str:
    return "Megatron-Core's default" if value is None and name not in fields() else repr(value)
