"""Tokenizers: raw bytes, byte-level BPE trained by ``prepare``, or a Hugging Face directory.

All of them encode without adding special tokens; the end-of-document id is appended by ``prepare``. ``save`` writes a
directory that ``transformers.AutoTokenizer`` loads with the same ids.
"""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from phd_megatron.config.plain import Plain
from phd_megatron.data.cut_rules import rules_of
from phd_megatron.data.cuts import Anywhere, Cutter, WordCutter
from phd_megatron.data.generation import GENERATION_FILE, Values, read_generation, write_generation
from phd_megatron.data.tokenizer_files import (
    TOKENIZER_FILES,
    check_tokenizer_files,
    copy_tokenizer_files,
    harmless,
    read_mapping,
)
from phd_megatron.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library
    from transformers import PreTrainedTokenizerBase

EOD_TOKEN = "<|endoftext|>"

logger = logging.getLogger(__name__)
#: Tried in this order when a directory does not say which token ends a document.
_EOD_CANDIDATES = (EOD_TOKEN, "<|end_of_text|>", "</s>", "<eos>", "<|eod|>", "<|im_end|>")


class Tokenizer(ABC):
    """Text to ids and back. ``vocab_size`` is the true one: the largest id + 1, without padding.

    Attributes:
        generation: defaults of generation that travel with it, see :mod:`.generation`.
    """

    vocab_size: int
    eod: int
    pad: int

    def __init__(self) -> None:
        self.generation: Values = {}

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, one 1-D integer array each. This is the fast path."""

    @abstractmethod
    def detokenize(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``. Byte sequences that are not UTF-8 become U+FFFD; ids outside the vocabulary are left out."""

    @property
    @abstractmethod
    def unique_identifiers(self) -> dict[str, str | int]:
        """What tells two tokenizers apart, independent of where they lie; part of the index-cache key."""

    def save(self, directory: str | Path) -> None:
        """Write a directory that ``load_tokenizer`` and ``transformers.AutoTokenizer`` read."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        home: Path | None = getattr(self, "directory", None)
        if home is not None and home.resolve() == Path(directory).resolve():
            return
        self._save(Path(directory))
        write_generation(self.generation, Path(directory))

    @abstractmethod
    def _save(self, directory: Path) -> None:
        """Write the tokenizer's own files into a directory that is there."""

    def cutter(self) -> Cutter | None:
        """Where a long text can be cut with the ids of the whole; None: nowhere, as far as is known."""
        return None

    def tokenize(self, text: str) -> list[int]:
        """Ids of ``text``, without any added special token."""
        ids: list[int] = self.encode_batch([text])[0].tolist()
        return ids


def byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers of the ``tokenizers`` library use for each of the 256 bytes.

    Printable Latin-1 bytes stand for themselves, the others are moved behind U+0100 in order (GPT-2's table).
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    moved = iter(range(256))
    return [chr(byte) if byte in printable else chr(256 + next(moved)) for byte in range(256)]


class ByteTokenizer(Tokenizer):
    """Id = byte of the UTF-8 text; 256 is the end of a document, and padding too."""

    vocab_size = 257
    eod = 256
    pad = 256

    def cutter(self) -> Cutter:
        return Anywhere()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]

    def detokenize(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        parts: list[str] = []
        run = bytearray()
        for token in ids:
            if 0 <= token < 256:
                run.append(token)
            elif token == self.eod and not skip_special_tokens:
                parts.append(run.decode("utf-8", "replace") + EOD_TOKEN)
                run.clear()
        return "".join(parts) + run.decode("utf-8", "replace")

    @property
    def unique_identifiers(self) -> dict[str, str | int]:
        return {"class": "byte", "vocab_size": self.vocab_size, "eod": self.eod}

    def _save(self, directory: Path) -> None:
        from tokenizers import AddedToken, decoders, pre_tokenizers
        from tokenizers import Tokenizer as Library
        from tokenizers.models import BPE

        library = Library(BPE(vocab={char: byte for byte, char in enumerate(byte_characters())}, merges=[]))
        # No regex: words would only cost time, there is nothing to merge inside them.
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.decoder = decoders.ByteLevel()
        library.add_special_tokens([AddedToken(EOD_TOKEN, special=True, normalized=False)])
        write_library_tokenizer(library, directory)


def write_library_tokenizer(library: Library, directory: str | Path) -> None:
    """Write a ``tokenizers.Tokenizer`` whose EOD and padding is ``EOD_TOKEN`` as a Hugging Face directory.

    ``split_special_tokens`` makes a literal ``<|endoftext|>`` inside a document plain text, not an end of document.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    library.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOD_TOKEN,
        "pad_token": EOD_TOKEN,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "model_max_length": 1_000_000_000,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _token_text(value: Plain) -> str | None:
    """A token as Hugging Face files write it: a string, or an object with ``content``."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


class _DirectoryTokenizer(Tokenizer):
    """Common parts of the two ways to read a Hugging Face directory."""

    def __init__(self, directory: Path, vocabulary: dict[str, int]) -> None:
        super().__init__()
        self.directory = directory
        self.settings = read_mapping(directory / "tokenizer_config.json")
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self._eod_text, self.eod = self._find_eod(vocabulary)
        pad = _token_text(self.settings.get("pad_token"))
        self.pad = vocabulary.get(pad, self.eod) if pad is not None else self.eod

    def _find_eod(self, vocabulary: dict[str, int]) -> tuple[str, int]:
        special = read_mapping(self.directory / "special_tokens_map.json")
        for source in (self.settings, special):
            text = _token_text(source.get("eos_token"))
            if text is not None and text in vocabulary:
                return text, vocabulary[text]
        by_id = {index: text for text, index in vocabulary.items()}
        for name in ("generation_config.json", "config.json"):
            ids = read_mapping(self.directory / name).get("eos_token_id")
            first = ids[0] if isinstance(ids, list) and ids else ids
            if isinstance(first, int) and first in by_id:
                return by_id[first], first
        for text in _EOD_CANDIDATES:
            if text in vocabulary:
                return text, vocabulary[text]
        raise UserError(
            f"tokenizer {self.directory} names no end-of-document token: no eos_token in tokenizer_config.json or "
            f"special_tokens_map.json that is in the vocabulary, no eos_token_id in config.json, and none of "
            f"{', '.join(_EOD_CANDIDATES)}; set eos_token in tokenizer_config.json to a token of the vocabulary"
        )

    @cached_property
    def unique_identifiers(self) -> dict[str, str | int]:
        digest = hashlib.sha256()
        for name in TOKENIZER_FILES:
            path = self.directory / name
            # Settings such as a chat template do not change ids.
            if path.is_file() and name not in ("tokenizer_config.json", "chat_template.jinja"):
                digest.update(name.encode() + b"\0" + path.read_bytes())
        return {
            "class": "huggingface",
            "sha256": digest.hexdigest(),
            "vocab_size": self.vocab_size,
            "eod": self.eod,
        }

    def _save(self, directory: Path) -> None:
        copy_tokenizer_files(self.directory, directory)
        if _token_text(self.settings.get("eos_token")) != self._eod_text:
            # It was found in a file that is not copied, so say it where every reader looks first.
            settings = {**harmless(self.settings), "eos_token": self._eod_text}
            text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
            (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


class LibraryTokenizer(_DirectoryTokenizer):
    """A directory with ``tokenizer.json``, read by the ``tokenizers`` library (no transformers needed)."""

    def __init__(self, directory: Path) -> None:
        from tokenizers import Tokenizer as Library

        try:
            self._library = Library.from_file(str(directory / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"{directory / 'tokenizer.json'} cannot be read by the tokenizers library ({error}); copy it again, or "
                f"upgrade with `pip install -U tokenizers`"
            ) from error
        self._library.no_truncation()
        self._library.no_padding()
        super().__init__(directory, self._library.get_vocab(with_added_tokens=True))
        self._library.encode_special_tokens = bool(self.settings.get("split_special_tokens", False))

    def cutter(self) -> Cutter | None:
        rules = rules_of(json.loads(self._library.to_str()))
        normalizer = self._library.normalizer
        normalize = (lambda text: text) if normalizer is None else normalizer.normalize_str
        return None if rules is None else WordCutter(rules, self, normalize)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]

    def detokenize(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self._library.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)
        return text


class TransformersTokenizer(_DirectoryTokenizer):
    """A directory without ``tokenizer.json`` (slow or SentencePiece tokenizers), read by ``transformers``."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            raise UserError(
                f"{directory} holds no tokenizer.json and transformers cannot read it as a tokenizer either ({error}); "
                f"give a directory that AutoTokenizer.from_pretrained loads"
            ) from error
        super().__init__(directory, self._tokenizer.get_vocab())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        batch = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [np.asarray(ids, dtype=np.int64) for ids in batch]

    def detokenize(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text


def _is_byte_directory(directory: Path) -> bool:
    """Whether ``directory`` is what ``ByteTokenizer.save`` writes, judged by content so that copies count too."""
    content = read_mapping(directory / "tokenizer.json")
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("merges"):
        return False
    vocab = {char: byte for byte, char in enumerate(byte_characters())}
    pre, added = content.get("pre_tokenizer"), content.get("added_tokens")
    if not isinstance(pre, dict) or not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        return False  # for the library to refuse, where it does
    return (
        model.get("vocab") == vocab
        and content.get("normalizer") is None
        and pre.get("type") == "ByteLevel"
        and not pre.get("add_prefix_space", True)
        and [(token.get("id"), token.get("content")) for token in added] == [(256, EOD_TOKEN)]
    )


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer called ``byte``, or in a directory. Raises UserError (``bpe:N`` exists only while preparing)."""
    if str(spec) == "byte":
        return ByteTokenizer()
    if str(spec).startswith("bpe:"):
        raise UserError(
            f"tokenizer {str(spec)!r} is trained by `phd-megatron prepare`; afterwards name the directory it wrote, "
            f"OUTPUT_PREFIX.tokenizer, or leave the tokenizer out, which takes the data's own"
        )
    directory = Path(spec)
    if not directory.is_dir():
        raise UserError(
            f"tokenizer {str(spec)!r} is neither 'byte' nor an existing directory; models are not downloaded here, so "
            f"fetch one first, for example with `hf download NAME --local-dir DIR`, and give DIR"
        )
    check_tokenizer_files(directory)
    tokenizer: Tokenizer
    if not (directory / "tokenizer.json").is_file():
        tokenizer = TransformersTokenizer(directory)
    else:
        tokenizer = ByteTokenizer() if _is_byte_directory(directory) else LibraryTokenizer(directory)
    try:
        tokenizer.generation = read_generation(directory)[0]
    except UserError as error:  # ids do not depend on it
        logger.warning("%s; the tokenizer is read without", error)
    return tokenizer


def inherit_generation(tokenizer: Tokenizer, directory: Path) -> None:
    """Give a tokenizer without defaults of generation those that lie beside the same one in ``directory``."""
    if tokenizer.generation or not (directory / GENERATION_FILE).is_file():
        return
    before = load_tokenizer(directory)
    if before.unique_identifiers == tokenizer.unique_identifiers:
        tokenizer.generation = before.generation
