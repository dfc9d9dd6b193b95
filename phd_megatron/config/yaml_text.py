"""YAML of a stranger: what it may cost is known before anything is made of it.

A few lines can stand for gigabytes (aliases of aliases), for a tower of lists that no recursion survives, or for a
number that takes minutes to convert. Aliases and merge keys work as long as what they stand for stays small.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from phd_megatron.config.files import read_text
from phd_megatron.config.plain import Plain
from phd_megatron.errors import UserError, shown

MAX_BYTES = 1 << 19  #: of a file: some thousand members of a sweep; this reader needs seconds for as much
_MAX_DEPTH = 40
_MAX_VALUES = 200_000  #: values that a document stands for, aliases counted as often as they are used
_MAX_DIGITS = 400
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Refused(yaml.MarkedYAMLError):
    """A document that is YAML and is not read all the same."""


class _Loader(yaml.SafeLoader):
    """``SafeLoader`` that counts what it composes."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._open: list[int] = []  # sizes of the nodes around the current one, so far
        self._sizes: dict[int, int] = {}  # id of a finished node -> values it stands for
        self._total = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """One node, with everything below it."""
        mark = self.peek_event().start_mark
        if len(self._open) >= _MAX_DEPTH:
            raise _refused(f"it is nested more than {_MAX_DEPTH} deep", mark)
        is_alias = self.check_event(yaml.AliasEvent)
        self._open.append(1)
        node = super().compose_node(parent, index)
        size = self._open.pop()
        if is_alias:
            if id(node) not in self._sizes:
                raise _refused("this alias stands inside what it stands for", mark)
            size = self._sizes[id(node)]
        self._sizes[id(node)] = size
        if self._open:
            self._open[-1] += size
        if size > _MAX_VALUES:
            raise _refused(f"its aliases stand for more than {_MAX_VALUES:,} values", mark)
        return node

    def compose_scalar_node(self, anchor: dict[str, yaml.Node]) -> yaml.ScalarNode:
        """A scalar, which may not be an endless number."""
        node = super().compose_scalar_node(anchor)
        if node.tag in _NUMBERS and len(node.value) > _MAX_DIGITS:
            raise _refused(f"the number {node.value[:20]}... has {len(node.value)} characters", node.start_mark)
        return node

    def compose_mapping_node(self, anchor: dict[str, yaml.Node]) -> yaml.MappingNode:
        """A mapping whose keys occur once: YAML would silently take the last one."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                where = f"is in line {lines[key.value]} and again in line {line}"
                raise UserError(f"{shown(key.value)} {where}; keep one of them")
            lines[key.value] = line
        return node


_UNREADABLE = (ValueError, OverflowError, LookupError, AttributeError, TypeError)
"""What PyYAML's own constructors raise on values that are none: a date such as 2026-99-99, ``!!bool maybe``."""


def _refused(problem: str, mark: yaml.Mark) -> _Refused:
    return _Refused(problem=problem, problem_mark=mark)


def read_yaml_file(path: str | Path) -> Any:
    """The content of a YAML file; None when it is empty.

    Raises:
        UserError: for a file that is missing, too long, or not UTF-8, and whatever :func:`parse_yaml` refuses.
    """
    return parse_yaml(read_text(path, "give the path of a YAML file", MAX_BYTES), str(path))


def parse_yaml(text: str, where: str) -> Plain:
    """The one document in a YAML text, made of dicts, lists, strings, numbers, dates, true, false and null.

    Raises:
        UserError: if it is not YAML, says a key twice, or stands for more than a configuration can hold. ``where``
            begins the message.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return None if node is None else _construct(loader, node)
        finally:
            loader.dispose()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        if isinstance(error, _Refused):
            raise UserError(f"{where}{line}: {error.problem}; write out what the run needs, and no more") from None
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UserError(f"{where}{line} is not YAML: {problem}; correct it") from None


def _construct(loader: _Loader, node: yaml.Node) -> Plain:
    try:
        return loader.construct_document(node)
    except _UNREADABLE as error:
        raise _refused_value(node, error) from None


def _refused_value(node: yaml.Node, error: Exception) -> yaml.MarkedYAMLError:
    """Name the value that has no meaning: the first scalar that cannot be constructed alone."""
    todo = [node]
    while todo:
        item = todo.pop(0)
        if isinstance(item, yaml.MappingNode):
            todo += [part for pair in item.value for part in pair]
        elif isinstance(item, yaml.SequenceNode):
            todo += item.value
        else:
            try:
                yaml.SafeLoader("").construct_object(item)
            except _UNREADABLE:
                return yaml.MarkedYAMLError(problem=f"{shown(item.value)}: {error}", problem_mark=item.start_mark)
    return yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark)
