"""What mkdocs does beyond its plugins to make the site of ``docs/``; ``mkdocs.yml`` names it.

The pages are written for GitHub and stay as they are. Here their headings get GitHub's anchors, links out of ``docs/``
lead to pages made of the files themselves, formulas become MathML, and the references are generated.
"""

from __future__ import annotations

import html
import re

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from website import commands, configuration, links, python_pages

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
_ROLE = re.compile(r":(?:class|mod|func|meth|attr|data):<code>~?")
_CELL = re.compile(r"<td.*?</td>", re.DOTALL)


def slug(heading: str, separator: str) -> str:
    """GitHub's anchor of a heading, as `tests/unit/test_docs.py` has it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", separator)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Headings' anchors."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The references, and what pages link to outside ``docs/``."""
    made = {
        "reference/commands.md": commands.page(),
        "reference/configuration.md": configuration.page(),
        **python_pages.pages(),
    }
    texts = {file.src_uri: file.content_string for file in files.documentation_pages()} | made
    for uri, text in made.items():
        files.append(File.generated(config, uri, content=text))
    for uri, content in links.outside_pages(texts).items():
        given = {"content": content} if isinstance(content, str) else {"abs_src_path": str(content)}
        files.append(File.generated(config, uri, inclusion=InclusionLevel.NOT_IN_NAV, **given))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links that are right on the site."""
    return links.rewrite(markdown, page.file.src_uri)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML, which browsers draw without a script; Sphinx's roles of docstrings as plain code.

    In a table GitHub takes the backslash off a bar in code; Python-Markdown leaves it there.
    """
    content = _CELL.sub(lambda cell: cell[0].replace(r"\|", "|"), content)
    return _ROLE.sub("<code>", _FORMULA.sub(_mathml, content))


def _mathml(found: re.Match[str]) -> str:
    return latex2mathml.converter.convert(
        html.unescape(found[2]).strip(), display="block" if found[1] == "div" else "inline"
    )
