"""How the texts of the trained models are made: cleaning, splitting, packages, archives."""

from __future__ import annotations

import json
import lzma
import math
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evidence.cleaning import Duplicates, code_shingles, is_prose, key_of, prose_shingles
from evidence.corpus import Definition, build, split
from evidence.debs import Package, fetch, read_members
from evidence.html_text import paragraphs_of_html
from evidence.ngram import BLOCK, NGram, summarise
from evidence.pack import open_parts, pack, parts_of
from evidence.piece import open_piece
from evidence.sources import Document, paragraphs_of_text

from phd_megatron.errors import UserError

SENTENCE = "This is the first of the sentences that are in the text, and it is as long as a paragraph of a book is."


# ---------------------------------------------------------------- reading


def test_paragraphs_of_a_page_are_what_a_reader_reads() -> None:
    page = """<html><head><title>Not this</title><style>p {}</style></head><body>
        <div class="navbar"><p>Next</p><div><p>Up</p></div></div>
        <h1>Of ships</h1><p>A ship &amp; its\n   sails<p>Another <b>one</b>.
        <pre>int main(void);</pre><ul><li>first<br>second</ul><script>if (a < b) x("<p>no</p>");</script>
        <table><tr><td>cell</td><td>next cell</td></tr></table></body></html>"""
    assert paragraphs_of_html(page) == [
        *("Of ships", "A ship & its sails", "Another one .".replace(" .", "."), "first", "second", "cell", "next cell"),
    ]


def test_tags_left_open_do_not_hide_the_rest() -> None:
    assert paragraphs_of_html("<nav><ul><li>a</nav><p>text") == ["text"]
    assert paragraphs_of_html("<div class='toc'><p>gone<br>gone</div><p>text") == ["text"]
    assert paragraphs_of_html("<pre>never closed</body><p>text") == ["text"]


def test_paragraphs_of_plain_text_are_joined_lines() -> None:
    assert paragraphs_of_text("a\n b\n\n \t\nc\n") == ["a b", "c"]


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (SENTENCE, True),
        (SENTENCE.rstrip("."), False),  # no end
        ("It is the one that is.", False),  # too short
        ("Das ist der erste der Sätze in diesem Buch, und er ist so lang wie ein Absatz.", False),
        ("int foo bar baz qux quux corge grault garply waldo fred plugh;", False),  # no common words
        ("The a1=2 b2=3 c3=4 of d4=5 e5=6 f6=7 is the g7=8 h8=9 to 10 11 12 13 14.", False),  # few letters
    ],
)
def test_prose_is_english_sentences(block: str, expected: bool) -> None:
    assert is_prose(block) is expected


# ---------------------------------------------------------------- duplicates


def lines(seed: int, count: int = 30) -> str:
    draw = random.Random(seed)
    return "\n".join(f"call_{word(draw)}(argument_{word(draw)});" for _ in range(count))


def word(draw: random.Random) -> str:
    return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=8))


def test_a_document_counts_once_and_a_near_copy_not_at_all() -> None:
    duplicates = Duplicates(code_shingles, whole=True)
    first = lines(1)
    assert duplicates.keep([first]) == [first]
    assert duplicates.keep([first]) == []
    changed = first.replace("argument_", "argument_x", 1)
    assert duplicates.keep([changed]) == []
    assert set(duplicates.removed) == {"documents that are there already", "near-duplicate documents"}
    other = lines(2)
    assert duplicates.keep([other]) == [other]


def test_shared_blocks_go_and_short_ones_stay() -> None:
    duplicates = Duplicates(code_shingles, whole=True)
    licence = "/* This program is free software: 2023 it may be copied by whoever wants to, and sold,\n   too. */"
    assert duplicates.keep([licence, lines(3), "}"]) == [licence, lines(3), "}"]
    again = licence.replace("2023", "1999").upper()  # case and digits do not make another block
    assert key_of(again) == key_of(licence)
    assert duplicates.keep([again, lines(4), "}"]) == [lines(4), "}"]
    assert duplicates.removed == {"blocks that are there already": len(again)}


