"""Every field of a run, from the list of fields itself: what no field of its type can be."""

from __future__ import annotations

import typing

from phd_megatron.config.catalog import fields

from .rows import Row, config


def _types(annotation: object) -> tuple[object, ...]:
    return typing.get_args(annotation) or (annotation,)


def _of(kind: type) -> list[str]:
    return [name for name, info in fields().items() if kind in _types(info.annotation)]


def flag(of: str, value: str, *said: str, **options: object) -> Row:
    return Row(f"plan --{of.replace('_', '-')}={value}", (of, *said), **options)  # type: ignore[arg-type]


FIELDS = [
    *(flag(name, "nan", "='nan'", "is not a number", "correct the value") for name in _of(float)),
    *(
        config(
            f"{fields()[name].section}: {{{name}: .inf}}", f"{name}=inf", "give a number that is", name=f"{name}: .inf"
        )
        for name in _of(float)
    ),
    *(flag(name, "1" + "0" * 30, "'1000000", "64 bits", "a smaller number", name=f"{name}=1e30") for name in _of(int)),
    *(flag(name, "ten", "'ten'", "an integer", "correct the value") for name in _of(int)),
    *(flag(name, "", "=''", "is empty", f"leave {name} out") for name in _of(str)),
    *(flag(name, "~/x", "='~/x'", "begins with ~", "write the directory out") for name in _of(str)),
    *(
        flag(name, "x" * 9000, "xxx", "9000 characters", "shorten it", name=f"{name}, 9,000 characters")
        for name in _of(str)
    ),
]
