"""The paragraphs of an HTML page: what a reader reads, without menus, programs and tables of figures."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_SKIPPED = frozenset({"script", "style", "nav", "header", "footer", "pre", "svg", "math", "form", "select", "head"})
_BLOCK_TAGS = (
    "p div br hr li ul ol dl dt dd td th tr table h1 h2 h3 h4 h5 h6 blockquote section article main body center "
    "caption figure figcaption details summary aside address fieldset"
)
_BLOCKS = frozenset(_BLOCK_TAGS.split())
_NAVIGATION = re.compile(
    r"\b(nav|navbar|navheader|navfooter|sidebar|breadcrumb|toc|menu|related|header|footer)\b", re.I
)
_VOID = frozenset(
    {"br", "hr", "img", "input", "meta", "link", "col", "area", "base", "wbr", "source", "embed", "param"}
)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._words: list[str] = []
        self._skipping: list[str] = []  #: open tags from the outermost skipped one inwards

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if self._skipping:
            if tag not in _VOID:
                self._skipping.append(tag)
            return
        if tag in _BLOCKS or tag in _SKIPPED:
            self._end_paragraph()
        if tag not in _VOID and (tag in _SKIPPED or self._navigates(tag, attributes)):
            self._skipping.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._skipping:
            if tag in self._skipping:  # pages leave tags open: close up to the one that is meant
                while self._skipping.pop() != tag:
                    pass
            elif tag in ("body", "html"):
                self._skipping.clear()
            return
        if tag in _BLOCKS:
            self._end_paragraph()

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._words.append(data)

    def finish(self) -> list[str]:
        self.close()
        self._end_paragraph()
        return self.paragraphs

    def _navigates(self, tag: str, attributes: list[tuple[str, str | None]]) -> bool:
        if tag not in ("div", "table", "ul", "td", "section", "aside"):
            return False
        return any(name in ("class", "id", "role") and _NAVIGATION.search(value or "") for name, value in attributes)

    def _end_paragraph(self) -> None:
        text = " ".join("".join(self._words).split())
        self._words.clear()
        if text:
            self.paragraphs.append(text)


def paragraphs_of_html(page: str) -> list[str]:
    """Paragraphs in order, white space put to single spaces."""
    reader = _Reader()
    reader.feed(page)
    return reader.finish()
