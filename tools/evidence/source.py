"""Which sources a run was made with, without git: the names git gives to folders, from the files themselves."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

SOURCES = ("phd_megatron", "kernels")
_IGNORED = ("__pycache__",)


def tree_hash(folder: Path) -> str:
    """The SHA-1 that git gives to a folder with these files; ``__pycache__`` is left out, as ``.gitignore`` says."""
    entries = []
    for path in folder.iterdir():
        if path.name in _IGNORED or path.suffix == ".pyc":
            continue
        if path.is_dir():
            child = tree_hash(path)
            if child != _object("tree", b""):  # git knows no empty folders
                entries.append((path.name + "/", b"40000 " + path.name.encode(), child))
        else:
            # None of the files is a program, and a copy of a checkout may lose or gain that bit.
            entries.append((path.name, b"100644 " + path.name.encode(), _object("blob", path.read_bytes())))
    content = b"".join(head + b"\0" + bytes.fromhex(name) for _, head, name in sorted(entries))
    return _object("tree", content)


def sources(root: Path) -> dict[str, str]:
    """The program's folders in a checkout, as git would name them."""
    return {name: tree_hash(root / name) for name in SOURCES}


def find_commit(root: Path, wanted: dict[str, str]) -> str | None:
    """The oldest commit of the checkout's history whose folders are these; None when there is none."""
    for commit in _git(root, "log", "--format=%H", "--reverse", "--first-parent").split():
        if all(_git(root, "rev-parse", f"{commit}:{name}").strip() == tree for name, tree in wanted.items()):
            return commit
    return None


def _object(kind: str, content: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True).stdout
