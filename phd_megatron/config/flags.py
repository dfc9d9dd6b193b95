"""Read the command line: words to field values, with Megatron's spellings."""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches

from phd_megatron.config.aliases import ALIASES, Accept, Alias, Choice, Refuse, Rename, Set
from phd_megatron.config.catalog import fields, nearest
from phd_megatron.config.megatron_flags import refusal
from phd_megatron.config.plain import Annotation, Annotations, Plain
from phd_megatron.config.values import is_bool, is_list, parse_words, simplify
from phd_megatron.errors import UserError, shown


@dataclass
class ParsedFlags:
    """What the command line says.

    Attributes:
        values: field name -> value; fields of ``TransformerConfig`` stand beside our own.
        origins: field name -> the flag as it was spelled.
        config: path given with ``--config``.
        preset: names given with ``--preset``, joined by commas.
        aliases: alias name -> its row, for the conditions that are checked once everything is merged.
    """

    values: dict[str, Plain] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    config: str | None = None
    preset: str | None = None
    aliases: dict[str, Set | Accept] = field(default_factory=dict)

    def put(self, name: str, value: Plain, flag: str) -> None:
        """Store a value. Two spellings that disagree are refused; the same flag twice counts the last time."""
        if name in self.values and self.values[name] != value:
            before = self.origins[name]
            if before != flag:
                raise UserError(
                    f"{before} sets {name}={shown(self.values[name])} and {flag} sets {name}={shown(value)}: "
                    "they contradict; give one of them"
                )
            self.notes.append(f"{flag} was given twice; the last one, {shown(value)}, counts")
        self.values[name] = value
        self.origins[name] = flag


def parse_flags(argv: list[str], transformer_fields: Annotations) -> ParsedFlags:
    """Parse the whole command line.

    Raises:
        UserError: for an unknown flag (with the nearest name), a value of the wrong type, a missing value, a word
            that belongs to no flag, or a Megatron flag that cannot be honoured.
    """
    annotations = {name: info.annotation for name, info in fields().items()}
    known = {**transformer_fields, **annotations}
    parsed = ParsedFlags()
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f"unexpected word {shown(word)}: it belongs to no flag{_hint_for_word(word, known)}")
        spelled, _, inline = word.partition("=")
        name = spelled[2:].replace("-", "_")
        words = _Words(spelled, inline if "=" in word else None, rest)
        alias = ALIASES.get(name) if name not in annotations else None
        if name == "config":
            if parsed.config is not None:
                raise UserError(f"--config {parsed.config} and --config {words.one()}: give one YAML file")
            parsed.config = words.one()
        elif name == "preset":
            parsed.preset = ",".join(filter(None, [parsed.preset, *words.many()]))
        elif alias is not None:
            _apply_alias(parsed, name, alias, words, known)
        elif name in known:
            parsed.put(name, _read(name, known[name], words), spelled)
        elif name.startswith("no_") and is_bool(simplify(known.get(name[3:]))):
            words.none()
            parsed.put(name[3:], False, spelled)
        elif (reason := refusal(name)) and not get_close_matches(name, known, 1, cutoff=0.9):
            raise UserError(f"{spelled} is a flag of Megatron-LM that has no place here: {reason}")
        else:
            _refuse_unknown(spelled, name, known)
    return parsed


@dataclass
class _Words:
    """The words that follow one flag; taking them removes them from the command line."""

    flag: str
    inline: str | None
    rest: list[str]

    def none(self) -> None:
        if self.inline is not None:
            raise UserError(f"{self.flag}={self.inline}: {self.flag} takes no value; write {self.flag} alone")

    def one(self) -> str:
        if self.inline is not None:
            return self.inline
        if not self.rest or self.rest[0].startswith("--"):
            raise UserError(f"{self.flag} has no value; write {self.flag} VALUE")
        return self.rest.pop(0)

    def many(self) -> list[str]:
        taken = [self.one()]
        while self.inline is None and self.rest and not self.rest[0].startswith("--"):
            taken.append(self.rest.pop(0))
        return taken

    def truth(self) -> str:
        if self.inline is not None:
            return self.inline
        if self.rest and self.rest[0].lower() in ("true", "false"):
            return self.rest.pop(0)
        return "true"


def _read(name: str, annotation: Annotation, words: _Words) -> Plain:
    simple = simplify(annotation)
    if is_bool(simple):
        taken = [words.truth()]
    elif is_list(simple):
        taken = words.many()
    else:
        taken = [words.one()]
    return parse_words(name, taken, annotation, f"flag {words.flag}")


def _apply_alias(parsed: ParsedFlags, name: str, alias: Alias, words: _Words, known: Annotations) -> None:
    match alias:
        case Rename(field=target):
            _must_exist(words.flag, target, known)
            parsed.put(target, _read(target, known[target], words), words.flag)
        case Set(field=target, value=value):
            words.none()
            _must_exist(words.flag, target, known)
            parsed.aliases[name] = alias
            parsed.put(target, value, words.flag)
        case Accept(note=note):
            words.none()
            parsed.aliases[name] = alias
            parsed.notes.append(f"{words.flag}: {note}")
        case Choice(values=choices, reason=reason, cure=cure):
            word = words.one()
            if word not in choices:
                raise UserError(f"{words.flag} {word}: {reason}; {cure}")
            for target, value in choices[word].items():
                parsed.put(target, value, words.flag)
        case Refuse(reason=reason, cure=cure):
            raise UserError(f"{words.flag}: {reason}; {cure}")


def _must_exist(flag: str, target: str, known: Annotations) -> None:
    if target not in known:
        raise UserError(
            f"{flag} sets TransformerConfig.{target}, which the installed Megatron-Core does not have; leave it out"
        )


def _refuse_unknown(spelled: str, name: str, known: Annotations) -> None:
    flags = {key.replace("_", "-") for key in (*known, *ALIASES, "config", "preset", "help") if not key.startswith("_")}
    hint = nearest(name.replace("_", "-"), flags, "did you mean --{}?") or "--help lists every flag"
    raise UserError(f"unknown flag {spelled}; {hint}")


def _hint_for_word(word: str, known: Annotations) -> str:
    if word.startswith("-") and word.strip("-").replace("-", "_") in known:
        return f"; did you mean --{word.strip('-')}?"
    return "; flags begin with --, and a list of values directly follows its flag"
