"""A text that is tokenized in pieces has the ids of the text in one go, for every kind of tokenizer."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from phd_megatron.data import readers
from phd_megatron.data.cut_rules import rules_of
from phd_megatron.data.encode import batches_of, encode_pieces
from phd_megatron.data.preprocess import prepare
from phd_megatron.data.readers import ReadReport, read_pieces
from phd_megatron.data.tokenizers import load_tokenizer

SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (  # with line feeds themselves in it
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|"
    " ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
BYTES = pre_tokenizers.ByteLevel.alphabet()
N, P = normalizers, pre_tokenizers


def words(*parts):
    return P.Sequence(list(parts)) if len(parts) > 1 else parts[0]


def split(expression, behavior="isolated", invert=False):
    return P.Split(Regex(expression), behavior, invert)


def llama2(*more):
    return N.Sequence([*more, N.Prepend("▁"), N.Replace(" ", "▁")])


BYTE_LEVEL = P.ByteLevel(add_prefix_space=False, use_regex=False)
SENTENCEPIECE = N.Sequence([N.NFKC(), N.Replace(Regex(" {2,}"), " ")])
#: name -> model, normalizer, pre-tokenizer, whether a text of words and lines is cut
KINDS = {
    "gpt2": ("bpe", None, P.ByteLevel(add_prefix_space=False), True),
    "gpt2 with a space in front": ("bpe", None, P.ByteLevel(add_prefix_space=True), True),
    "gpt2 nfc": ("bpe", N.NFC(), P.ByteLevel(add_prefix_space=False), True),
    "llama 3": ("bpe", None, words(split(GPT4), BYTE_LEVEL), True),
    "qwen": ("bpe", N.NFC(), words(split(GPT4.replace("{1,3}", "")), BYTE_LEVEL), True),
    "gpt-4o": ("bpe", None, words(split(GPT4O), BYTE_LEVEL), True),
    "tiktoken": ("bpe", None, words(split(GPT4O, "removed", True), BYTE_LEVEL), True),
    "deepseek": (
        "bpe", None, words(split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK), BYTE_LEVEL), True
    ),
    "starcoder": ("bpe", None, words(P.Digits(individual_digits=True), P.ByteLevel(add_prefix_space=False)), True),
    "gpt2 lower case, no accents": (
        "bpe", N.Sequence([N.NFD(), N.StripAccents(), N.Lowercase()]), P.ByteLevel(add_prefix_space=False), True
    ),
    "gpt2 stripped": ("bpe", N.Strip(), P.ByteLevel(add_prefix_space=True), True),
    "gpt2 replaced": ("bpe", N.Replace("ab", "ü"), P.ByteLevel(add_prefix_space=False), True),
    "llama 2": ("sp-bpe", llama2(), None, True),
    "llama 2 nfkc": ("sp-bpe", llama2(N.NFKC()), None, True),
    "gemma": ("sp-bpe", N.Replace(" ", "▁"), P.Split(" ", "merged_with_previous"), True),
    "mistral": ("sp-bpe", None, P.Metaspace(prepend_scheme="first", split=False), True),
    "metaspace always, unsplit": ("sp-bpe", None, P.Metaspace(prepend_scheme="always", split=False), True),
    "metaspace first": ("sp-bpe", None, P.Metaspace(prepend_scheme="first"), True),
    "metaspace always": ("sp-bpe", None, P.Metaspace(prepend_scheme="always"), True),
    "metaspace never": ("sp-bpe", None, P.Metaspace(prepend_scheme="never"), True),
    "unigram metaspace": ("unigram", SENTENCEPIECE, P.Metaspace(), True),
    "t5": ("unigram", SENTENCEPIECE, words(P.WhitespaceSplit(), P.Metaspace()), True),
    "albert": (
        "unigram",
        N.Sequence([N.Replace("``", '"'), N.NFKD(), N.StripAccents(), N.Lowercase(), N.Replace(Regex(" {2,}"), " ")]),
        P.Metaspace(),
        True,
    ),
    "unigram stripped": (
        "unigram", N.Sequence([N.Nmt(), N.NFKC(), N.Strip(left=False), N.Replace(Regex(" {2,}"), "▁")]), P.Metaspace(),
        True,
    ),
    "unigram of the whole text": ("unigram", llama2(), None, False),
    "bert": ("wordpiece", N.BertNormalizer(), P.BertPreTokenizer(), True),
    "bert cased": ("wordpiece", N.BertNormalizer(lowercase=False, clean_text=False), P.BertPreTokenizer(), True),
    "whitespace": ("wordlevel", None, P.Whitespace(), True),
    "whitespace, digits": ("wordpiece", None, words(P.WhitespaceSplit(), P.Digits(), P.Punctuation()), True),
    "bert before bytes": ("bpe", N.BertNormalizer(), P.ByteLevel(), False),
    "sevens": ("bpe", None, words(split("(?m).{1,7}"), BYTE_LEVEL), False),
    "fixed length": ("bpe", None, words(P.FixedLength(5), BYTE_LEVEL), False),
    "other regex": ("bpe", None, words(split(r"\s?\w+\s?|\s+"), BYTE_LEVEL), False),
    "newlines replaced": ("bpe", N.Replace("\n", " "), P.ByteLevel(add_prefix_space=False), False),
    "words of two": ("bpe", N.Replace(Regex(r"(\w) (\w)"), "$1_$2"), P.ByteLevel(add_prefix_space=False), False),
    "bytes without words": ("bpe", None, BYTE_LEVEL, False),
    "scripts": ("bpe", None, words(P.UnicodeScripts(), P.ByteLevel(add_prefix_space=False)), False),
    "character": ("sp-bpe", None, P.CharDelimiterSplit("e"), False),
}  # fmt: skip
ADDED = [
    AddedToken("<s>", special=True, normalized=False),
    AddedToken("</s>", special=True, normalized=False),
    AddedToken("<mask>", special=True, lstrip=True, rstrip=True, normalized=False),
    AddedToken("[SEP]", special=True, normalized=False),
    AddedToken("<A B>", special=False, normalized=False),
    AddedToken("<a\nb>", special=False, normalized=False),
    AddedToken("new", special=False, single_word=True, normalized=False),
    AddedToken("ﬁne", special=False, normalized=True),
    AddedToken("Weiß", special=False, normalized=True, lstrip=True),
]
TEXT = "the cat sat on the mat; a naïve fiancée met 1234567 cats, didn't she? 漢字の文。次の文！ ab abab value_1 = 7\n"
ALPHABET = [
    *("the", "cat", "naïve", "value_1", "didn't", "12345", "ab", "Weiß", "ﬁne", "fine", "new", "news", "x" * 30),
    *(" ", " ", " ", " ", " ", "  ", "   ", "\n", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u200b"),
    *("。", "！", "漢", "字", "の", "e\u0301", "\u0301", "´", "½", "ﬃ", "ⅷ", "각", "\u1100", "\u1161", "\u11a8"),
    *("▁", "▁▁", "``", "'s", "/", "//", ".", ",", ";", "(", ")", "\x01", "\x85", "\u2028", "İ", "Σ", "ς", "ا"),
    *("\u0d4e", "\ufeff", "👩\u200d👧"),
    *("<s>", "</s>", "<mask>", "[SEP]", "<A B>", "<a\nb>", "[", "<", "<mas", "k>", "<0x41>"),
]  # fmt: skip


def build(name, directory: Path, with_added: bool):
    kind, normalizer, pre, _ = KINDS[name]
    corpus = [TEXT * 3, TEXT.lower(), "words and more words, of many kinds: 12 34 5678. " * 5]
    if kind == "unigram":
        library = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=150, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
        )
    elif kind == "wordpiece":
        library = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
    elif kind == "wordlevel":
        library = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        trainer = trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False)
    elif kind == "bpe":
        library = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(vocab_size=450, initial_alphabet=BYTES, show_progress=False)
    else:
        library = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=["<unk>", *byte_tokens], show_progress=False)
    if normalizer is not None:
        library.normalizer = normalizer
    if pre is not None:
        library.pre_tokenizer = pre
    library.decoder = decoders.ByteLevel()
    if kind == "sp-bpe":  # of whole texts a trainer would learn whole sentences, which no real vocabulary holds
        corpus = [f" {word}" for word in " ".join(corpus).split()]
    library.train_from_iterator(corpus, trainer)
    content = json.loads(library.to_str())
    if kind == "sp-bpe":  # as in Llama 2, bytes are tokens of the vocabulary only
        content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
        library = Tokenizer.from_str(json.dumps(content))
    library.add_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    if with_added:
        library.add_tokens(ADDED)
    directory.mkdir(parents=True, exist_ok=True)
    library.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return load_tokenizer(directory)


def sample(generator: random.Random, size: int) -> str:
    """Mostly words between single spaces and line feeds, with anything in between."""
    parts = ["a"]  # a mark of byte order is no text only at the start
    while sum(map(len, parts)) < size:
        if generator.random() < 0.5:
            parts += [
                generator.choice(["cat", "the", "7", "x;", "漢字。", "value_1"]),
                generator.choice([" ", " ", "\n"]),
            ]
        else:
            parts.append(generator.choice(ALPHABET))
    return "".join(parts)


def in_pieces(tokenizer, path: Path) -> tuple[list[int], int]:
    pieces = list(read_pieces([path], ReadReport(), cutter=tokenizer.cutter()))
    assert "".join(piece.text for piece in pieces) == path.read_bytes().decode()
    ids: list[int] = []
    for batch in batches_of(pieces, 1000):
        encoded = encode_pieces(tokenizer, batch, False, np.int32)
        assert encoded.lengths.sum() == len(encoded.tokens)
        ids += encoded.tokens.tolist()
    return ids, len(pieces)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "PIECE_CHARACTERS", 200)
    monkeypatch.setattr(readers, "_ONE_GO_BYTES", 0)


@pytest.mark.parametrize("with_added", [False, True], ids=["", "added"])
@pytest.mark.parametrize("name", KINDS)
def test_pieces_have_the_ids_of_the_whole(
    name: str, with_added: bool, tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = build(name, tmp_path / "t", with_added)
    generator = random.Random(7)
    path = tmp_path / "a.txt"
    path.write_text(TEXT * 40, newline="")
    ids, pieces = in_pieces(tokenizer, path)
    assert ids == tokenizer.tokenize(TEXT * 40)
    assert (pieces > 5) == KINDS[name][-1]
    for _ in range(12):
        text = sample(generator, 3000)
        path.write_text(text, newline="")
        assert in_pieces(tokenizer, path)[0] == tokenizer.tokenize(text), repr(text)


@pytest.mark.parametrize("name", ["gpt2", "llama 3", "mistral", "metaspace always", "bert", "t5"])
def test_pieces_do_not_depend_on_how_a_file_is_read(
    name: str, tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = build(name, tmp_path / "t", True)
    generator, path = random.Random(3), tmp_path / "a.txt"
    for number in range(8):
        text = sample(generator, 4000) if number else "x" * 3000 + TEXT * 30 + "漢" * 5000
        path.write_text(text, newline="")
        seen = []
        for block in (13, 100, 1 << 20):
            monkeypatch.setattr(readers, "_READ_BYTES", block)
            seen.append(list(read_pieces([path], ReadReport(), cutter=tokenizer.cutter())))
        assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("name", [name for name, (_, _, _, is_cut) in KINDS.items() if is_cut])
def test_places_are_exact_in_every_surrounding(name: str, tmp_path: Path) -> None:
    """Not only where the cutter looks: between all short texts around a place that it takes."""
    tokenizer = build(name, tmp_path / "t", False)
    cutter = tokenizer.cutter()
    assert cutter is not None
    ends = ["", "a", ";", "\n", " ", "7", "漢", "'", "\r\n", "/", "é"]
    count = 0
    for left, middle, right in itertools.product(
        itertools.product(ends, ends), ["a\nb", "a b", ";\na", "a /", "7 8", "7\n8", "漢 字", "a\n漢", "。漢"], ends
    ):
        text = "a" + "".join(left) + middle + right + "a"
        place = cutter.last(text, 0, len(text) - len(right) - 3, len(text) - len(right) - 1)
        if place is None:
            continue
        count += 1
        context = cutter.context(text, place)
        behind = tokenizer.tokenize(context + text[place:])
        dropped = len(tokenizer.tokenize(context)) if context else 0
        assert tokenizer.tokenize(text[:place]) + behind[dropped:] == tokenizer.tokenize(text), (text, place)
    assert count > 300


def test_real_sizes(tmp_path: Path) -> None:
    """Above 98,304 characters, as users have them, and with what Llama 2 would put in front of every piece."""
    tokenizer = build("llama 2", tmp_path / "t", False)
    text = TEXT * 3000
    (tmp_path / "a.txt").write_text(text, newline="")
    result = prepare([tmp_path / "a.txt"], tmp_path / "d", tmp_path / "t", append_eod=False, progress=False)
    assert result.sequences >= 5
    ids = np.fromfile(tmp_path / "d.bin", np.uint16)
    assert ids.tolist() == tokenizer.tokenize(text)


def test_a_text_that_cannot_be_cut_comes_in_several_sequences(tmp_path: Path, small_pieces: None) -> None:
    tokenizer = build("sevens", tmp_path / "t", False)
    (tmp_path / "a.txt").write_text("no words " * 500)
    result = prepare([tmp_path / "a.txt"], tmp_path / "d", tmp_path / "t", progress=False)
    assert (result.documents, result.sequences) == (1, 22)
    ids = np.fromfile(tmp_path / "d.bin", np.uint16).tolist()
    assert ids == [*tokenizer.tokenize("no words " * 500), tokenizer.eod]


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"dropout": 0.1}},
        {"model": {"ignore_merges": True}, "pre_tokenizer": None},
        {"model": {"end_of_word_suffix": "</w>"}, "pre_tokenizer": None},
        {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": ""}},
        {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": " "}},
        {"normalizer": {"type": "ByteLevel"}},
        {"normalizer": {"type": "Something"}},
        {"pre_tokenizer": {"type": "Something"}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "_"}},
        {"normalizer": {"type": "NFC"}, "added_tokens": [{"id": 1, "content": "a b", "normalized": True}]},
    ],
)
def test_what_is_not_known_is_not_cut(change: dict, tmp_path: Path) -> None:
    build("metaspace always, unsplit", tmp_path, False)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    assert rules_of(content) is not None
    model = {**content["model"], **change.get("model", {})}
    assert rules_of({**content, **change, "model": model}) is None


@pytest.mark.parametrize("content", ["a b", "a\u00a0b", "a\n"])
def test_white_space_in_a_token_that_is_normalised_forbids_cuts(content):
    """Where the normalised text holds the token, and so no place in it, is not where the text does."""
    for normalizer, normalized, cut in ((N.NFC(), True, False), (N.NFC(), False, True), (None, True, True)):
        tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(BYTES)}, merges=[]))
        tokenizer.pre_tokenizer = P.ByteLevel(add_prefix_space=False)
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        tokenizer.add_tokens([AddedToken(content, special=False, normalized=normalized)])
        assert (rules_of(json.loads(tokenizer.to_str())) is not None) is cut, (normalizer, normalized)
    tokenizer.normalizer = N.NFC()
    assert rules_of(json.loads(tokenizer.to_str())) is None
