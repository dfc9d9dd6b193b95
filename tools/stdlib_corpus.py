"""Copy the standard library's sources of the running interpreter into a folder: a real corpus every machine has."""

from __future__ import annotations

import argparse
import shutil
import sysconfig
from pathlib import Path

OTHERS = {"site-packages", "dist-packages", "__pycache__"}


def copy_sources(stdlib: Path, output: Path) -> tuple[int, int]:
    """Copy every ``.py`` file below ``stdlib`` but installed packages; returns (files, bytes)."""
    files = [path for path in sorted(stdlib.rglob("*.py")) if not OTHERS & set(path.relative_to(stdlib).parts)]
    targets = {path: output / path.relative_to(stdlib) for path in files}
    for path, target in targets.items():
        if target.exists() and not (target.is_file() and target.read_bytes() == path.read_bytes()):
            raise SystemExit(f"error: {target} exists and is not {path}, so nothing is copied; name another folder")
    for path, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return len(files), sum(path.stat().st_size for path in files)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="folder to fill")
    options = parser.parse_args()
    stdlib = Path(sysconfig.get_path("stdlib"))
    files, size = copy_sources(stdlib, options.output)
    if not files:
        parser.error(f"no .py files below {stdlib}; this Python comes without its sources, so use another one")
    print(f"{files} files, {size / 1e6:.1f} MB of Python from {stdlib} in {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