def test_half_of_the_shingles_decide() -> None:
    """A document of which four tenths are there already stays, but for what is; one of six tenths goes."""
    parts = [lines(seed, 12) for seed in range(20, 30)]
    seen = Duplicates(code_shingles, whole=True)
    seen.keep(parts[:6])
    assert seen.keep([*parts[:4], *(lines(seed, 12) for seed in range(40, 46))])[0].startswith("call_")
    seen = Duplicates(code_shingles, whole=True)
    seen.keep(parts[:6])
    assert seen.keep([*parts[:6], *(lines(seed, 12) for seed in range(40, 44))]) == []


def test_of_prose_each_paragraph_stands_for_itself() -> None:
    paragraphs = [f"{chr(97 + i) * 5} {SENTENCE} " + " ".join(lines(60 + i, 10).split()) for i in range(6)]
    prose = Duplicates(prose_shingles, whole=False)
    assert prose.keep(paragraphs[:5]) == paragraphs[:5]
    assert prose.keep(paragraphs) == paragraphs[5:]
    assert prose.keep([paragraphs[0], "A short one."]) == []
    assert prose.removed["what was left of documents"] == len("A short one.")


def test_prose_shingles_hang_on_words_alone() -> None:
    words = " ".join(f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(200))
    assert prose_shingles(words) == prose_shingles(words.upper().replace(" ", ",\n"))
    common = prose_shingles(words) & prose_shingles("something else before all of it " + words)
    assert len(common) >= len(prose_shingles(words)) - 1
    assert not prose_shingles("too short a text")


# ---------------------------------------------------------------- splitting


def definition(**changes: object) -> Definition:
    return Definition(kind="code", packages=["p"], held_out=["p/net/"], **changes)  # type: ignore[arg-type]


def test_held_out_folders_are_whole_and_the_order_is_of_names_alone() -> None:
    documents = [Document(f"p/{folder}/{n}.c", ["x"]) for folder in ("net", "fs", "lib") for n in range(100)]
    parts = split(definition(valid_share=0.2), documents)
    assert {d.id.split("/")[1] for d in parts["valid_folders"]} == {"net"}
    assert len(parts["valid_folders"]) == 100
    assert {d.id.split("/")[1] for d in parts["train"]} == {"fs", "lib"} == {d.id.split("/")[1] for d in parts["valid"]}
    assert 20 <= len(parts["valid"]) <= 60
    assert sorted(d.id for part in parts.values() for d in part) == sorted(d.id for d in documents)
    assert split(definition(valid_share=0.2), list(reversed(documents))) == parts
    assert [d.id for d in parts["train"]] != sorted(d.id for d in parts["train"])
    assert split(definition(valid_share=0.2, seed=2), documents)["train"] != parts["train"]


# ---------------------------------------------------------------- packages


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A real package of the kind that Linux' sources come in; the folder it lies in."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb makes and reads packages; this machine has none")
    tree = tmp_path / "tree"
    for first, folder in ((100, "net"), (200, "fs"), (300, "lib")):
        for number in range(12):
            path = tree / "src-1" / folder / f"f{number}.c"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(lines(first + number) + "\n\n" + lines(7, 4) + "\n")
    (tree / "src-1/fs/latin.c").write_bytes(b"/* \xe9 */" * 100)
    root = tmp_path / "root"
    (root / "usr/src").mkdir(parents=True)
    subprocess.run(["tar", "cJf", root / "usr/src/s.tar.xz", "-C", tree, "src-1"], check=True)
    (root / "DEBIAN").mkdir()
    (root / "DEBIAN/control").write_text(
        "Package: src\nVersion: 1:2-3\nArchitecture: all\nMaintainer: n <n@example.org>\nDescription: d\n"
    )
    debs = tmp_path / "debs"
    debs.mkdir()
    subprocess.run(["dpkg-deb", "-b", root, debs / "src_1%3a2-3_all.deb"], check=True, capture_output=True)
    return debs


def write_definition(path: Path, package_line: str = "src") -> Path:
    path.write_text(
        "kind: code\ninner: usr/src/s.tar.xz\nvalid_share: 0.2\nheld_out: [src-1/net]\npackages:\n"
        f"  - {package_line}\n".replace("[src-1/net]", "[src/net]")
    )
    return path


