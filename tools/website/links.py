"""Where a file of the repository is on the site, and links between them.

Pages keep the links that they have on GitHub, relative to their file. On the site ``docs/`` is the root; a file outside
it that a page links to becomes a page below ``project/``: a document as it is, source as a listing, a folder as the
list of what is in it. No address of a host is in any of them.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS, OUTSIDE = "docs/", "project/"
_LINK = re.compile(r"\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
_FENCE = re.compile(r" *(`{3,}|~{3,})")
_LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".sbatch": "bash", ".toml": "toml"}
_HIDDEN = ("__pycache__", ".")
_UNSEARCHED = "---\nsearch:\n  exclude: true\n---\n\n"


def repository_path(uri: str) -> str:
    """The file of the repository that a file of the site is made of; generated references lie in ``docs/``."""
    return uri.removeprefix(OUTSIDE) if uri.startswith(OUTSIDE) else DOCS + uri


def site_uri(path: str) -> str:
    """The file of the site that stands for a path of the repository, relative to its root."""
    place = ROOT / path
    if place.is_dir():
        return site_uri(posixpath.join(path, "README.md" if (place / "README.md").is_file() else "index.md"))
    if path.startswith(DOCS) and (place.exists() or not place.parent.is_dir()):
        return path.removeprefix(DOCS)
    return OUTSIDE + path + ("" if path.endswith(".md") or _text(place) is None else ".md")


def rewrite(markdown: str, uri: str) -> str:
    """A page's text with links that are right on the site, ``uri`` being the page's own file there."""

    def other(target: str, anchor: str) -> str:
        if (path := _resolved(target, uri)) is None:
            return f"]({target}{anchor})"
        return f"]({posixpath.relpath(site_uri(path), posixpath.dirname(uri) or '.')}{anchor})"

    return "".join(_with_links(markdown, other))


def linked(markdown: str, uri: str) -> set[str]:
    """Paths of the repository that a page links to and that are no file of ``docs/``."""
    found = set()

    def note(target: str, anchor: str) -> str:
        path = _resolved(target, uri)
        if path is not None and (not path.startswith(DOCS) or (ROOT / path).is_dir()):
            found.add(path)
        return ""

    list(_with_links(markdown, note))
    return found


def outside_pages(pages: dict[str, str]) -> dict[str, str | Path]:
    """Files that the site needs besides those of ``docs/``: by their name there, a page's text or the file to copy.

    Args:
        pages: the text of the pages that are there, by their name on the site.
    """
    made: dict[str, str | Path] = {}
    waiting = sorted(set().union(*(linked(text, uri) for uri, text in pages.items())))
    while waiting:
        path = waiting.pop()
        uri = site_uri(path)
        if uri in made or uri in pages:
            continue
        content = made[uri] = _page(path)
        if isinstance(content, str):
            waiting += sorted(linked(content, uri))
    return made


def _page(path: str) -> str | Path:
    place = ROOT / path
    if place.is_dir():
        inside = sorted(item for item in place.iterdir() if not item.name.startswith(_HIDDEN))
        # Relative to `index.md` of the folder, as the text of any page is.
        lines = [f"- [`{item.name}{'/' * item.is_dir()}`]({item.name})" for item in inside]
        return "\n".join([f"{_UNSEARCHED}# {path}/", "", *lines, ""])
    text = _text(place)
    if text is None:
        return place
    if place.suffix == ".md":
        return text
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{_UNSEARCHED}# {path}\n\n{fence}{_LANGUAGES.get(place.suffix, 'text')}\n{text.rstrip()}\n{fence}\n"


def _text(place: Path) -> str | None:
    try:
        return place.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _resolved(target: str, uri: str) -> str | None:
    """The path of the repository that a link means; None for one that leads elsewhere, or nowhere."""
    if re.match(r"[a-z]+:", target):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(repository_path(uri)), target))
    return path if not path.startswith("..") and (ROOT / path).exists() else None


def _with_links(markdown: str, replace: Callable[[str, str], str]) -> Iterator[str]:
    """The lines of a text, each link outside fenced blocks replaced."""
    fence = ""
    for line in markdown.splitlines(keepends=True):
        if found := _FENCE.match(line):
            if not fence:
                fence = found[1]
            elif found[1].startswith(fence):
                fence = ""
        elif not fence:
            line = _LINK.sub(lambda link: replace(link["target"], link["anchor"] or ""), line)
        yield line
