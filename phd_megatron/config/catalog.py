"""The list of all fields: name, section, type, default and help text, read from :mod:`phd_megatron.config.schema`."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from phd_megatron.config.schema import RunConfig

PASSTHROUGH = "transformer"
"""The one field of ``ModelConfig`` that is no flag: it holds further ``TransformerConfig`` fields by name."""

NOT_INHERITED = frozenset(
    {
        *("load", "finetune", "no_load_optim", "no_load_rng", "exit_on_missing_checkpoint"),
        *("exit_interval", "exit_duration_in_mins", "dump_gradients_dir", "dump_gradients_iterations"),
        *("profile", "profile_step_start", "profile_step_end", "profile_ranks", "profile_dir"),
    }
)
"""Fields that speak of one start of a run, so a resume does not take them from the checkpoint."""

ALTERNATIVES: tuple[tuple[str, ...], ...] = (
    ("train_iters", "train_samples"),
    ("lr_decay_iters", "lr_decay_samples"),
    ("lr_wsd_decay_iters", "lr_wsd_decay_samples"),
    ("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_tokens", "lr_warmup_fraction"),
    ("eval_interval", "evals_per_run"),
    ("bf16", "fp16"),
    ("data_path", "train_data_path"),
    ("virtual_pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage"),
)
"""Fields that say the same thing in different ways: at most one of each group is given, and one that is given replaces
the others of weaker sources."""

PIPELINE_CUT = (
    *("virtual_pipeline_model_parallel_size", "num_layers_in_first_pipeline_stage"),
    *("num_layers_in_last_pipeline_stage", "pipeline_model_parallel_layout", "overlap_p2p_comm"),
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
    *("microbatch_group_size_per_vp_stage", "overlap_p2p_comm_warmup_flush"),
)
"""Fields that say how the layers of one pipeline size are cut: a resume with another size does not inherit them."""

_HELP_LINE = re.compile(r"^ {4}(\w+):.*#: (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class FieldInfo:
    """One field of one section. ``default`` is a fresh value where the field has a factory."""

    section: str
    name: str
    annotation: Any
    default: Any
    help: str

    @property
    def flag(self) -> str:
        """The field's spelling on the command line, such as ``--num-layers``."""
        return "--" + self.name.replace("_", "-")


@lru_cache(maxsize=1)
def sections() -> dict[str, type]:
    """Section name -> dataclass, in the order of :class:`RunConfig`."""
    return typing.get_type_hints(RunConfig)


@lru_cache(maxsize=1)
def fields() -> dict[str, FieldInfo]:
    """Every field by name, which is unique over all sections. ``model.transformer`` is left out."""
    found: dict[str, FieldInfo] = {}
    for section, cls in sections().items():
        annotations = typing.get_type_hints(cls)
        texts = _help_texts(cls)
        for field in dataclasses.fields(cls):
            if field.name == PASSTHROUGH:
                continue
            if field.name in found:
                raise TypeError(f"field {field.name!r} is in sections {found[field.name].section!r} and {section!r}")
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            found[field.name] = FieldInfo(
                section, field.name, annotations[field.name], default, texts.get(field.name, "")
            )
    return found


def _help_texts(cls: type) -> dict[str, str]:
    """Field name -> text after ``#:``. Empty where the source is not there (a frozen program)."""
    try:
        return dict(_HELP_LINE.findall(inspect.getsource(cls)))
    except OSError:
        return {}


def nearest(name: str, choices: Iterable[str], template: str = "did you mean {}?") -> str | None:
    """The choice most like ``name`` put into ``template``, or None when nothing is close."""
    if len(name) > 200:  # comparing takes the square of the length
        return None
    near = difflib.get_close_matches(name, list(choices), 1, cutoff=0.6)
    return template.format(near[0]) if near else None
