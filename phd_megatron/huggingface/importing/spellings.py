"""What ``config.json`` can say in several places. Where two disagree, nobody knows which the model was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from phd_megatron.errors import UserError, shown
from phd_megatron.huggingface.json_values import JSON
from phd_megatron.huggingface.rope import SCALING_WORDS

_ROPE = ("rope_parameters", "rope_scaling")
#: each row is one thing; transformers takes one of its places, which one differs between releases and families
_SPELLINGS: tuple[tuple[str, ...], ...] = (
    ("rope_theta", *(f"{table}.rope_theta" for table in _ROPE)),
    ("partial_rotary_factor", *(f"{table}.partial_rotary_factor" for table in _ROPE)),
    tuple(f"{table}.{name}" for table in _ROPE for name in ("rope_type", "type")),
    *(tuple(f"{table}.{name}" for table in _ROPE) for name in SCALING_WORDS),
    ("num_experts", "num_local_experts"),
    ("dtype", "torch_dtype"),
    ("mlp_bias", "attention_output_bias"),  # one switch in exports of ours, the only ones with both
)


def check_spellings(path: Path, raw: Mapping[str, JSON], norm_scheme: str | None) -> None:
    """Refuse a ``config.json`` that says one thing twice, and differently; null says nothing.

    Args:
        raw: what the file says, without the defaults of its class.
        norm_scheme: of the family, ``None`` where the file alone says it.

    Raises:
        UserError: with both.
    """
    said = dict(raw)
    for table in _ROPE:
        if isinstance(inner := raw.get(table), Mapping):
            said |= {f"{table}.{name}": value for name, value in inner.items()}
    for places in _SPELLINGS:
        given = {name: said[name] for name in places if said.get(name) is not None}
        first = next(iter(given), None)
        other = next((name for name in given if _plain(given[name]) != _plain(given[first or name])), None)
        if first is not None and other is not None:
            raise UserError(
                f"{path} says {first}={shown(given[first])} and {other}={shown(given[other])}, which are one thing; "
                "correct the one that is wrong, or remove it"
            )
    if norm_scheme is not None and said.get("norm_scheme") not in (None, norm_scheme):
        raise UserError(
            f"{path} says norm_scheme={shown(said['norm_scheme'])}, and its model_type={shown(said.get('model_type'))} "
            f"has {norm_scheme!r}; correct the one that is wrong"
        )


def _plain(value: JSON) -> JSON:
    """Types are written with and without the name of the library."""
    return value.removeprefix("torch.") if isinstance(value, str) else value
