"""The house has floors and imports go down only; light packages stay light (``docs/architecture.md``)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest
from draw_house import PICTURE, draw, facts, facts_of
from house import FLOOR, FLOORS, PACKAGE, ROOT, edges, imports, modules, room

TORCH_ONLY = ("config", "phd", "norm", "kernels")
HEAVY = ("torch", "megatron", "transformers")
MODULES = modules()


def test_every_folder_has_a_floor() -> None:
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert folders <= set(FLOOR), (
        f"give these a floor in tools/house.py and in docs/architecture.md: {folders - set(FLOOR)}"
    )


def test_imports_never_go_up() -> None:
    assert [e for e in edges() if FLOOR[e[1]] > FLOOR[e[0]]] == []


def test_rooms_of_one_floor_do_not_import_each_other_in_circles() -> None:
    graph: dict[str, set[str]] = {name: set() for name in FLOOR}
    for source, goal, _ in edges():
        graph[source].add(goal)

    def reaches(start: str, goal: str, seen: frozenset[str] = frozenset()) -> bool:
        return any(n == goal or (n not in seen and reaches(n, goal, seen | {n})) for n in graph[start])

    assert [name for name in graph if reaches(name, name)] == []


def test_the_picture_shows_todays_rooms_floors_and_imports() -> None:
    assert facts_of(PICTURE.read_text("utf-8")) == facts(), "draw it again: python tools/draw_house.py"


def test_the_picture_is_drawn_alike_each_time_and_shows_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert draw() == draw()
    assert facts_of(draw()) == facts()
    others = [edge for edge in edges() if edge[:2] != ("model", "norm")]
    monkeypatch.setattr("draw_house.edges", lambda: iter([*others, ("config", "cli", "here")]))
    assert facts()[1] == {edge[:2] for edge in others} | {("config", "cli")} == facts_of(draw())[1]
    assert facts_of(PICTURE.read_text("utf-8")) != facts()


def test_the_document_lists_the_same_floors() -> None:
    (block,) = re.findall(r"## Floors\n.*?```\n(.*?)```", (ROOT / "docs/architecture.md").read_text("utf-8"), re.DOTALL)
    assert [set(line.split()) for line in reversed(block.splitlines())] == [set(names) for names in FLOORS]


@pytest.mark.parametrize("name", sorted(m for m in MODULES if room(m) in TORCH_ONLY))
def test_ground_floor_needs_neither_megatron_nor_transformers(name: str) -> None:
    roots = {target.split(".")[0] for target, _ in imports(name, MODULES[name])}
    assert not roots & {"megatron", "transformers"}


@pytest.mark.parametrize("name", ["phd_megatron.phd.kv_policy", "phd_megatron.norm.schemes"])
def test_exported_definitions_need_torch_and_the_standard_library_alone(name: str) -> None:
    allowed = {*sys.stdlib_module_names, *(["torch"] if "kv_policy" in name else [])}
    assert {target.split(".")[0] for target, _ in imports(name, MODULES[name])} <= allowed


def test_exported_model_files_need_neither_megatron_nor_this_package() -> None:
    files = [n for n in MODULES if re.search(r"\.huggingface\.(.*\.)?(modeling|configuration)_\w+$", n)]
    for name in files:
        absolute = [
            node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            for node in ast.walk(ast.parse(MODULES[name].read_text("utf-8")))
            if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level)
        ]
        assert not [a for a in absolute if a and a.split(".")[0] in ("megatron", "phd_megatron")], name


LIGHT = [n.removesuffix(".__init__") for n in MODULES if n.endswith(".__init__") and n.count(".") <= 2]


def loaded_by(statement: str) -> list[str]:
    """Heavy packages in ``sys.modules`` after a statement, then the seconds it took."""
    code = f"""
import sys, time
began = time.perf_counter()
{statement}
print(time.perf_counter() - began)
print(*[name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_import_is_quick_and_loads_nothing_heavy() -> None:
    fastest = min((loaded_by("import phd_megatron") for _ in range(3)), key=lambda answer: float(answer[0]))
    assert fastest[1:] == []
    assert float(fastest[0]) < 0.5


def test_packages_load_nothing_heavy() -> None:
    statement = "import " + ", ".join(n for n in LIGHT if not n.startswith("phd_megatron.kernels."))
    assert loaded_by(statement)[1:] == []


def test_help_loads_nothing_heavy() -> None:
    statement = "from phd_megatron.cli.main import main; import contextlib, io\n"
    statement += "with contextlib.redirect_stdout(io.StringIO()): main(['--help'])"
    assert loaded_by(statement)[1:] == []


def test_no_machine_paths_in_tracked_files() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    # Written in pieces, or this file would find itself.
    pattern = re.compile(r"(?<![\w.$}*-])/(?:" + "|".join(("wo" + "rk", "ro" + "ot", "home/" + r"\w")) + r")\b")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        try:
            text = (ROOT / name).read_text("utf-8")
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue
        found += [f"{name}:{number}" for number, line in enumerate(text.splitlines(), 1) if pattern.search(line)]
    assert found == []
