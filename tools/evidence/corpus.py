"""Build a text: the packages of its definition, cleaned, split and in an order that hangs on names alone.

Three files of JSON lines come out. ``train``; ``valid``, documents taken at random out of the training folders (what
a model of this text should know); ``valid_folders``, whole folders or packages that training has nothing of.
"""

from __future__ import annotations

import json
import multiprocessing
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from phd_megatron.config.serialize import read_yaml
from phd_megatron.errors import UserError
from phd_megatron.sweep.options import read_options

from .cleaning import Duplicates, code_shingles, digest, prose_shingles
from .debs import Package, fetch, sha256_of
from .sources import Document, code_documents, prose_documents

PARTS = ("train", "valid", "valid_folders")
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Definition:
    """A text's file.

    Attributes:
        kind: how documents are read.
        packages: ``NAME VERSION SHA256`` each, or names alone before the first ``--update``.
        inner: a tar archive inside the package that holds the files.
        skipped: of code, parts of paths; of prose, patterns of paths.
        held_out: beginnings of document names; these folders are ``valid_folders``.
        valid_share: of all other documents, drawn by name.
        train_characters: at most so much.
        valid_characters: at most so much of each of the other two.
    """

    kind: Literal["code", "prose"]
    packages: list[str]
    held_out: list[str]
    inner: str | None = None
    skipped: list[str] = field(default_factory=list)
    valid_share: float = 0.03
    train_characters: int = 300_000_000
    valid_characters: int = 12_000_000
    seed: int = 1


def read_definition(path: Path) -> Definition:
    """Read a text's definition; ``UserError`` for a field that is none."""
    return read_options(Definition, read_yaml(path), str(path))


def build(definition_file: Path, debs: Path, output: Path, update: bool = False, workers: int = 2) -> dict[str, Any]:
    """Write ``train.jsonl``, ``valid.jsonl``, ``valid_folders.jsonl`` and the manifest.

    Args:
        definition_file: the text.
        debs: where packages are and are downloaded to.
        output: folder of the text.
        update: take the packages' present versions, and note them in the definition.
        workers: processes that read packages.

    Returns:
        The manifest.

    Raises:
        UserError: when a package is not to be had in the version of the definition, or nothing is held out.
    """
    definition = read_definition(definition_file)
    wanted = [Package.parse(line.split()[0] if update else line) for line in definition.packages]
    fetched = [fetch(package, debs) for package in wanted]
    if update:
        _note(definition_file, [package for _, package in fetched])
    documents = _read_all(definition, fetched, workers)
    parts = split(definition, documents)
    is_code = definition.kind == "code"
    duplicates = Duplicates(code_shingles if is_code else prose_shingles, whole=is_code)
    output.mkdir(parents=True, exist_ok=True)
    counts: dict[str, dict[str, Any]] = {}
    folders: dict[str, Counter[str]] = {}
    for part in PARTS:
        limit = definition.train_characters if part == "train" else definition.valid_characters
        counts[part], folders[part] = write_part(output / f"{part}.jsonl", parts[part], duplicates, limit)
        if not counts[part]["documents"]:
            raise UserError(f"{definition_file}: {part} is empty; change held_out or valid_share")
    manifest = {
        "text": definition_file.stem,
        "packages": [str(package) for _, package in fetched],
        "parts": counts,
        "removed_characters": dict(duplicates.removed),
        "folders": {part: dict(found.most_common()) for part, found in folders.items()},
    }
    (output / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def split(definition: Definition, documents: Iterable[Document]) -> dict[str, list[Document]]:
    """Documents of each part, in the order of a hash of seed and name."""
    parts: dict[str, list[Document]] = {part: [] for part in PARTS}
    for document in sorted(documents, key=lambda d: (digest(f"{definition.seed} {d.id}"), d.id)):
        if any(document.id.startswith(prefix) for prefix in definition.held_out):
            parts["valid_folders"].append(document)
        else:
            drawn = digest(f"valid {definition.seed} {document.id}") / 2**64 < definition.valid_share
            parts["valid" if drawn else "train"].append(document)
    return parts


def write_part(
    path: Path, documents: Sequence[Document], duplicates: Duplicates, limit: int
) -> tuple[dict[str, Any], Counter[str]]:
    """Write what is new of the documents, up to ``limit`` characters; counts with checksum, characters by folder."""
    characters = written = 0
    folders: Counter[str] = Counter()
    with path.open("w", encoding="utf-8") as stream:
        for document in documents:
            text = "\n\n".join(duplicates.keep(document.blocks))
            if not text:
                continue
            if characters + len(text) > limit:
                break
            stream.write(json.dumps({"text": text + "\n", "id": document.id}, ensure_ascii=False) + "\n")
            characters, written = characters + len(text), written + 1
            folders["/".join(document.id.split("/")[:3])] += len(text)
    counts = {"documents": written, "characters": characters, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    return counts, folders


def _read_all(definition: Definition, fetched: Sequence[tuple[Path, Package]], workers: int) -> list[Document]:
    tasks = [(definition, path, package.name) for path, package in fetched]
    if workers == 1 or len(tasks) == 1:
        return [document for task in tasks for document in _read(task)]
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=8) as pool:
        return [document for documents in pool.imap(_read, tasks) for document in documents]


def _read(task: tuple[Definition, Path, str]) -> list[Document]:
    definition, path, name = task
    if definition.kind == "code":
        return list(code_documents(path, name, definition.inner, definition.skipped))
    return list(prose_documents(path, name, definition.skipped))


def _note(path: Path, packages: Sequence[Package]) -> None:
    """Rewrite the list of packages, which is the last key of a definition."""
    head, separator, _ = path.read_text("utf-8").partition("packages:\n")
    if not separator:
        raise UserError(f"{path} has no line `packages:`; write the packages below one, at the end")
    path.write_text(head + separator + "".join(f"  - {package}\n" for package in packages), encoding="utf-8")


def summary(manifest: Mapping[str, Any]) -> list[str]:
    """The manifest in a few lines."""
    lines = [
        f"{part}: {c['documents']:,} documents, {c['characters'] / 1e6:.1f} M characters"
        for part, c in manifest["parts"].items()
    ]
    removed = manifest["removed_characters"]
    return lines + [f"removed: {reason}, {count / 1e6:.1f} M characters" for reason, count in removed.items()]
