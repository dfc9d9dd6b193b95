"""Check one value against one annotation, as a flag's text or as YAML gave it.

Pydantic converts (``"3e-4"`` to a float: YAML 1.1 reads it as text); what it would convert without being asked to,
such as ``true`` to the number 1, is refused here. A member of an ``Enum`` is written by its name and kept as its name,
so that a configuration stays plain YAML; :func:`decode` gives the member back.
"""

from __future__ import annotations

import enum
import math
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, Union

from phd_megatron.config.catalog import nearest
from phd_megatron.config.plain import Annotation, Annotations, Plain, Values
from phd_megatron.config.yaml_text import parse_yaml
from phd_megatron.errors import UserError, shell_slip, shown

if TYPE_CHECKING:
    from pydantic import TypeAdapter

MAX_TEXT = 8192  #: characters
MAX_INTEGER = 2**63 - 1
_NONE: Annotation = type(None)
_ATOMS = (int, float, bool, str, _NONE)


def _is_union(annotation: Annotation) -> bool:
    return typing.get_origin(annotation) in (Union, types.UnionType)


def _is_enum(annotation: Annotation) -> TypeGuard[type[enum.Enum]]:
    return isinstance(annotation, type) and issubclass(annotation, enum.Enum)


def simplify(annotation: Annotation) -> Annotation | None:
    """The part of an annotation that text and YAML can express, or None when there is no such part.

    Enums become the ``Literal`` of their member names. Members of a union that are Python objects (callables, dtypes)
    are dropped.
    """
    if annotation is Any or annotation in _ATOMS or typing.get_origin(annotation) is Literal:
        return annotation
    if annotation is None:
        return _NONE
    if annotation is list:
        return list[Any]
    if _is_enum(annotation):
        return Literal[tuple(annotation.__members__)]
    if _is_union(annotation):
        parts = [part for part in map(simplify, typing.get_args(annotation)) if part is not None]
        return Union[tuple(parts)] if any(part is not _NONE for part in parts) else None  # noqa: UP007
    container = typing.get_origin(annotation)
    if container is not None and container in (list, tuple):
        parts = [part if part is ... else simplify(part) for part in typing.get_args(annotation)]
        return None if None in parts else container[tuple(parts)]
    return None


def _members(annotation: Annotation) -> tuple[Annotation, ...]:
    return typing.get_args(annotation) if _is_union(annotation) else (annotation,)


def is_optional(annotation: Annotation) -> bool:
    """Whether None is a value."""
    return _NONE in _members(annotation)


def is_bool(annotation: Annotation) -> bool:
    """Whether the value is true or false (or None)."""
    return bool in _members(annotation)


def is_list(annotation: Annotation) -> bool:
    """Whether a flag of this type takes several words."""
    return any(typing.get_origin(member) in (list, tuple) for member in _members(annotation))


def describe(annotation: Annotation) -> str:
    """The type in words, such as ``an integer or null``, for errors and ``--help``."""
    names: dict[Annotation, str] = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "text",
        _NONE: "null",
        Any: "any value",
    }
    words = []
    for member in _members(annotation):
        origin = typing.get_origin(member)
        if member in names:
            words.append(names[member])
        elif origin is Literal:
            words.append("one of " + ", ".join(map(str, typing.get_args(member))))
        elif origin is list:
            inner = describe(typing.get_args(member)[0])
            words.append("a list" if inner == "any value" else f"a list, each {inner}")
        else:
            words.append(str(member).replace("typing.", ""))
    return " or ".join(words)


@cache
def _adapter(annotation: Any) -> TypeAdapter[Plain]:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False))


def _leaves(annotation: Annotation) -> set[Annotation]:
    found: set[Annotation] = set()
    for member in _members(annotation):
        inner = typing.get_args(member) if typing.get_origin(member) in (list, tuple) else ()
        found |= set().union(*map(_leaves, inner)) if inner else {member}
    return found


def _unwritable(value: Plain) -> str | None:
    """Why a value fits no field whatever its type, and the cure; None for one that may fit."""
    if isinstance(value, str):
        if "\0" in value:
            return "it holds a NUL character, which no name of a file can; take it out"
        if len(value) > MAX_TEXT:
            return f"it has {len(value)} characters, and at most {MAX_TEXT} are taken; shorten it"
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return "it cannot be written as UTF-8; rename what it names"
        return None
    if isinstance(value, bool | None):
        return None
    if isinstance(value, int):
        return None if abs(value) <= MAX_INTEGER else f"it is beyond {MAX_INTEGER} (64 bits); use a smaller number"
    if isinstance(value, float):
        return None if math.isfinite(value) else "it is not finite; give a number that is"
    if isinstance(value, Mapping):
        return next(filter(None, map(_unwritable, (*value.keys(), *value.values()))), None)
    if isinstance(value, list | tuple):
        return next(filter(None, map(_unwritable, value)), None)
    return f"it is a {type(value).__name__} to YAML; put it in quotes if it is meant as text"


