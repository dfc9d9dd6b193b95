"""The set-up of the environment: the lock fits the requirements, and pip is held to it only where it may be.

pip is a script that writes down what it is asked for; nothing is installed.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from write_constraints import MACHINES_OWN, constraints, installed

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "launch_scripts/constraints.txt"
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts need bash")


PYTHONS = ("3.11", "3.12")


def pins(python: str) -> dict[str, Requirement]:
    lines = [line for line in LOCK.read_text("utf-8").splitlines() if not line.startswith("#")]
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(pin.name): pin for pin in found if str(pin.marker) == f'python_version == "{python}"'}


# ---------------------------------------------------------------- the file


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_has_every_requirement_in_a_version_that_it_allows(python: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needs = [Requirement(text) for text in project["dependencies"] + project["optional-dependencies"]["test"]]
    locked = pins(python)
    for need in needs:
        if need.marker is not None and not need.marker.evaluate({"python_version": python}):
            continue
        if MACHINES_OWN.fullmatch(name := canonicalize_name(need.name)):
            assert name not in locked
            continue
        (only,) = locked[name].specifier
        assert only.operator == "==" and need.specifier.contains(only.version), name


def test_the_lock_leaves_to_each_machine_what_is_its_own() -> None:
    assert [name for python in PYTHONS for name in pins(python) if MACHINES_OWN.fullmatch(name)] == []
    assert all(MACHINES_OWN.fullmatch(name) for name in ("torch", "triton", "nvidia-cublas", "cuda-bindings"))
    assert not MACHINES_OWN.fullmatch("pytorch-lightning") and not MACHINES_OWN.fullmatch("torchtitan")


def test_the_lock_is_for_the_pythons_that_it_was_made_with() -> None:
    text = LOCK.read_text("utf-8")
    assert tuple(re.findall(r"^# Python (\S+): ", text, re.MULTILINE)) == PYTHONS
    assert {str(Requirement(line).marker) for line in text.splitlines() if not line.startswith("#")} == {
        f'python_version == "{python}"' for python in PYTHONS
    }


def test_the_lock_of_another_python_stays() -> None:
    here = f"3.{sys.version_info[1]}"
    before = (
        f'# Some head\n# Python 3.1: torch 0.1, here\n# Python {here}: old\na==1 ; python_version == "3.1"\n'
        f'b==1 ; python_version == "{here}"\n'
    )
    text = constraints({"c": "2", "a": "2"}, before)
    assert [line for line in text.splitlines() if not line.startswith("#")] == [
        'a==1 ; python_version == "3.1"',
        f'a==2 ; python_version == "{here}"',
        f'c==2 ; python_version == "{here}"',
    ]
    assert "# Python 3.1: torch 0.1, here\n" in text and "head" not in text and "old" not in text


def test_the_writer_follows_requirements_and_extras() -> None:
    found = dict(installed("pytest-xdist", frozenset()))
    assert found["pytest"] == importlib.metadata.version("pytest") and "pluggy" in found
    assert "pytest-xdist" not in found and "psutil" not in found
    assert "psutil" in dict(installed("pytest-xdist", frozenset({"psutil"})))
    text = constraints(found)
    assert f'pytest=={found["pytest"]} ; python_version == "3.{sys.version_info[1]}"\n' in text
    assert [line for line in text.splitlines() if line.startswith("pytest")] != []


# ---------------------------------------------------------------- the scripts

PIP = """\
#!/usr/bin/env bash
[[ "$1 $2" == "-m pip" ]] || exec "{python}" "$@"
[[ "$3" == install && " $* " == *" -e "* ]] || exit 0
echo "pip: $(tr '\\n' ' ' <"${{@:$#}}")"
[[ -z "${{REFUSED:-}}" ]] || ! grep -q "$REFUSED" "${{@:$#}}"
"""


def setup_says(place: Path, **variables: str) -> tuple[int, list[list[str]], str]:
    """Exit code of the set-up with a pip that does nothing, the constraints of each try, and all that was said."""
    scripts = place / "launch_scripts"
    scripts.mkdir()
    shutil.copy(ROOT / "launch_scripts/_env.sh", scripts)
    (scripts / "constraints.txt").write_text("# versions\nnumpy==0.0.1\nours==2.0\nnot-there==3.0\n")
    ours = place / ".venv/lib/python3"
    (ours / "ours-1.0.dist-info").mkdir(parents=True)
    (ours / "ours-1.0.dist-info/METADATA").write_text("Name: ours\nVersion: 1.0\n")
    python = place / "bin/python"
    python.parent.mkdir()
    python.write_text(PIP.format(python=sys.executable))
    python.chmod(0o755)
    code = 'set -euo pipefail; source launch_scripts/_env.sh; PYTHON="$PWD/bin/python"; phd_install test'
    path = os.pathsep.join([str(ours), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {name: value for name, value in os.environ.items() if not name.startswith("PHD_")}
    done = subprocess.run(
        ["bash", "-c", code],
        cwd=place,
        env={**env, "PYTHONPATH": path, "TMPDIR": str(place / "bin"), **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    tries = [line.removeprefix("pip:").split() for line in done.stdout.splitlines() if line.startswith("pip:")]
    return done.returncode, tries, done.stdout + done.stderr


TORCH = f"torch=={importlib.metadata.version('torch')}"
LOCKED = [TORCH, "ours==2.0", "not-there==3.0"]


@needs_bash
@pytest.mark.parametrize(
    ("variables", "expected", "code"),
    [
        ({}, [LOCKED], 0),
        ({"PHD_SKIP_LOCK": "1"}, [[TORCH]], 0),
        ({"REFUSED": "not-there"}, [LOCKED, [TORCH]], 0),
        ({"REFUSED": "torch"}, [LOCKED, [TORCH]], 1),
    ],
    ids=["as-tested", "opt-out", "a-version-is-gone", "nothing-can-be-installed"],
)
def test_pip_is_held_to_the_lock_for_what_is_missing_or_ours(
    variables: dict[str, str], expected: list[list[str]], code: int, tmp_path: Path
) -> None:
    """numpy is there, outside of what the checkout made, so it stays whatever its version; so does torch's build."""
    ended, tries, said = setup_says(tmp_path, **variables)
    assert (ended, tries) == (code, expected), said
    assert ("cannot be installed here" in said) == (len(expected) == 2)


VERSIONED = """\
#!/usr/bin/env bash
here="$(cd "$(dirname "$0")" && pwd)"
case "$1 $2" in
    "-m venv") mkdir -p "${{@:$#}}/bin" && cp "$0" "${{@:$#}}/bin/python" && echo "made ${{@:$#}}" ;;
    "-m pip")
        [[ " $* " != *" megatron-core=="* ]] || echo "pip: ${{@:$#}}"
        [[ " $* " != *" megatron-core=={refused} "* ]] || exit 1
        ;;
    "-c "*"sys.argv[1]"*) [[ "$3" != megatron-core ]] || echo 0.16.1 ;;
    "-c "*) ;;
    *) "{python}" "$@" ;;
esac
"""


def second_environment(place: Path, version: str, **variables: str) -> tuple[int, str]:
    """Exit code and words of :func:`phd_mcore_environment`, where no Python is found but one that is named."""
    scripts = place / "launch_scripts"
    scripts.mkdir(exist_ok=True)
    shutil.copy(ROOT / "launch_scripts/_env.sh", scripts)
    (scripts / "constraints.txt").write_text("")
    (place / "python3.99").write_text(VERSIONED.format(python=sys.executable, refused="0.9"))
    (place / "python3.99").chmod(0o755)
    code = f"""set -euo pipefail; source launch_scripts/_env.sh; pyenv() {{ echo "{place}"; }}
    phd_python_ok() {{ [[ "$1" == "{place}"/* && -x "$1" ]]; }}
    phd_mcore_environment {version} test; echo "python: $PYTHON in $VIRTUAL_ENV"
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith("PHD_")}
    done = subprocess.run(
        ["bash", "-c", code], cwd=place, env={**env, **variables}, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


@needs_bash
def test_a_second_environment_needs_a_python_and_is_made_once(tmp_path: Path) -> None:
    code, said = second_environment(tmp_path, "0.19.2")
    assert code == 2 and "error: megatron-core 0.19.2 needs Python 3.12 or later" in said
    assert "PHD_MCORE_PYTHON=/path/to/python3.12" in said and "made" not in said
    named = {"PHD_MCORE_PYTHON": str(tmp_path / "python3.99")}
    venv = tmp_path / ".venv-mcore-0.19.2"
    code, said = second_environment(tmp_path, "0.19.2", **named)
    assert code == 0, said
    assert f"made {venv}\n" in said and f"python: {venv}/bin/python in {venv}\n" in said
    assert "megatron-core 0.19.2 instead of 0.16.1" in said and "pip: megatron-core==0.19.2\n" in said
    code, said = second_environment(tmp_path, "0.19.2")  # it is there now, and needs no Python any more
    assert code == 0 and "made" not in said, said
    code, said = second_environment(tmp_path, "0.16.1", **named)
    assert code == 0 and "instead of" not in said, said
    code, said = second_environment(tmp_path, "0.9", **named)
    assert code == 2 and "error: megatron-core 0.9 cannot be installed into" in said, said
