"""What every rank of ``phd-megatron parity`` runs: several training runs one after the other in one set of processes.

The argument is a JSON file with a list of directories. In each lies ``run.yaml``; every rank leaves
``outcome_<rank>.json`` there: empty when the run ended, or the reason why it was refused. A crash leaves none.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

from phd_megatron.cli import pretrain
from phd_megatron.errors import UserError

CONFIG = "run.yaml"
OUTCOME = "outcome_{rank}.json"


def main(path: str) -> None:
    """Run all cases of the list."""
    for directory in map(Path, json.loads(Path(path).read_text(encoding="utf-8"))):
        problem = None
        try:
            pretrain.run(["--config", str(directory / CONFIG)])
        except UserError as error:
            problem = str(error)
        _write(directory / OUTCOME.format(rank=os.environ.get("RANK", "0")), problem)
        gc.collect()  # the model of this case makes room for the next one's


def _write(path: Path, problem: str | None) -> None:
    path.write_text(json.dumps({} if problem is None else {"refused": problem}), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
