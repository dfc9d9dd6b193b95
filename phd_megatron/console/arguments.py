"""Flags of a command: a mistake is one message with value, reason and cure, as everywhere."""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from phd_megatron.errors import UserError, shell_slip, shown

#: flags whose words are text, which may begin with anything
_TEXTS = {"--prompt", "--system"}
#: what argparse says, from Python 3.10 to 3.14, and what is said instead
_SAID = (
    (r"argument (?P<flag>\S+): invalid (?P<kind>\w+) value: (?P<value>.*)", "{flag} {value} is not {what}; correct it"),
    (
        r"argument (?P<flag>.+?): invalid choice: (?P<value>.*) \(choose from (?P<choices>.*)\)",
        "{flag} {value} is not known; use one of {choices}",
    ),
    (r"argument (?P<flag>.+?): expected (at least )?one argument", "{flag} has no value; write {flag} VALUE"),
    (
        r"argument (?P<flag>.+?): ignored explicit argument (?P<value>.*)",
        "{flag}={value}: {flag} takes no value; write {flag} alone",
    ),
    (r"the following arguments are required: (?P<flags>.*)", "{flags} not given; it is needed"),
    (
        r"unrecognized arguments: (?P<words>.*)",
        "unexpected words {words}: they belong to no flag; put text with spaces in quotes",
    ),
)
_ALIKE = 0.75  #: how much a flag is like one that is meant, where it may also be one of many others
_WHAT = {"int": "an integer", "float": "a number"}


class Parser(argparse.ArgumentParser):
    """Raises :class:`UserError` for what argparse would print with a page of usage. Flags are never abbreviated."""

    def __init__(
        self,
        *,
        prog: str | None = None,
        usage: str | None = None,
        description: str | None = None,
        epilog: str | None = None,
    ) -> None:
        super().__init__(prog=prog, usage=usage, description=description, epilog=epilog, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in the words of this program."""
        for pattern, text in _SAID:
            if found := re.fullmatch(pattern, message, re.DOTALL):
                words = found.groupdict()
                if "flag" in words:
                    words["flag"] = words["flag"].split("/")[-1]
                raise UserError(
                    f"{text.format(**words, what=_WHAT.get(words.get('kind') or '', 'valid'))}; {self.prog} --help "
                    "lists the flags"
                )
        raise UserError(f"{message}; {self.prog} --help lists the flags")

    def parse_known_args(  # type: ignore[override]  # of one that returns a namespace of the caller's own class
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse, and refuse what no name of a file and no number can be."""
        found, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            value = getattr(found, action.dest, None)
            for item in value if isinstance(value, list) else [value]:
                _check_item((*action.option_strings, action.dest)[0], item, action.default)
        return found, rest


def _check_item(flag: str, item: str | float | Path | None, default: str | float | Path | None) -> None:
    if isinstance(item, float) and not math.isfinite(item):
        raise UserError(f"{flag} {item}: it is not finite; use a finite number")
    if isinstance(item, int) and abs(item) >= 2**63:
        raise UserError(f"{flag} {shown(item)}: it is beyond {2**63 - 1} (64 bits); use a smaller number")
    if isinstance(item, str) and item != default and (not item or (item.strip() and flag not in _TEXTS)):
        problem = shell_slip(item)
        if problem is not None:
            raise UserError(f"{flag} {item!r} {problem}, or leave {flag} out")


def parse_strictly(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse; an unknown flag is a UserError that suggests the nearest one."""
    known = _flags_of(parser)
    for name in _flags_in(argv):
        if name not in known:
            near = difflib.get_close_matches(name[:80], known, 1)
            hint = f"did you mean {near[0]}?" if near else f"the flags are {', '.join(known)}"
            raise UserError(f"unknown flag {name}; {hint}")
    return parser.parse_args(argv)


def parse_own(
    parser: argparse.ArgumentParser, argv: list[str], others: Collection[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Parse the flags of a command that takes those of a run too, and return these as they are.

    Args:
        parser: of the command's own flags.
        argv: all of them.
        others: names of a run's options, as ``seq_length``.

    Raises:
        UserError: also for a flag of neither kind that is most like one of the command's own, which whoever reads the
            rest does not know.
    """
    known = _flags_of(parser)
    elsewhere = {f"--{name.replace('_', '-')}" for name in others}
    for name in _flags_in(argv):
        if name not in known and name.replace("_", "-") not in elsewhere:
            near = difflib.get_close_matches(name[:80], [*known, *elsewhere], 1, cutoff=_ALIKE)
            if near and near[0] in known:
                raise UserError(f"unknown flag {name}; did you mean {near[0]}?")
    return parser.parse_known_args(argv)


def unknown_word(what: str, word: str, choices: Collection[str]) -> UserError:
    """The error of a word that names none of a command's choices."""
    near = difflib.get_close_matches(word[:80], choices, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(choices)}"
    return UserError(f"unknown {what} {shown(word)}; {hint}")


def _flags_of(parser: argparse.ArgumentParser) -> list[str]:
    return [option for action in parser._actions for option in action.option_strings if option.startswith("--")]


def _flags_in(argv: list[str]) -> Iterator[str]:
    """The words that are flags, without their values."""
    for word in argv:
        if word == "--":
            return
        name = word.split("=", 1)[0]
        # argparse takes what holds a space for a value
        if name.startswith("--") and " " not in name:
            yield name
