"""The tables of planted bugs fit the product, and the tool that plants them tells caught from survived."""

from __future__ import annotations

import ast
import subprocess
import textwrap
from pathlib import Path

import mutate
import pytest
import yaml
from mutation.bugs import Near, TableError, equivalent, planted
from mutation.campaign import CAUGHT, EQUIVALENT, SURVIVED, UNTESTED, Campaign, Copy, Outcome, score
from mutation.draw import changes, draw, product_files
from mutation.reach import statement_lines

ROOT = Path(__file__).resolve().parents[2]
TABLES = ROOT / "tests/mutants"


# ---------------------------------------------------------------- the tables


def test_every_planted_bug_changes_its_file_into_one_that_parses():
    bugs = planted(TABLES, ROOT)
    assert len(bugs) >= 75 and len({(bug.file, bug.what) for bug in bugs}) == len(bugs)
    for bug in bugs:
        assert bug.old != bug.new and bug.tests, bug.what
        ast.parse(bug.apply((ROOT / bug.file).read_bytes()))


def test_the_tables_name_tests_that_are_there():
    named = {test for bug in planted(TABLES, ROOT) for test in bug.tests} | Near(TABLES).tests
    for name in named:
        path, _, function = name.partition("::")
        assert "[" not in function, f"{name}: parameters change, so a row names the function"
        defined = {n.name for n in ast.walk(ast.parse((ROOT / path).read_bytes())) if isinstance(n, ast.FunctionDef)}
        assert not function or function in defined, name


def test_every_file_of_the_product_has_tests_near_it():
    near = Near(TABLES)
    files = [path.relative_to(ROOT).as_posix() for path in product_files(ROOT)]
    assert len(files) > 200
    assert [file for file in files if not near.of(file)[1]] == []
    assert [prefix for prefix in near.prefixes if not (ROOT / prefix).exists()] == []


def test_what_cannot_be_told_apart_is_a_bug_that_can_be_drawn():
    for (file, change), why in equivalent(TABLES).items():
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        assert change.split("  ->  ")[0] in [line.strip() for line in lines], f"{file}: {change}"
        assert len(why.split()) > 3, f"{file}: {change}: the reason is a sentence"


# ---------------------------------------------------------------- bugs by chance


def applied(source: str) -> set[str]:
    whole = source.encode()
    return {(whole[: c.begin] + c.new.encode() + whole[c.end :]).decode() for c in changes(whole)}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = a < b\n", {"x = a <= b\n"}),
        ("x = a is not None\n", {"x = a is None\n"}),
        ("x = a + b - c\n", {"x = a - b - c\n", "x = a + b + c\n"}),
        ("x = a and b or c\n", {"x = a or b or c\n", "x = a and b and c\n"}),
        ("x = not a\n", {"x = a\n"}),
        ("x = 3\n", {"x = 4\n"}),
        ("x = True\n", {"x = False\n"}),
        ("x = f(a, k=b)\n", {"x = f(a, )\n"}),
        ("x = f(k=b, j=c)\n", {"x = f( j=c)\n", "x = f(k=b, )\n"}),
        ("a.b = c\n", {"pass\n"}),
        ("f(a)\n", {"pass\n"}),
        ("if a:\n    f(a)\n", {"if not (a):\n    f(a)\n", "if a:\n    pass\n"}),
        ("x = b if a else c\n", {"x = b if not (a) else c\n"}),
        ("x = 'ä' if a != 'ö' else b\n", {"x = 'ä' if not (a != 'ö') else b\n", "x = 'ä' if a == 'ö' else b\n"}),
    ],
)
def test_changes_of_a_line(source, expected):
    assert applied(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        '"""A docstring."""\n',
        "import a\n",
        "x: int\n",
        "print(a + b)\n",
        'x = f"{a + 1}"\n',
        "x = json.dumps(a, indent=1)\n",
        "if TYPE_CHECKING:\n    f(a)\n",
        "@decorated(a=1)\ndef f(): ...\n",
    ],
)
def test_what_nobody_computes_with_is_left_alone(source):
    assert applied(source) == set()


