"""The site is built without a warning, and has what it is for: every command, option, page and docstring, and links."""

from __future__ import annotations

import html
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from phd_megatron.bench.arguments import FLAGS
from phd_megatron.bench.arguments import parser as bench_parser
from phd_megatron.cli.main import COMMANDS, module_of
from phd_megatron.config.catalog import fields

from .blocks import ROOT

for package in ("material", "mkdocstrings", "latex2mathml"):
    pytest.importorskip(package, reason="needs the extra `docs`")

REFERENCE = re.compile(r'\b(?:href|src)="([^"]*)"')
SCHEME = re.compile(r"[a-z]+:|//")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site, built once."""
    place = tmp_path_factory.mktemp("site")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "PYTHONPATH": path, "NO_MKDOCS_2_WARNING": "1", "COLUMNS": "40"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(place)],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return place


def text_of(page: Path) -> str:
    """What a reader sees of a page's article."""
    (article,) = re.findall(r"<article.*?</article>", page.read_text("utf-8"), re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", article)).split())


def test_every_command_has_its_flags(site: Path) -> None:
    page = site / "reference/commands/index.html"
    anchors, text = set(re.findall(r'id="([^"]+)"', page.read_text("utf-8"))), text_of(page)
    assert set(COMMANDS) <= anchors
    flags = []
    parsers = [
        importlib.import_module(module_of(name)).build_parser() for name in set(COMMANDS) - {"pretrain", "bench"}
    ]
    for parser in [*parsers, *map(bench_parser, FLAGS)]:
        flags += [word for word in re.findall(r"--[a-z][a-z-]+", parser.format_help()) if word != "--help"]
    assert len(flags) > 100 and [flag for flag in flags if flag not in text] == []
    assert "bpe:N|DIR" in text, "a bar in a cell of a table is a bar"


def test_every_field_has_its_row(site: Path) -> None:
    page = (site / "reference/configuration/index.html").read_text("utf-8")
    anchors = re.findall(r'<a id="(\w+)"></a><code>(\w+)</code>', page)
    assert sorted(anchors) == sorted((name, name) for name in fields())
    rows = [html.unescape(re.sub(r"<[^>]+>", " ", row)) for row in re.findall(r"<tr>.*?</tr>", page, re.DOTALL)]
    (row,) = [" ".join(row.split()) for row in rows if row.split()[:1] == ["phd_repeat"]]
    info = fields()["phd_repeat"]
    assert row == f"phd_repeat an integer; at least 1 and at most 1024 1 {info.help} {info.role.name.lower()}"


def test_docstrings_are_there(site: Path) -> None:
    from phd_megatron.phd.kv_policy import KVPolicy

    said = text_of(site / "reference/python/visibility/index.html")
    assert KVPolicy.__doc__ is not None and KVPolicy.__doc__.splitlines()[0].replace("`", "") in said
    assert not re.search(r":(class|mod|func|meth|data):", said)


def test_formulas_are_drawn_without_a_script(site: Path) -> None:
    page = (site / "semantics/index.html").read_text("utf-8")
    source = re.sub(r"```.*?```|`[^`]*`", "", (ROOT / "docs/semantics.md").read_text("utf-8"), flags=re.DOTALL)
    blocks = re.findall(r"\$\$.*?\$\$", source, re.DOTALL)
    inline = re.findall(r"\$[^$]+\$", re.sub(r"\$\$.*?\$\$", "", source, flags=re.DOTALL))
    assert page.count("<math") == len(blocks) + len(inline) > 10
    assert "$$" not in page and "arithmatex" not in page


def test_links_lead_somewhere(site: Path) -> None:
    """In the pages as they are served, folders by their ``index.html``, anchors included."""
    pages = {page: page.read_text("utf-8") for page in site.rglob("*.html") if page.name != "404.html"}
    anchors = {page: set(re.findall(r'\b(?:id|name)="([^"]+)"', text)) for page, text in pages.items()}
    assert len(pages) > 80
    missing = []
    for page, text in pages.items():
        for link in map(html.unescape, REFERENCE.findall(text)):
            if SCHEME.match(link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / unquote(path.partition("?")[0])).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (anchor and target in anchors and unquote(anchor) not in anchors[target]):
                missing.append(f"{page.relative_to(site)}: {link}")
    assert missing == []


def test_no_other_host_is_asked_for_anything(site: Path) -> None:
    loaded = re.compile(r'<(?:script|img|iframe|link\b[^>]*stylesheet)\b[^>]*\b(?:src|href)="((?:https?:)?//[^"]*)"')
    assert {
        page.name: found for page in site.rglob("*.html") if (found := loaded.findall(page.read_text("utf-8")))
    } == {}


def test_search_knows_options_and_docstrings(site: Path) -> None:
    entries = json.loads((site / "search/search_index.json").read_text("utf-8"))["docs"]
    found = {entry["location"].partition("#")[0] for entry in entries if "tensor_model_parallel_size" in entry["text"]}
    assert "reference/configuration/" in found
    assert any(entry["location"].startswith("reference/python/") for entry in entries)
    assert not any(entry["location"].startswith("project/phd_megatron") for entry in entries), "listings are no answers"
