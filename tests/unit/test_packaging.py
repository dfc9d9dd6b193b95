"""The folder ``kernels/`` must reach users as ``phd_megatron.kernels`` and must never be a package of its own.

``kernels`` is also a project on PyPI that transformers imports when it finds it. Each test starts a fresh interpreter
without site initialisation, so that an editable install of the developer's environment cannot answer instead.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SITE = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]

IMPORT = """
import importlib, importlib.util, pathlib, site, sys
ours, packages = pathlib.Path(sys.argv[1]).resolve(), sys.argv[2:]
if (ours / "installed").exists():
    site.addsitedir(str(ours))  # reads the .pth file of an editable install
else:
    sys.path.insert(0, str(ours))
sys.path += packages
import phd_megatron
attention = importlib.import_module("phd_megatron.kernels.phd_attention")
print(phd_megatron.__file__)
print(attention.__file__)
print(callable(getattr(attention, "phd_attention", None)))
spec = importlib.util.find_spec("kernels")
print("none" if spec is None else spec.origin or list(spec.submodule_search_locations))
"""


def run_python(*arguments: str, cwd: Path | None = None) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def imported_from(directory: Path, cwd: Path) -> list[str]:
    return run_python("-I", "-S", "-c", IMPORT, str(directory), *SITE, cwd=cwd).splitlines()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, so that builds leave nothing in the checkout."""
    target = tmp_path_factory.mktemp("source")
    for name in ("phd_megatron", "kernels"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    return target


def build(source: Path, hook: str, tmp_path: Path) -> Path:
    """Run one of pip's build hooks and unpack the wheel it makes, as pip does."""
    code = f"from setuptools import build_meta; import sys; build_meta.{hook}(sys.argv[1])"
    run_python("-c", code, str(tmp_path), cwd=source)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def test_checkout_import(tmp_path: Path) -> None:
    package, attention, callable_, _ = imported_from(ROOT, tmp_path)
    assert Path(package) == ROOT / "phd_megatron/__init__.py"
    assert Path(attention) == ROOT / "kernels/phd_attention/__init__.py"
    assert callable_ == "True"


def test_editable_install(source: Path, tmp_path: Path) -> None:
    site = build(source, "build_editable", tmp_path)
    (site / "installed").touch()
    package, attention, callable_, kernels = imported_from(site, tmp_path)
    assert Path(package) == source / "phd_megatron/__init__.py"
    assert Path(attention) == source / "kernels/phd_attention/__init__.py"
    assert callable_ == "True"
    assert str(source) not in kernels


def test_wheel(source: Path, tmp_path: Path) -> None:
    site = build(source, "build_wheel", tmp_path)
    assert not (site / "kernels").exists()
    assert not (site / "tests").exists()
    assert (site / "phd_megatron/py.typed").exists()
    package, attention, callable_, kernels = imported_from(site, tmp_path)
    assert Path(package) == site / "phd_megatron/__init__.py"
    assert Path(attention) == site / "phd_megatron/kernels/phd_attention/__init__.py"
    assert callable_ == "True"
    assert str(site) not in kernels
    (entry_points,) = site.glob("*.dist-info/entry_points.txt")
    assert "phd-megatron = phd_megatron.__main__:program" in entry_points.read_text()


def test_wheel_holds_every_file(source: Path, tmp_path: Path) -> None:
    def files(folder: Path, root: Path) -> set[Path]:
        found = {path.relative_to(root) for path in folder.rglob("*") if path.is_file()}
        return {path for path in found if "__pycache__" not in path.parts and ".dist-info" not in path.parts[0]}

    site = build(source, "build_wheel", tmp_path)
    kernels = {Path("phd_megatron") / path for path in files(source / "kernels", source)}
    assert files(site, site) == files(source / "phd_megatron", source) | kernels


def test_kernels_folder_is_no_package() -> None:
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "tests/__init__.py").exists()
    assert not (ROOT / "conftest.py").exists()


def test_foreign_kernels_package_wins_over_the_folder(tmp_path: Path) -> None:
    """With the checkout first on the path, a real package of that name is still the one that is imported."""
    foreign = tmp_path / "kernels"
    foreign.mkdir()
    (foreign / "__init__.py").write_text("owner = 'somebody else'\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.owner)"
    assert run_python("-c", code, cwd=ROOT).strip() == "somebody else"


def test_transformers_imports_with_the_checkout_as_working_directory() -> None:
    code = (
        "import sys; assert '' in sys.path; from transformers import LlamaForCausalLM; print(LlamaForCausalLM.__name__)"
    )
    assert run_python("-c", code, cwd=ROOT).strip() == "LlamaForCausalLM"
