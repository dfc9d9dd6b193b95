r"""Where a long text can be cut so that tokenizing its pieces gives the ids of the whole.

That depends on the tokenizer. Here are the ones about which it is known, by the parts of their ``tokenizer.json``; with
any other a text is tokenized in one go. A piece that is not the first is tokenized behind a few characters of the text
before it, whose tokens are dropped: so what a tokenizer puts in front of a text is not put in front of a piece.

A cut is at a place of one of three kinds, always between characters that no normalizer removes, joins or turns into
white space:

``line``
    after a line feed between two other characters: ``X\n|Y``;
``space``
    before a single space between two others: ``X| Y``;
``stop``
    after a full stop of Chinese or Japanese: ``。|Y``.

A pre-tokenizer that makes words of the text parts it there into two lists of words, and a model sees one word at a
time. A BPE model without one sees the whole text, but joins nothing across a place where no token of the vocabulary has
these two characters side by side. (Unigram does neither: the sums it compares are rounded otherwise in a longer text.)
"""

from __future__ import annotations

from dataclasses import dataclass

from phd_megatron.config.plain import Json, Plain

METASPACE = "▁"
#: Characters to each side of a place that are looked at, and the length of an added token more.
_REACH = 48
#: Alternatives of the regular expressions of GPT-2, GPT-4, GPT-4o, Llama 3, Qwen, Tekken and DeepSeek. None of them can
#: match a line feed and a letter or digit behind it, or a space behind something else than white space, and what they
#: match before such a place does not depend on what is behind it. (``[\r\n/]*`` is why it is a letter or digit.)
_ALTERNATIVES = frozenset(
    {
        *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d"),
        *(r" ?\p{L}+", r" ?\p{N}+", r" ?[^\s\p{L}\p{N}]+", r"\s+(?!\S)", r"\s+", r"\p{N}", r"\p{N}+", r"\p{N}{1,3}"),
        *("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)", "(?i:[sdmt]|ll|ve|re)"),
        *(r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?+\p{L}+", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"),
        *(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]++[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"),
        *(r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s*[\r\n]"),
        *(
            rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]{one}"
            rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]{two}{rest}"
            for one, two in (("*", "+"), ("+", "*"))
            for rest in ("", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?")
        ),
        *("[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+", r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"),
        r" ?[\p{P}\p{S}]+[\r\n]*",
    }
)
#: Runs of characters that are never white space: a split at their ends is inside of a word or at its end.
_RUNS = frozenset({r"\p{N}", r"\p{N}+", r"\p{N}{1,3}", r"\d", r"[0-9]", r"\d+", r"[0-9]+", "[一-龥぀-ゟ゠-ヿ]+"})


@dataclass(frozen=True)
class Rules:
    """What is known of a tokenizer.

    ``kinds``: of places, in the order in which they are tried. ``is_plain``: it changes no character and puts nothing
    in front of a text, so a place's neighbours need only not be white space. ``pairs``: with a model that sees the
    whole text, characters that are side by side in a token, and the characters that are tokens. ``unknown``: the token
    for what the vocabulary lacks, which says nothing of an added token where it is made, and does where it is written.
    """

    kinds: tuple[str, ...]
    is_plain: bool
    reach: int
    added: frozenset[int]
    unknown: str | None = None
    pairs: frozenset[str] | None = None
    characters: frozenset[str] = frozenset()


def rules_of(content: Json) -> Rules | None:
    """What is known of a tokenizer by the content of its ``tokenizer.json``.

    Returns:
        None when a text cannot be cut anywhere with certainty.
    """
    normalized = _normalization(_flat(content.get("normalizer"), "normalizers"))
    if normalized is None:
        return None
    kinds = _kinds(_flat(content.get("pre_tokenizer"), "pretokenizers"), normalized)
    model = content.get("model") or {}
    if model.get("dropout"):
        return None
    pairs: frozenset[str] | None = None
    characters: frozenset[str] = frozenset()
    if kinds == ("whole",):
        if (
            model.get("type") != "BPE"
            or normalized.joins
            or any(model.get(name) for name in ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix"))
        ):
            return None
        tokens = [token for token in model.get("vocab") or {} if isinstance(token, str)]
        pairs = frozenset(token[i : i + 2] for token in tokens for i in range(len(token) - 1))
        characters = frozenset(token for token in tokens if len(token) == 1)
        kinds = ("space", "stop") if normalized.space == METASPACE else ()
    added = content.get("added_tokens") or []
    if not normalized.is_none and any(
        token.get("normalized") and any(map(str.isspace, token["content"])) for token in added
    ):
        return None
    if not kinds:
        return None
    unknown = model.get("unk_token")
    if model.get("type") == "Unigram" and isinstance(index := model.get("unk_id"), int):
        unknown = model["vocab"][index][0]
    return Rules(
        kinds=kinds,
        is_plain=normalized.is_none and _is_gpt2(content.get("pre_tokenizer")),
        reach=_REACH + 2 * max((len(token["content"]) for token in added), default=0),
        added=frozenset(token["id"] for token in added if token["content"] != unknown),
        unknown=unknown,
        pairs=pairs,
        characters=characters,
    )


def _is_gpt2(pre_tokenizer: Plain) -> bool:
    """The one that ``prepare`` trains too: words by GPT-2's expression, nothing put in front."""
    return bool(
        isinstance(pre_tokenizer, dict)
        and pre_tokenizer.get("type") == "ByteLevel"
        and pre_tokenizer.get("use_regex", True)
        and not pre_tokenizer.get("add_prefix_space", True)
    )


def _flat(part: Json | None, name: str) -> list[Json]:
    if part is None:
        return []
    if part.get("type") == "Sequence":
        return [inner for outer in part.get(name) or [] for inner in _flat(outer, name)]
    return [part]


@dataclass
class _Normalized:
    """What becomes of white space."""

    space: str = " "
    keeps_lines: bool = True  #: a line feed stays one, also at the end of a text
    spreads: bool = False  #: it adds spaces of its own
    joins: bool = False  #: it makes one thing of several characters that are no white space
    is_none: bool = True


def _normalization(parts: list[Json]) -> _Normalized | None:
    result = _Normalized(is_none=not parts)
    for part in parts:
        kind = part.get("type")
        if kind in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Prepend"):
            continue
        if kind == "Strip":
            result.keeps_lines &= not part.get("strip_right")
        elif kind == "Replace":
            if not _replaces_inside(part, result):
                return None
        elif kind in ("BertNormalizer", "Nmt", "Precompiled"):
            result.keeps_lines = False
            result.spreads |= kind == "BertNormalizer"
        else:
            return None
    return result


def _replaces_inside(part: Json, result: _Normalized) -> bool:
    """Whether a replacement leaves a single space a space, or makes it the sign for one, and touches no line feed."""
    pattern, new = part.get("pattern") or {}, part.get("content")
    old = pattern.get("String")
    if not isinstance(new, str):
        return False
    if old == " " and new == METASPACE:
        result.space = METASPACE
        return True
    if pattern.get("Regex") == " {2,}":
        return new in (" ", METASPACE)
    if not isinstance(old, str) or not old or not new:
        return False
    result.joins |= len(old) > 1
    return not any(character.isspace() or character == METASPACE for character in old + new)


def _kinds(parts: list[Json], normalized: _Normalized) -> tuple[str, ...]:
    """Kinds of places at which words end; ("whole",) when there are no words."""
    for part in parts:
        kind = part.get("type")
        if kind in ("BertPreTokenizer", "Whitespace", "WhitespaceSplit"):
            return ("line", "space") if normalized.space == " " else ("line",) if normalized.keeps_lines else ()
        if normalized.spreads:
            return ()
        if kind == "Metaspace":
            if part.get("replacement") != METASPACE:
                return ()
            normalized.space = METASPACE
            if part.get("split", True):
                return ("space",)
        elif (kind == "ByteLevel" and part.get("use_regex", True)) or (kind == "Split" and _is_known(part)):
            lines = ("line",) if normalized.keeps_lines else ()
            return (*lines, "space") if normalized.space == " " else lines
        elif not _is_inside_words(part, normalized):
            return ()
    return () if normalized.spreads or not (normalized.keeps_lines or normalized.space == METASPACE) else ("whole",)


def _is_inside_words(part: Json, normalized: _Normalized) -> bool:
    """Whether a pre-tokenizer parts a text between two characters by these two alone, and never at white space."""
    kind, pattern = part.get("type"), part.get("pattern") or {}
    if kind == "Digits":
        return True
    if kind == "Punctuation":
        return part.get("behavior") in ("Isolated", "Contiguous")
    if kind != "Split" or part.get("invert"):
        return False
    if pattern.get("String") == " " and normalized.space == METASPACE:
        return True  # there is none left
    return part.get("behavior") == "Isolated" and pattern.get("Regex") in _RUNS


def _is_known(split: Json) -> bool:
    expression = (split.get("pattern") or {}).get("Regex")
    keeps_all = (split.get("behavior"), bool(split.get("invert"))) in (("Isolated", False), ("Removed", True))
    if not isinstance(expression, str) or not keeps_all:
        return False
    parts = _alternatives(expression.replace("\r", r"\r").replace("\n", r"\n"))
    return parts[-1] == r"\s+" and all(part in _ALTERNATIVES for part in parts)


def _alternatives(expression: str) -> list[str]:
    """The parts of a regular expression between its outermost ``|``."""
    parts, depth, in_class, escaped = [""], 0, False, False
    for character in expression:
        if not escaped and not in_class and depth == 0 and character == "|":
            parts.append("")
            continue
        parts[-1] += character
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif in_class:
            in_class = character != "]"
        elif character == "[":
            in_class = True
        else:
            depth += (character == "(") - (character == ")")
    return parts
