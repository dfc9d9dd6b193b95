#!/usr/bin/env python3
"""A Megatron checkpoint as a Hugging Face directory; the same as ``phd-megatron export``.

python tools/convert_checkpoint.py --checkpoint DIR[/iter_N] --output HF_DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from phd_megatron.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
