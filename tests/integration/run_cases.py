"""Run several ``phd-megatron`` commands one after the other in each process that torchrun started.

One launch then serves many cases; each is the real command with its own process groups. The argument is a JSON file
with a list of argument lists.
"""

import json
import sys
from pathlib import Path

from phd_megatron.cli.main import main

for case in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
    code = main(case)
    if code:
        raise SystemExit(f"{' '.join(case)} ended with {code}")
