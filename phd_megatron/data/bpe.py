"""Training of a byte-level BPE tokenizer on a bounded sample of the corpus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from phd_megatron.data.tokenizers import EOD_TOKEN, write_library_tokenizer
from phd_megatron.errors import UserError

#: The trainer's memory grows with the number of distinct words it has seen, so it sees at most about this much text.
SAMPLE_CHARACTERS = 32 << 20
_LARGEST = 1_000_000  # the largest vocabularies that are in use have a quarter of that


@dataclass(frozen=True)
class BpeTraining:
    """What a tokenizer was trained on. ``vocab_size`` is below the wanted one when the text had no more merges."""

    vocab_size: int
    sampled_characters: int
    stride: int


def parse_bpe(spec: str) -> int | None:
    """N of ``bpe:N``; None for another kind of tokenizer. Raises UserError when N is no integer from 257 on."""
    if not spec.startswith("bpe:"):
        return None
    text = spec[4:]
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not 257 <= int(text) <= _LARGEST:
        shown = spec if len(spec) <= 40 else f"{spec[:40]}..."
        raise UserError(
            f"tokenizer {shown!r}: the size of the vocabulary must be an integer of at least 257 (256 bytes and the "
            f"end-of-document token) and at most {_LARGEST}; write for example bpe:4096"
        )
    return int(text)


def _sample(batches: Iterable[list[str]], stride: int, counter: list[int]) -> Iterator[list[str]]:
    """Every ``stride``-th batch, until SAMPLE_CHARACTERS are reached."""
    for index, batch in enumerate(batches):
        if index % stride == 0:
            counter[0] += sum(map(len, batch))
            yield batch
            if counter[0] >= SAMPLE_CHARACTERS:
                return


def train_bpe(batches: Iterable[list[str]], size: int, stride: int, directory: str | Path) -> BpeTraining:
    """Train on every ``stride``-th batch of texts and write a Hugging Face tokenizer directory. Deterministic.

    Raises UserError when there is no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[EOD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        # A pre-token longer than this is base64 or a table, and one such word can hold the trainer up for minutes.
        max_token_length=64,
    )
    counter = [0]
    library.train_from_iterator(_sample(batches, stride, counter), trainer=trainer)
    if counter[0] == 0:
        raise UserError("the input holds no text to train a BPE tokenizer on; check --input and --json-key")
    write_library_tokenizer(library, directory)
    return BpeTraining(vocab_size=library.get_vocab_size(), sampled_characters=counter[0], stride=stride)
