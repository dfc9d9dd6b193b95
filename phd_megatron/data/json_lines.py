"""The text in JSON, whoever wrote it: an object a line, or an array of objects."""

from __future__ import annotations

import functools
import io
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

from phd_megatron.config.plain import Json, Plain
from phd_megatron.data.rows import Damaged, Row, Undecodable, too_long
from phd_megatron.errors import UserError

BYTE_ORDER_MARK = "\ufeff"
_BLOCK = 1 << 20
#: Bytes of an array that say where its elements end.
_SIGNS = re.compile(rb'["\[\]{},]')
#: The inside of a string, up to its end or what was read of it. The bound is for the memory of the expression.
_INSIDE = re.compile(rb'[^"\\]*(?:\\.[^"\\]*){0,1000}', re.DOTALL)

_KINDS: dict[type, str] = {
    **{list: "array", dict: "object", bool: "boolean", int: "number", float: "number", str: "string"},
}


class _Object(dict[str, Plain]):
    """An object that remembers which keys it was given more than once."""

    twice: frozenset[str] = frozenset()


def _remember(pairs: list[tuple[str, Plain]]) -> _Object:
    found = _Object(pairs)
    if len(found) < len(pairs):
        names = sorted(name for name, _ in pairs)
        found.twice = frozenset(name for name, after in itertools.pairwise(names) if name == after)
    return found


def _kind(value: Plain) -> str:
    """In JSON's words."""
    return next((word for kind, word in _KINDS.items() if isinstance(value, kind)), "null")


def _some(record: Json) -> str:
    keys = [repr(key if len(key) <= 40 else f"{key[:40]}...") for key in itertools.islice(record, 8)]
    return ", ".join([*keys, f"and {len(record) - 8} more"] if len(record) > 8 else keys) or "none"


@functools.lru_cache(maxsize=8)
def _written(key: str) -> tuple[str, ...]:
    """Every name, in quotes, that leads to ``key``: for ``a.b`` that of the key, ``a`` and ``b``."""
    words = key.split(".")
    spans = {".".join(words[begin:]) for begin in range(len(words))} | set(words)
    return tuple(f'"{name}"' for name in sorted(spans))


def _find(record: Json, key: str, where: str) -> Plain:
    """What ``key`` stands for: a key of that very name, else ``a.b`` is ``b`` of the object ``a``."""
    inside, rest = "", key
    while True:
        if rest in record:
            head, dot = rest, ""
        else:
            head, dot, after = rest.partition(".")
            if not dot or head not in record:
                raise UserError(
                    f"{where}: no key {key[:80]!r} ({f'the keys of {inside[:80]!r}' if inside else 'its keys'}: "
                    f"{_some(record)}); name the key of the text with --json-key"
                )
        if isinstance(record, _Object) and head in record.twice:
            raise UserError(
                f"{where}: the key {head!r} is there more than once, so which text is meant is open; keep one"
            )
        value = record[head]
        if not dot or value is None:
            return value
        inside = f"{inside}.{head}" if inside else head
        if not isinstance(value, dict):
            raise UserError(
                f"{where}: {inside[:80]!r} is {_kind(value)}, not an object, so it holds no {after[:80]!r}; choose "
                "another --json-key"
            )
        record, rest = value, after


def parse_line(line: bytes, where: str, key: str, unit: str = "line") -> str:
    """The text of one JSON object. Raises Undecodable for invalid UTF-8, UserError for anything else.

    ``unit`` is what the file is made of.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Undecodable(f"not utf-8 ({error.reason} at byte {error.start} of the {unit})") from error
    text = text.removeprefix(BYTE_ORDER_MARK)  # files that were put together have some in the middle
    # Written more than once, or with an escape: two keys may be one, of which JSON takes the last without a word.
    is_twice = "\\" in text or any(text.count(name) > 1 for name in _written(key))
    try:
        # No number is asked for, and Python refuses those of many digits.
        record = json.loads(text, parse_int=len, object_pairs_hook=_remember if is_twice else None)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: malformed JSON ({error}); every {unit} must be one JSON object, so correct or remove this {unit}"
        ) from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: a JSON {_kind(record)}, not an object; every {unit} must be one object")
    value = _find(record, key, where)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} is {_kind(value)}, not a string; choose another --json-key")
    if "\\u" in text:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise Undecodable(f"half a surrogate pair in {key!r}, which no encoding can hold") from error
    return value


def _row(data: bytes, path: Path, key: str, unit: str, number: int) -> Row:
    where = f"{path}:{number}" if unit == "line" else f"{path}: {unit} {number}"
    try:
        text: str | Undecodable = parse_line(data, where, key, unit)
    except Undecodable as error:
        text = error
    return Row(f"{unit} {number}", where, text)


def line_rows(stream: io.BufferedReader, path: Path, key: str, largest: int) -> Iterator[Row]:
    """A document a line, of at most ``largest`` bytes; empty lines are none."""
    for number in itertools.count(1):
        line = stream.readline(largest + 1)
        if not line:
            return
        if len(line) > largest:
            raise UserError(too_long(f"{path}:{number}", "line", largest))
        if line.strip():
            yield _row(line, path, key, "line", number)


def is_array(stream: io.BufferedReader) -> bool:
    """Whether the next thing is an array, which is then begun: what stands before it, and its bracket, are read."""
    start = stream.peek(4)
    if start.startswith(BYTE_ORDER_MARK.encode()):
        stream.read(3)
    while block := stream.peek(1):
        text = block.lstrip()
        stream.read(len(block) - len(text))
        if text:
            return text.startswith(b"[") and stream.read(1) == b"["
    return False


def array_rows(stream: io.BufferedReader, path: Path, key: str, largest: int) -> Iterator[Row]:
    """A document an element of the array that :func:`is_array` began, of at most ``largest`` bytes.

    Only one element is in memory. Where it ends is looked for here; what it says is the JSON library's to read.
    """
    held, searched, depth, in_string, number = bytearray(), 0, 0, False, 0
    while True:
        block = stream.read(_BLOCK)
        if not block:
            raise Damaged("its array has no end")
        held += block
        begin = 0
        while searched < len(held):
            if in_string:
                searched = _after_inside(held, searched)
                if searched == len(held) or held[searched] == ord("\\"):
                    if len(held) - searched < 2:
                        break
                    continue
                in_string, searched = False, searched + 1
                continue
            found = _SIGNS.search(held, searched)
            if found is None:
                searched = len(held)
                break
            searched, sign = found.end(), found[0]
            if sign == b'"':
                in_string = True
            elif sign in b"[{":
                depth += 1
            elif depth and sign in b"]}":
                depth -= 1
            elif not depth:
                element, number = bytes(held[begin : found.start()]), number + 1
                if sign == b"}":
                    raise UserError(f"{path}: malformed JSON: element {number} ends with a }} too many; correct it")
                is_last = sign == b"]"
                if element.strip() or number > 1 or not is_last:
                    yield _row(element, path, key, "element", number)
                if is_last:
                    _refuse_more(bytes(held[found.end() :]), stream, path)
                    return
                begin = found.end()
        del held[:begin]
        searched -= begin
        if len(held) > largest:
            raise UserError(too_long(f"{path}: element {number + 1}", "element", largest))


def _after_inside(held: bytearray, place: int) -> int:
    found = _INSIDE.match(held, place)
    return place if found is None else found.end()


def _refuse_more(rest: bytes, stream: io.BufferedReader, path: Path) -> None:
    while not rest.strip():
        rest = stream.read(_BLOCK)
        if not rest:
            return
    raise UserError(f"{path}: malformed JSON: more stands behind its array; let the file be one array, or JSON lines")
