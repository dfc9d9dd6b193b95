"""Flags of a command: a mistake is one message with value, reason and cure, as everywhere."""

from __future__ import annotations

import argparse
import difflib
import math
import re
from typing import Any, NoReturn

from phd_megatron.errors import UserError, shell_slip, shown

#: flags whose words are text, which may begin with anything
_TEXTS = {"--prompt"}
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
_WHAT = {"int": "an integer", "float": "a number"}


class Parser(argparse.ArgumentParser):
    """Raises :class:`UserError` for what argparse would print with a page of usage. Flags are never abbreviated."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

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

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse what no name of a file and no number can be."""
        found, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            value = getattr(found, action.dest, None)
            for item in value if isinstance(value, list) else [value]:
                _check_item((*action.option_strings, action.dest)[0], item, action.default)
        return found, rest


def _check_item(flag: str, item: Any, default: Any) -> None:
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
    known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    for word in argv:
        if word == "--":
            break
        name = word.split("=", 1)[0]
        # argparse takes what holds a space for a value
        if name.startswith("--") and name not in known and " " not in name:
            near = difflib.get_close_matches(name[:80], known, 1)
            hint = f"did you mean {near[0]}?" if near else f"the flags are {', '.join(known)}"
            raise UserError(f"unknown flag {name}; {hint}")
    return parser.parse_args(argv)