def test_a_draw_is_repeatable_and_of_all_areas():
    near = Near(TABLES)
    bugs = draw(ROOT, 300, 5, near)
    assert bugs == draw(ROOT, 300, 5, near) != draw(ROOT, 300, 6, near)
    assert len({(bug.file, bug.line) for bug in bugs}) == len(bugs) > 280
    assert {"kernels", "training", "config", "huggingface", "data", "runtime"} <= {bug.area for bug in bugs}
    assert {bug.area for bug in draw(ROOT, 20, 5, near, ["sweep"])} == {"sweep"}
    for bug in bugs:
        ast.parse(bug.apply((ROOT / bug.file).read_bytes()))


def test_what_changes_elsewhere_leaves_the_draw_as_it_is(project):
    near = Near(project / "tests/mutants")
    path = project / "phd_megatron/sums.py"
    path.write_text("".join(f"a{i} = b{i} < {i}\n" for i in range(200)))
    before = [bug.context(project) for bug in draw(project, 20, 1, near)]
    path.write_text("c = 1 + 1\n\n" + path.read_text().replace("a7 =", "z7 ="))
    after = [bug.context(project) for bug in draw(project, 20, 1, near)]
    assert len(set(before)) == 20 and len(set(before) & set(after)) >= 18


# ---------------------------------------------------------------- a campaign


@pytest.fixture
def project(tmp_path):
    """A product of two functions, one of them tested."""
    files = {
        "phd_megatron/sums.py": """
            def double(x):
                return x * 2


            def half(x):
                return x / 2
            """,
        "tests/test_sums.py": """
            from pathlib import Path

            from phd_megatron.sums import double, half


            def test_double():
                assert double(3) == 6


            def test_half():
                assert half(4)


            def test_hangs():
                while double(1) != 2:
                    pass
            """,
        "tests/test_red.py": "def test_red():\n    assert False\n",
        "tests/mutants/planted/sums.yaml": "".join(
            f"- {{file: phd_megatron/sums.py, bug: {bug}, old: {old}, new: {new}, tests: [{tests}]}}\n"
            for bug, old, new, tests in (
                ("too much", "x * 2", "x * 3", "tests/test_sums.py::test_double"),
                ("hangs", "x * 2", "x + 2", "tests/test_sums.py::test_hangs"),
                ("unseen", "x / 2", "x / 3", "tests/test_sums.py::test_half"),
                ("the same", "x / 2", "x / 2.0", "tests/test_sums.py::test_half"),
                ("nobody looks", "x / 2", "x / 4", ""),
            )
        ),
    }
    root = tmp_path / "project"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(textwrap.dedent(text).strip() + "\n")
    subprocess.run(["git", "init", "-q", root], check=True)
    return root


