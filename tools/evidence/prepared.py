"""A built text as Megatron's data: the tokenizer trained on its training part, all three parts tokenised, packed."""

from __future__ import annotations

import json
from pathlib import Path

from .corpus import MANIFEST, PARTS
from .debs import sha256_of
from .pack import pack

VOCABULARY = 16_384
TOKENIZER = f"bpe:{VOCABULARY}"
DATA, ABOUT = "data", "text.json"


def prepare_and_pack(folder: Path, output: Path, part_bytes: int, workers: int) -> list[Path]:
    """Tokenise what is not tokenised yet and write the archive's parts.

    ``folder`` holds what :func:`evidence.corpus.build` wrote. The archive holds, for each part of the text, ``.bin``
    and ``.idx`` with their sidecar and tokenizer, and ``text.json``, which says what the text is made of.
    """
    from phd_megatron.data.preprocess import prepare

    data = folder / DATA
    tokens = {}
    for part in PARTS:
        prefix = data / part
        if not Path(f"{prefix}.idx").exists():
            tokenizer = TOKENIZER if part == PARTS[0] else f"{data / PARTS[0]}.tokenizer"
            prepare([folder / f"{part}.jsonl"], prefix, tokenizer, workers=workers, progress=False)
        tokens[part] = json.loads(Path(f"{prefix}.meta.json").read_text("utf-8"))["tokens"]
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    about = {
        "text": manifest["text"],
        "manifest_sha256": sha256_of(folder / MANIFEST),
        "train_sha256": manifest["parts"]["train"]["sha256"],
        "tokens": tokens,
    }
    (data / ABOUT).write_text(json.dumps(about) + "\n", encoding="utf-8")
    names = [f"{part}.{suffix}" for part in PARTS for suffix in ("bin", "idx", "meta.json", "tokenizer")]
    return pack(data, [ABOUT, *names], output / f"{folder.name}.tar.xz", part_bytes)
