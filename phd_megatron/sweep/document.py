"""A report as blocks, written as Markdown with figures beside it and as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phd_megatron.errors import UserError
from phd_megatron.runtime.output import SIGNED_TEXT, Kind, check_file, signed, write_file
from phd_megatron.sweep.store import open_store


@dataclass(frozen=True)
class Heading:
    """A section's title."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column is a name."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A picture: ``stem.svg`` and ``stem.png`` in the report's directory."""

    stem: str
    caption: str


Block = Heading | Text | Table | Figure

_SIGNED = signed("a file that `phd-megatron` wrote")
# Earlier releases signed nothing; what has such a name in a sweep's own directory is of its report.
_OF_A_SWEEP = Kind("a file", lambda path: True)
_OF_A_REPORT = re.compile(r"report\.(md|html)|(losses|finals|scaling|experts|router|layers_[a-z0-9_]+)\.(svg|png)")

_STYLE = """\
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #8884; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1rem 0; } figure img { max-width: 100%; background: white; } figcaption { opacity: .75; }"""


def document_kind(path: Path) -> Kind:
    """What may be replaced where this document or figure is written."""
    directory = path.parent
    if directory.name != "report" or not _OF_A_REPORT.fullmatch(path.name):
        return _SIGNED
    try:
        open_store(directory.parent)
    except (UserError, OSError):
        return _SIGNED
    return _OF_A_SWEEP


def check_documents(directory: Path, *names: str) -> None:
    """Refuse a directory where these documents may not be written, and make it where there is none.

    Raises:
        UserError: with what stands there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make --output {directory}: {error.strerror}; choose another directory") from error
    for name in names:
        check_file(directory / name, "--output", document_kind(directory / name))


def write_document(path: Path, text: str) -> None:
    """Write one of our Markdown or HTML files, signed."""
    write_file(path, "--output", document_kind(path), text + SIGNED_TEXT)


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """The report as Markdown."""
    parts = [f"# {title}"]
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"## {text}")
            case Text(text):
                parts.append(text)
            case Table(head, rows):
                lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
                parts.append("\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines))
            case Figure(stem, caption):
                parts.append(f"![{caption}]({stem}.png)")
    return "\n\n".join(parts) + "\n"


def page(title: str, blocks: Sequence[Block], directory: Path) -> str:
    """The report as one HTML file; figures are read from ``directory`` and put inside."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    for block in blocks:
        match block:
            case Heading(text):
                body.append(f"<h2>{html.escape(text)}</h2>")
            case Text(text):
                body.append(f"<p>{html.escape(text)}</p>")
            case Table(head, rows):
                cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
                lines = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
                body.append(f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(lines)}</tbody></table>")
            case Figure(stem, caption):
                picture = base64.b64encode((directory / f"{stem}.svg").read_bytes()).decode("ascii")
                text = html.escape(caption)
                source = f"data:image/svg+xml;base64,{picture}"
                body.append(f'<figure><img alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>')
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"
