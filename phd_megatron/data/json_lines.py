"""The text in one line of JSON, whoever wrote it."""

from __future__ import annotations

import itertools
import json

from phd_megatron.config.plain import Json, Plain
from phd_megatron.errors import UserError

BYTE_ORDER_MARK = "\ufeff"


class Undecodable(Exception):
    """The file or line is not text in its encoding."""


_KINDS: dict[type, str] = {
    **{list: "array", dict: "object", bool: "boolean", int: "number", float: "number", str: "string"},
}


def _kind(value: Plain) -> str:
    """In JSON's words."""
    return _KINDS.get(type(value), "null")


def _some(record: Json) -> str:
    keys = [repr(key if len(key) <= 40 else f"{key[:40]}...") for key in itertools.islice(record, 8)]
    return ", ".join([*keys, f"and {len(record) - 8} more"] if len(record) > 8 else keys) or "none"


def parse_line(line: bytes, where: str, key: str) -> str:
    """The text of one JSON line. Raises Undecodable for invalid UTF-8, UserError for anything else."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Undecodable(f"not utf-8 ({error.reason} at byte {error.start} of the line)") from error
    text = text.removeprefix(BYTE_ORDER_MARK)  # files that were put together have some in the middle
    # Written more than once, or with an escape: two keys may be one, of which JSON takes the last without a word.
    is_twice = text.count(f'"{key}"') > 1 or "\\" in text
    pairs: list[tuple[str, Plain]] = []

    def remember(found: list[tuple[str, Plain]]) -> Json:
        nonlocal pairs
        pairs = found  # the outermost object comes last
        return dict(found)

    try:
        # No number is asked for, and Python refuses those of many digits.
        record = json.loads(text, parse_int=len, object_pairs_hook=remember if is_twice else None)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: malformed JSON ({error}); every line must be one JSON object, so correct or remove this line"
        ) from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: a JSON {_kind(record)}, not an object; every line must be one object")
    if key not in record:
        raise UserError(
            f"{where}: no key {key[:80]!r} (its keys: {_some(record)}); name the key of the text with --json-key"
        )
    if is_twice and sum(name == key for name, _ in pairs) > 1:
        raise UserError(f"{where}: the key {key!r} is there more than once, so which text is meant is open; keep one")
    value = record[key]
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
