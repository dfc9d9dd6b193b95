"""The documents say what the code says."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

from phd_megatron.cli.main import COMMANDS
from phd_megatron.config.schema import RunConfig
from phd_megatron.norm.schemes import NORM_SCHEMES

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/tutorials/*.md")])
PLACES = ("*.md", "tutorials/*.md", "results/README.md", "results/trained/*.md")
FIELDS = {
    field.name
    for section in dataclasses.fields(RunConfig)
    for field in dataclasses.fields(section.default_factory)  # type: ignore[arg-type,misc]
}


def test_norm_table_is_the_codes_table() -> None:
    script = [sys.executable, str(ROOT / "tools/write_tables.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (ROOT / "docs/norms.md").read_text("utf-8")
    assert all(f"| `{name}`" in text for name in NORM_SCHEMES)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_point_at_something(document: Path) -> None:
    missing = []
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text("utf-8")):
        if not target.startswith(("http://", "https://")) and not (document.parent / target).exists():
            missing.append(target)
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_anchors_are_headings(document: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", document.read_text("utf-8")):
        if target.startswith("http"):
            continue
        text = (document.parent / target if target else document).read_text("utf-8")
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in slugs


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text("utf-8")
    pages = set(chain(*(ROOT.glob(f"docs/{place}") for place in PLACES)))
    named = {(ROOT / "docs" / target).resolve() for target in re.findall(r"\]\(([^)#]+)", index)}
    assert pages - named == {ROOT / "docs/README.md"}
    assert "(docs/README.md)" in (ROOT / "README.md").read_text("utf-8")


def test_the_version_is_the_same_everywhere() -> None:
    """It stands in the package; these two cannot read it from there."""
    from phd_megatron import __version__

    assert re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE) == [__version__]
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert next(name for name in headings if name != "Unreleased") == __version__


def test_readme_flags_are_fields() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    (command,) = re.findall(r"torchrun .*?(?=\n\n)", text, re.DOTALL)
    flags = set(re.findall(r"--([a-z][a-z0-9-]+)", command)) - {"nproc-per-node"}
    assert {flag.replace("-", "_") for flag in flags} <= FIELDS


def test_example_files_have_known_fields_only() -> None:
    import yaml

    from phd_megatron.model.transformer_config import transformer_field_types

    for path in [*ROOT.glob("examples/*.yaml"), *ROOT.glob("examples/presets/*.yaml")]:
        values = yaml.safe_load(path.read_text("utf-8"))
        unknown = {name for section in values.values() for name in section} - FIELDS - set(transformer_field_types())
        assert not unknown, f"{path.name}: {unknown}"


def test_readme_commands_exist() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    used = set(re.findall(r"^phd-megatron ([a-z]+)", text, re.MULTILINE))
    assert used
    assert used <= set(COMMANDS)


def test_shell_scripts_parse() -> None:
    for path in [*ROOT.glob("launch_scripts/*.s*"), ROOT / "tests/run.sh", ROOT / ".ci/run"]:
        done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("tool", "figure"), [("draw_figures.py", "overview.png"), ("draw_kernels.py", "kernels.svg")])
def test_figures_can_be_drawn(tool: str, figure: str, tmp_path: Path) -> None:
    output = tmp_path / figure
    script = str(ROOT / "tools" / tool)
    done = subprocess.run([sys.executable, script, "--output", str(output)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert output.stat().st_size > 10_000
