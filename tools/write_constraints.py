"""Write launch_scripts/constraints.txt: the versions of this environment, with which the tests ran.

Run it with the Python of an environment in which `bash tests/run.sh` is clean. It follows the requirements of this
package and of its extra `test`, so what else lies in the environment is not written. Each line holds for this Python
alone; the lines of other Pythons stay. A Python that has none gets what the requirements allow.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

FILE = Path(__file__).resolve().parents[1] / "launch_scripts" / "constraints.txt"
#: chosen by each machine: a build of torch for its CUDA, or for none, and what such a build asks for
MACHINES_OWN = re.compile(r"torch(vision|audio)?|(pytorch-)?triton|(nvidia|cuda)-.*|setuptools")
HEAD = """\
# The versions that the tests ran with. Written by tools/write_constraints.py; do not edit. torch, triton and CUDA's
# packages are each machine's own.
"""


def installed(package: str, extras: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Name and version of all that ``package[extras]`` needs here, itself left out; a name may come more than once.

    Raises:
        importlib.metadata.PackageNotFoundError: something that it needs is not installed.
    """
    seen: set[tuple[str, str]] = set()
    waiting = [(package, extra) for extra in ("", *extras)]
    while waiting:
        if (key := waiting.pop()) in seen:
            continue
        seen.add(key)
        found = importlib.metadata.distribution(key[0])
        if key[0] != package:
            yield key[0], found.version
        for text in found.requires or ():
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": key[1]}):
                waiting += [(canonicalize_name(need.name), extra) for extra in ("", *need.extras)]


def constraints(versions: dict[str, str], before: str = "") -> str:
    """The file's text, for this Python's versions by normalised name and what it said ``before`` for others."""
    python = "{}.{}".format(*sys.version_info)
    torch, system = Version(importlib.metadata.version("torch")).public, f"{platform.system()} {platform.machine()}"
    tests = {python: f"# Python {python}: torch {torch}, {system}, {datetime.date.today().isoformat()}\n"}
    pins = [f'{name}=={versions[name]} ; python_version == "{python}"\n' for name in versions]
    for line in before.splitlines(keepends=True):
        if found := re.match(r"# Python (\S+): ", line):
            tests.setdefault(found[1], line)
        elif not line.startswith("#") and f'"{python}"' not in line:
            pins.append(line)
    return HEAD + "".join([*(tests[name] for name in sorted(tests)), *sorted(pins)])


def main() -> None:
    """Write the file and say how many versions it has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FILE)
    output: Path = parser.parse_args().output
    versions = dict(installed("phd-megatron", frozenset({"test"})))
    versions = {name: version for name, version in versions.items() if not MACHINES_OWN.fullmatch(name)}
    before = output.read_text(encoding="utf-8") if output.exists() else ""
    output.write_text(constraints(versions, before), encoding="utf-8")
    print(f"{output}: {len(versions)} versions")


if __name__ == "__main__":
    main()