def test_a_text_comes_out_the_same_every_time(package: Path, tmp_path: Path) -> None:
    file = write_definition(tmp_path / "mine.yaml")
    first = build(file, package, tmp_path / "a", update=True)
    assert first["packages"][0].split()[:2] == ["src", "1:2-3"]
    assert file.read_text().endswith(f"  - {first['packages'][0]}\n")
    second = build(file, package, tmp_path / "b")
    assert first == second
    for part in ("train", "valid", "valid_folders"):
        content = (tmp_path / "a" / f"{part}.jsonl").read_bytes()
        assert content == (tmp_path / "b" / f"{part}.jsonl").read_bytes()
        documents = [json.loads(line) for line in content.splitlines()]
        assert len(documents) == first["parts"][part]["documents"] > 0
        folders = {document["id"].split("/")[1] for document in documents}
        assert folders == {"net"} if part == "valid_folders" else folders <= {"fs", "lib"}
        assert not any("latin" in document["id"] for document in documents)
    # The block that every file ends with is in the first document alone.
    shared = lines(7, 4)
    holding = [shared in json.loads(line)["text"] for line in (tmp_path / "a/train.jsonl").read_text().splitlines()]
    assert holding == [True] + [False] * (len(holding) - 1)


def test_another_package_of_that_name_is_refused(package: Path, tmp_path: Path) -> None:
    path, found = fetch(Package("src", "1:2-3"), package)
    assert dict(read_members(path)).keys() == {"usr/src/s.tar.xz"}
    with pytest.raises(UserError, match="SHA-256"):
        fetch(Package("src", "1:2-3", "0" * 64), package)
    assert str(found) == f"src 1:2-3 {found.sha256}"
    with pytest.raises(UserError, match="no package"):
        Package.parse("src 1")


# ---------------------------------------------------------------- archives


def test_archives_in_parts_are_one_text(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "train.tokenizer").mkdir(parents=True)
    (data / "train.tokenizer/tokenizer.json").write_text("{}")
    (data / "train.bin").write_bytes(random.Random(1).randbytes(100_000))
    files = ["train.bin", "train.tokenizer"]
    whole = pack(data, files, tmp_path / "one/code.tar.xz", 10**9)
    assert [path.name for path in whole] == ["code.tar.xz"]
    parts = pack(data, files, tmp_path / "two/code.tar.xz", 40_000)
    assert [path.name for path in parts] == ["code.tar.xz.00", "code.tar.xz.01", "code.tar.xz.02"]
    assert b"".join(path.read_bytes() for path in parts) == whole[0].read_bytes()
    with open_parts(tmp_path / "two", "code") as stream:
        assert stream.read() == lzma.decompress(whole[0].read_bytes())
    piece = replace(open_piece({"PHD_EVIDENCE_WORK": str(tmp_path / "work")}), archives=tmp_path / "two")
    parts[1].rename(tmp_path / "second")
    with pytest.raises(UserError, match="not a whole archive"):
        piece.texts()
    (tmp_path / "second").rename(parts[1])
    assert piece.texts() == {"code": tmp_path / "work/texts/code"}
    assert (tmp_path / "work/texts/code/train.bin").read_bytes() == (data / "train.bin").read_bytes()
    with pytest.raises(UserError, match="evidence pack prose"):
        parts_of(tmp_path / "two", "prose")


# ---------------------------------------------------------------- n-grams


def test_ngrams_against_the_definition() -> None:
    draw = random.Random(1)
    counted, asked = ([draw.randrange(5) for _ in range(count)] for count in (200, 60))

    def p(y: int, context: tuple[int, ...]) -> float:
        if not context:
            return (counted.count(y) + 0.1) / (len(counted) + 0.5)
        size = len(context)
        after = [counted[i + size] for i in range(len(counted) - size) if tuple(counted[i : i + size]) == context]
        shorter = p(y, context[1:])
        return (after.count(y) + len(set(after)) * shorter) / (len(after) + len(set(after))) if after else shorter

    expected = [-math.log(p(asked[i], tuple(asked[i - 3 : i]))) for i in range(3, len(asked))]
    assert NGram(counted, 5).losses(asked) == pytest.approx(expected, rel=1e-12)


def test_blocks_give_the_error_of_a_mean() -> None:
    losses = np.repeat([1.0, 2.0, 3.0], BLOCK)
    found = summarise(np.append(losses, 0.0))
    assert (found.spread, found.blocks, found.error) == (1.0, 3, pytest.approx(1 / math.sqrt(3)))
    assert math.isnan(summarise(losses[:5]).error)