def test_a_campaign_tells_what_the_tests_see(project, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("mutation.campaign.PATIENCE", 5.0)
    bugs = planted(project / "tests/mutants", project)
    same = {("phd_megatron/sums.py", "return x / 2  ->  return x / 2.0"): "the same number of every type"}
    results = tmp_path / "results.jsonl"
    outcomes = Campaign(project, jobs=2, equivalent=same, results=results).run(bugs)
    assert [row.verdict for row in outcomes] == [CAUGHT, CAUGHT, SURVIVED, EQUIVALENT, UNTESTED]
    assert outcomes[0].by.endswith("test_sums.py::test_double")
    assert "return x * 2" in (project / "phd_megatron/sums.py").read_text(), "the checkout is not touched"
    assert score(outcomes) == {"all": (2, 4), "sums": (2, 4)}
    assert "survived: phd_megatron/sums.py: unseen: return x / 2  ->  return x / 3" in capsys.readouterr().out
    again = Campaign(project, results=results, equivalent=same)
    monkeypatch.setattr(again, "_try", lambda *arguments: pytest.fail("what is known is not tried again"))
    assert again.run(bugs) == outcomes


def test_a_row_of_several_lines_stands_where_they_begin_to_change(tmp_path):
    (tmp_path / "planted").mkdir()
    (tmp_path / "a.py").write_text("try:\n    x()\nfinally:\n    y()\n")
    row = {"file": "a.py", "bug": "b", "tests": ["t"]}
    for old, new, line in (
        ("finally:\n    y()", "finally:\n    pass", 4),
        ("    x()\nfinally:", "    z()\nfinally:", 2),
        ("x()", "z()", 2),
        ("    x()\nfinally:\n    y()", "    x()\nfinally:\n    y(1)", 4),
    ):
        (tmp_path / "planted/area.yaml").write_text(yaml.safe_dump([{**row, "old": old, "new": new}]))
        (bug,) = planted(tmp_path, tmp_path)
        assert bug.line == line


def test_the_statement_at_a_line():
    source = b"def f(\n    a,\n):\n    if (\n        a\n    ):\n        g(\n            a,\n            b,\n        )\n"
    assert [statement_lines(source, line) for line in (1, 3, 5, 8)] == [
        *(range(1, 4), range(1, 4), range(4, 7), range(7, 11))
    ]


def test_what_a_test_runs(project, tmp_path):
    copy = Copy(project, tmp_path / "copy")
    code, _, reach = copy.trace("tests/test_sums.py::test_half", 60)
    assert code == 0
    assert reach.runs("phd_megatron/sums.py", range(6, 7)) and not reach.runs("phd_megatron/sums.py", range(2, 3))
    assert not reach.runs("phd_megatron/other.py", range(1, 9)) and reach.runs("kernels/other.py", range(1, 9))
    text = (
        "import subprocess, sys\n\n\ndef test_child():\n    subprocess.run([sys.executable, '-c', ''], check=True{})\n"
    )
    for more in ("", ", env={}"):  # with another path it reads nothing of ours
        (copy.root / "tests/test_child.py").write_text(text.replace("{}", more))
        code, _, reach = copy.trace("tests/test_child.py", 60)
        assert code == 0 and reach.runs("phd_megatron/sums.py", range(2, 3)), "nobody knows what the process ran"


def test_tests_that_fail_without_a_bug_prove_nothing(project):
    table = project / "tests/mutants/planted/sums.yaml"
    table.write_text(table.read_text().replace("test_sums.py::test_double", "test_red.py"))
    with pytest.raises(RuntimeError, match=r"tests/test_red\.py does not pass without a bug"):
        Campaign(project).run(planted(project / "tests/mutants", project)[:1])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("old: return x, new: return", "stands 2 times"),
        ("old: return y, new: return", "stands 0 times"),
        ("old: x * 2, new: x, more: 1", "a row has the keys"),
    ],
)
def test_a_row_that_names_no_place_is_refused(project, row, said):
    table = project / "tests/mutants/planted/sums.yaml"
    table.write_text(f"- {{file: phd_megatron/sums.py, bug: b, tests: [], {row}}}\n")
    with pytest.raises(TableError, match=said):
        planted(project / "tests/mutants", project)


def outcome(area: str, verdict: str, drawn: bool = False) -> Outcome:
    return Outcome(area, "a.py", "a bug", "x  ->  y", drawn, verdict)


def test_the_report_and_what_is_enough():
    good = [outcome("one", CAUGHT) for _ in range(19)]
    assert mutate.is_enough([*good, outcome("one", SURVIVED)])
    assert not mutate.is_enough([*good[:18], outcome("one", SURVIVED)]), "94.7 %"
    assert not mutate.is_enough([*good * 5, outcome("two", SURVIVED)]), "nothing of an area"
    assert mutate.is_enough([*good, outcome("two", EQUIVALENT)]), "equivalent ones do not count"
    text = mutate.report([*good, outcome("one", SURVIVED, drawn=True)])
    assert "one                  19/19         0/1     95%" in text
    assert "survived:\n  a.py: a bug: x  ->  y" in text and text.endswith("20 bugs, 19 seen")
