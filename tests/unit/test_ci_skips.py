"""Under ``CI=true`` a test that skips because something is missing fails; without it, it skips."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
SUITE = """
import pytest

def test_no_package():
    pytest.importorskip("a_package_that_nobody_has")

@pytest.mark.skipif(True, reason="needs a_tool")
def test_no_tool():
    pass

@pytest.fixture
def interpreter():
    pytest.skip("TRITON_INTERPRET=1 is not set, and there is no GPU")

def test_no_interpreter(interpreter):
    pass

def test_no_gpu():
    pytest.skip("needs a CUDA device")

def test_no_right():
    pytest.skip("no file system can be mounted here: mount: permission denied")

@pytest.mark.xfail(reason="needs a_tool", strict=True)
def test_expected_failure():
    assert False

def test_good():
    pass
"""
MODULE = "import pytest\npytest.skip('some_tool is missing', allow_module_level=True)\n"
GPU_MODULE = "import pytest\npytest.skip('needs two CUDA devices', allow_module_level=True)\n"


def outcomes(directory: Path, ci: str) -> tuple[int, dict[str, str], str]:
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    words = ["-rA", "--color=no", "-p", "no:cacheprovider", "-p", "no:xdist", "-c", "pytest.ini", "."]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--continue-on-collection-errors", *words],
        cwd=directory,
        env={**environment, "CI": ci},
        capture_output=True,
        text=True,
        timeout=120,
    )
    rows = re.findall(r"^(PASSED|FAILED|ERROR|XFAIL) (\S+)", done.stdout, re.MULTILINE)
    return done.returncode, {name.rpartition("::")[2]: outcome for outcome, name in rows}, done.stdout


def test_what_is_missing_fails_under_ci_alone(tmp_path: Path) -> None:
    shutil.copy(TESTS / "conftest.py", tmp_path)
    files = {"test_suite.py": SUITE, "test_module.py": MODULE, "test_gpu.py": GPU_MODULE, "pytest.ini": "[pytest]\n"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    passed = {"test_good": "PASSED", "test_expected_failure": "XFAIL"}
    code, found, said = outcomes(tmp_path, "false")
    assert (code, found) == (0, passed) and "7 skipped" in said
    code, found, said = outcomes(tmp_path, "true")
    failed = {"test_no_package": "FAILED", "test_no_tool": "ERROR", "test_no_interpreter": "ERROR"}
    assert (code, found) == (1, passed | failed | {"test_module.py": "ERROR"})
    assert "3 skipped" in said, "no GPU, no two GPUs and no right to mount can be"
    assert "skipped under CI: could not import 'a_package_that_nobody_has'" in said and "ALLOWED_SKIPS" in said
    assert "skipped under CI: some_tool is missing" in said


def test_every_allowed_reason_is_one_of_a_test() -> None:
    source = (TESTS / "conftest.py").read_text()
    table = source[source.index("ALLOWED_SKIPS: list") : source.index("def _failed_under_ci")]
    reasons = re.findall(r'^ +\("([^"]+)", "[^"]+"\),$', table, re.MULTILINE)
    assert len(reasons) == len(re.findall(r"^ +\(", table, re.MULTILINE)) > 10
    others = [path for path in TESTS.rglob("*.py") if path.name not in ("conftest.py", Path(__file__).name)]
    text = "\n".join(path.read_text() for path in others)
    assert [reason for reason in reasons if reason not in text] == []


def test_ci_asks_for_it() -> None:
    root = TESTS.parent
    lines = (root / ".ci" / "run").read_text().splitlines()
    assert lines.index("export CI=true") < next(i for i, line in enumerate(lines) if line.startswith("exec "))
    assert "lm-eval" in (root / "pyproject.toml").read_text().split("\ntest = [\n")[1].split("\n]\n")[0]
