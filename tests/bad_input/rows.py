"""What a row of the table is, and the words that rows share."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Link:
    """A symbolic link."""

    target: str


FIFO, DIRECTORY = object(), object()
Content = str | bytes | Link | object

#: a run that would train if nothing else were wrong; ``@data`` and the like are the places of the kit
RUN = (
    "--num-layers 2 --hidden-size 16 --ffn-hidden-size 24 --num-attention-heads 2 --seq-length 16 "
    "--make-vocab-size-divisible-by 8 --data-path @data --micro-batch-size 2 --train-iters 2 --eval-iters 0 "
    "--device cpu"
)


@dataclass(frozen=True)
class Row:
    """One kind of bad input.

    Attributes:
        words: the command line, as a shell splits it; ``@data``, ``@run``, ``@export``, ``@metrics`` and
            ``@stock`` are good inputs. Words that a shell cannot write are in ``more``.
        said: parts of the message: value, reason and cure.
        files: name -> content, made in the working directory first.
        process: run it as a program of its own.
    """

    words: str
    said: tuple[str, ...]
    files: Mapping[str, Content] = field(default_factory=dict)
    more: tuple[str, ...] = ()
    process: bool = False
    name: str = ""

    @property
    def title(self) -> str:
        """For the test's id."""
        words = self.words.replace(RUN, "RUN").replace("--output-prefix data --workers 1 --no-progress", "")
        text = self.name or " ".join([words, *(word[:12] for word in self.more)])
        return "".join(c if c.isprintable() else "?" for c in text)[:160]

    def argv(self, places: Mapping[str, Path]) -> list[str]:
        """The words with the places put in."""
        return [_put_in(word, places) for word in (*shlex.split(self.words), *self.more)]

    def make_files(self, directory: Path) -> None:
        """Everything in ``files``."""
        for name, content in self.files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is FIFO:
                os.mkfifo(path)
            elif content is DIRECTORY:
                path.mkdir()
            elif isinstance(content, Link):
                path.symlink_to(content.target)
            elif isinstance(content, bytes):
                path.write_bytes(content)
            else:
                path.write_text(str(content), encoding="utf-8")


def _put_in(word: str, places: Mapping[str, Path]) -> str:
    for name, path in places.items():
        word = word.replace(f"@{name}", str(path))
    return word


def config(text: str | bytes, *said: str, command: str = "plan", **options: object) -> Row:
    """A row whose only fault is the YAML file; ``plan`` reads it as ``pretrain`` does, which some rows show."""
    words = f"{command} --config run.yaml"
    return Row(words, ("run.yaml", *said), files={"run.yaml": text}, **options)  # type: ignore[arg-type]
