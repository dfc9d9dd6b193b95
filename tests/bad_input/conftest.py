"""Good inputs that the rows spoil: data, a checkpoint, its export, a metrics file."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest

# transformers copies a directory's code here when it loads it; it reads the variable when it is imported.
os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp(prefix="phd-hf-modules-"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> place. Everything is made by the commands themselves, in this process."""
    from phd_megatron.cli.main import main

    from .rows import RUN

    root = tmp_path_factory.mktemp("kit")
    places = {name: root / name for name in ("data", "run", "export", "metrics", "hf", "stock")}
    texts = (f"{i} times {i} is {i * i}; " + "lorem ipsum dolor " * (i % 5) for i in range(300))
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    argv = ["prepare", "--input", root / "text.jsonl", "--output-prefix", places["data"], "--workers", "1"]
    assert main([*map(str, argv)]) == 0
    run = RUN.replace("@data", str(places["data"])).split()
    assert main(["pretrain", *run, "--save", str(places["run"]), "--metrics-file", str(places["metrics"])]) == 0
    export = ["export", "--checkpoint", places["run"], "--output", places["export"], "--verify", "none", "--no-native"]
    assert main([*map(str, export)]) == 0
    native = ["export", "--checkpoint", places["run"], "--output", places["hf"], "--verify", "none"]
    assert main([*map(str, native)]) == 0
    stock = ["export", "--checkpoint", places["run"], "--output", places["stock"], "--to", "megatron"]
    assert main([*map(str, stock)]) == 0
    return places
