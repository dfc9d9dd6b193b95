"""The house has floors and imports go down only; light packages stay light (``docs/architecture.md``)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "phd_megatron"

FLOORS = (
    ("config", "phd", "norm", "console"),
    ("kernels", "runtime"),
    ("model",),
    ("checkpoint",),
    ("data", "huggingface", "planning"),
    ("training",),
    ("sweep", "parity", "bench"),
    ("cli",),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
TORCH_ONLY = ("config", "phd", "norm", "kernels")
HEAVY = ("torch", "megatron", "transformers")


def modules() -> dict[str, Path]:
    """Every module by its import name; ``kernels/<op>`` counts as ``phd_megatron.kernels.<op>``."""
    found = {}
    for base, prefix in ((PACKAGE, "phd_megatron"), (ROOT / "kernels", "phd_megatron.kernels")):
        for path in sorted(base.rglob("*.py")):
            parts = [prefix, *path.relative_to(base).with_suffix("").parts]
            found[".".join(parts)] = path
    return found


MODULES = modules()


def imports(name: str, path: Path) -> Iterator[tuple[str, int]]:
    """Absolute names a file imports anywhere, lazily too, with the line."""
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = [*base, *(node.module.split(".") if node.module else [])]
            yield from ((".".join([*stem, alias.name]), node.lineno) for alias in node.names)


def part(name: str) -> str | None:
    """``phd_megatron.norm.schemes`` to ``norm``; None outside the floors."""
    words = name.split(".")
    return words[1] if words[0] == "phd_megatron" and len(words) > 1 and words[1] in FLOOR else None


def edges() -> Iterator[tuple[str, str, str]]:
    """(importing part, imported part, where) over the whole package."""
    for name, path in MODULES.items():
        for target, line in imports(name, path):
            source, goal = part(name), part(target)
            if source and goal and source != goal:
                yield source, goal, f"{path.relative_to(ROOT)}:{line}"


def test_every_folder_has_a_floor() -> None:
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert folders <= set(FLOOR), f"give these a floor here and in docs/architecture.md: {folders - set(FLOOR)}"


def test_imports_never_go_up() -> None:
    assert [e for e in edges() if FLOOR[e[1]] > FLOOR[e[0]]] == []


def test_parts_of_one_floor_do_not_import_each_other_in_circles() -> None:
    graph: dict[str, set[str]] = {name: set() for name in FLOOR}
    for source, goal, _ in edges():
        graph[source].add(goal)

    def reaches(start: str, goal: str, seen: frozenset[str] = frozenset()) -> bool:
        return any(n == goal or (n not in seen and reaches(n, goal, seen | {n})) for n in graph[start])

    assert [name for name in graph if reaches(name, name)] == []


@pytest.mark.parametrize("name", sorted(m for m in MODULES if part(m) in TORCH_ONLY))
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