def refuse_shell_slips(name: str, value: Plain, where: str) -> None:
    """Refuse text without a character, which would name the working directory, or nothing, and an unexpanded home.

    Raises:
        UserError: for such a text, or a list with one.
    """
    for item in value if isinstance(value, list | tuple) else [value]:
        if isinstance(item, str) and (problem := shell_slip(item)):
            raise UserError(f"{name}={shown(value)} ({where}) {problem}, or leave {name} out")


def _has_stray_bool(value: Plain, annotation: Annotation) -> bool:
    items = value if isinstance(value, list | tuple) else [value]
    leaves = _leaves(annotation)
    return any(isinstance(item, bool) for item in items) and not leaves & {bool, Any}


def check_value(name: str, value: Plain, annotation: Annotation, where: str) -> Plain:
    """Return the value converted to the annotation.

    Raises:
        UserError: with the field, the value, where it was given and what is expected there.
    """
    simple = simplify(annotation)
    if simple is None:
        raise UserError(
            f"{name}={shown(value)} ({where}): {name} is a Python object inside Megatron-Core and cannot be written as "
            "text; leave it out"
        )
    if reason := _unwritable(value):
        raise UserError(f"{name}={shown(value)} ({where}) fits no field: {reason}")
    from pydantic import ValidationError

    candidate = value
    if is_list(simple) and str in _leaves(simple) and isinstance(value, list | tuple):
        # the weights of `data_path: [0.7, P1]` are numbers to YAML and words to Megatron
        candidate = [
            str(item) if isinstance(item, int | float) and not isinstance(item, bool) else item for item in value
        ]
    is_true_or_false = is_bool(simple) and value is not None
    try:
        if _has_stray_bool(value, simple) or (is_true_or_false and not isinstance(value, bool)):
            raise ValueError
        checked = _adapter(simple).validate_python(candidate)
    except (ValidationError, ValueError):
        raise UserError(f"{name}={shown(value)} ({where}) is not {describe(simple)}{_cure(value, simple)}") from None
    if reason := _unwritable(checked):  # a flag's digits are a number by now
        raise UserError(f"{name}={shown(value)} ({where}) fits no field: {reason}")
    return checked


def _cure(value: Plain, annotation: Annotation) -> str:
    choices = [str(c) for m in _members(annotation) if typing.get_origin(m) is Literal for c in typing.get_args(m)]
    hint = nearest(str(value), choices) if choices else None
    if hint:
        return f"; {hint}"
    if isinstance(value, int | float) and not isinstance(value, bool) and str in _members(annotation):
        return "; put it in quotes"
    return "; correct the value"


def parse_words(name: str, words: list[str], annotation: Annotation, where: str) -> Plain:
    """The value of a flag that was given these words (one word, unless the type is a list)."""
    simple = simplify(annotation)
    if simple is None:
        return check_value(name, " ".join(words), annotation, where)
    if str in _leaves(simple):
        refuse_shell_slips(name, words[0] if len(words) == 1 else words, where)
    if len(words) == 1:
        word = words[0]
        nullish = ("null",) if str in _leaves(simple) else ("null", "none", "None")
        if is_optional(simple) and word in nullish:
            return None
        if is_bool(simple) and word.lower() in ("true", "false"):
            return word.lower() == "true"
        if is_list(simple):
            if word.startswith("["):
                return check_value(name, _yaml_list(name, word, where), annotation, where)
            if any(member in (int, float, str) for member in _members(simple)):
                return check_value(name, word, annotation, where)
            return check_value(name, words, annotation, where)
        return check_value(name, word, annotation, where)
    return check_value(name, words, annotation, where)


def _yaml_list(name: str, word: str, where: str) -> Plain:
    try:
        return parse_yaml(word, where)
    except UserError as error:
        raise UserError(
            f"{name}={shown(word)} ({where}) is not a list; write the items apart, or as [1,2,3] ({error})"
        ) from None


def decode(values: Values, annotations: Annotations) -> dict[str, Plain | enum.Enum]:
    """Turn the names of enum members, and lists where a tuple is meant, into what ``TransformerConfig`` takes."""
    return {name: _decode_one(value, annotations.get(name, Any)) for name, value in values.items()}


def _decode_one(value: Plain, annotation: Annotation) -> Plain | enum.Enum:
    for member in _members(annotation):
        if _is_enum(member) and isinstance(value, str) and value in member.__members__:
            return member[value]
        if typing.get_origin(member) is tuple and isinstance(value, list):
            return tuple(value)
    return value
