"""``prepare merge``: several data sets joined into one, byte for byte what Megatron's ``merge_datasets.py`` makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phd_megatron import __version__
from phd_megatron.config.plain import Json
from phd_megatron.data.indexed import IndexedInfo, IndexedWriter, check_indexed
from phd_megatron.data.output import Output, explained, sidecar_of
from phd_megatron.data.tokenizers import load_tokenizer
from phd_megatron.data.verify import verify_index
from phd_megatron.errors import UserError

_BLOCK = 1 << 22  # bytes of tokens, a multiple of any token's
_SAME = ("class", "vocab_size", "eod", "sha256")
_SUMMED = ("text_bytes", "empty_documents", "files")


@dataclass(frozen=True)
class MergeResult:
    """What was written."""

    prefix: str
    documents: int
    sequences: int
    tokens: int
    has_tokenizer: bool


def merge(inputs: Sequence[str], output_prefix: str, *, overwrite: bool = False) -> MergeResult:
    """Write ``PREFIX.bin`` and ``PREFIX.idx`` with the documents of all ``inputs`` in their order.

    The tokenizer and a sidecar come along where the inputs have them. Memory does not grow with the data.

    Raises:
        UserError: for inputs that are damaged or do not fit together, before anything is written, and for an output
            that exists.
    """
    infos = _checked(inputs, output_prefix)
    sidecar, tokenizer = _joined(infos)
    with explained(output_prefix), Output(output_prefix, overwrite) as output:
        if tokenizer is not None:
            load_tokenizer(tokenizer).save(output.directory / "tokenizer")
        with IndexedWriter(output.directory, infos[0].dtype.type) as writer:
            for info in infos:
                _add(writer, info)
            writer.finish()
        if sidecar is not None:
            sidecar |= {"documents": writer.documents, "sequences": writer.sequences, "tokens": writer.tokens}
        output.publish(sidecar)
    return MergeResult(output.prefix, writer.documents, writer.sequences, writer.tokens, tokenizer is not None)


def _checked(inputs: Sequence[str], output_prefix: str) -> list[IndexedInfo]:
    if len(inputs) < 2:
        raise UserError(f"--input {' '.join(inputs)}: one data set is nothing to join; name two or more")
    infos: list[IndexedInfo] = []
    seen: dict[Path, str] = {Path(f"{output_prefix}.bin").resolve(): output_prefix}
    for prefix in inputs:
        info = check_indexed(prefix, "--input")
        place = Path(f"{prefix}.bin").resolve()
        if place in seen:
            what = "is the output too" if seen[place] == output_prefix else "is there twice"
            raise UserError(
                f"--input {prefix!r} {what}; name each data set once, and another --output-prefix than any of them (a "
                "blend with weights, in data_path, repeats a data set)"
            )
        seen[place] = prefix
        if info.dtype != (first := infos[0] if infos else info).dtype:
            raise UserError(
                f"--input {prefix!r} holds tokens as {info.dtype}, and {first.prefix!r} as {first.dtype}, as of "
                "different vocabularies; prepare them with one tokenizer"
            )
        infos.append(info)
    for info in infos:
        verify_index(info)
    return infos


def _joined(infos: Sequence[IndexedInfo]) -> tuple[Json | None, str | None]:
    """The sidecar of the whole and the tokenizer's directory; None for data from elsewhere."""
    sidecars = [sidecar_of(info) for info in infos]
    found = [sidecar for sidecar in sidecars if sidecar is not None]
    if not found:
        return None, None
    first = infos[sidecars.index(found[0])].prefix
    for info, sidecar in zip(infos, sidecars, strict=True):
        if sidecar is None:
            raise UserError(
                f"--input {info.prefix!r} has no .meta.json that names its tokenizer, and {first!r} has one; join "
                "those alone that have one, or name both in data_path"
            )
        for key in _SAME:
            if sidecar["tokenizer"].get(key) != found[0]["tokenizer"].get(key):
                raise UserError(
                    f"--input {info.prefix!r} was made with another tokenizer than {first!r} ({key} "
                    f"{sidecar['tokenizer'].get(key)} and {found[0]['tokenizer'].get(key)}); prepare them with one"
                )
        if sidecar.get("append_eod") != found[0].get("append_eod"):
            raise UserError(
                f"--input {info.prefix!r} and {first!r}: only in one of them documents end with the end-of-document "
                "token; prepare them in one way"
            )
    tokenizer = f"{first}.tokenizer"
    if not Path(tokenizer).is_dir():
        raise UserError(f"{tokenizer} is missing, with which {first!r} was made; bring it back")
    return _sum(infos, found), tokenizer


def _sum(infos: Sequence[IndexedInfo], sidecars: Sequence[Json]) -> Json:
    kept: Json = {key: sidecars[0][key] for key in ("append_eod", "dtype") if key in sidecars[0]}
    sums = {key: sum(one.get(key, 0) for one in sidecars) for key in _SUMMED}
    return {
        "version": __version__,
        "tokenizer": sidecars[0]["tokenizer"],
        **sums,
        "max_token_id": max(one.get("max_token_id", 0) for one in sidecars),
        **kept,
        "inputs": [info.prefix for info in infos],
        "skipped": [item for one in sidecars for item in one.get("skipped", [])],
    }


def _add(writer: IndexedWriter, info: IndexedInfo) -> None:
    """Append a data set."""
    none, no_lengths = np.empty(0, info.dtype), np.empty(0, np.int32)
    # Marks count from the first sequence of this data set, so they go before its lengths.
    for marks in info.marks.chunks(begin=1):
        writer.add(none, no_lengths, marks)
    for lengths in info.lengths.chunks():
        writer.add(none, lengths, np.empty(0, np.int64))
    for begin in range(0, info.bin_file.size, _BLOCK):
        data = info.bin_file.read(min(_BLOCK, info.bin_file.size - begin), begin)
        writer.add(np.frombuffer(data, info.dtype), no_lengths, np.empty(0, np.int64))
