"""What every rank of ``phd-megatron parity`` runs: several training runs one after the other in one set of processes.

The argument is a JSON file with a list of runs: ``directory``, in which ``run.yaml`` lies, ``device`` as in there, and
``routing``, null or the arguments of :class:`~phd_megatron.model.routing_replay.RoutingReplay`. Every rank leaves
``outcome_<rank>.json`` in the run's directory: what was counted about routing when the run ended, or the reason why it
was refused. A crash leaves none.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

from phd_megatron.errors import UserError
from phd_megatron.model.routing_replay import RoutingReplay
from phd_megatron.training.start import pretrain

CONFIG = "run.yaml"
OUTCOME = "outcome_{rank}.json"
COUNTS = ("rows", "changed", "largest_gap")


class Routing(TypedDict):
    """Arguments of :class:`~phd_megatron.model.routing_replay.RoutingReplay`; its directory as text."""

    directory: str
    record: bool


def main(path: str) -> None:
    """Run all cases of the list."""
    for case in json.loads(Path(path).read_text(encoding="utf-8")):
        directory = Path(case["directory"])
        outcome: dict[str, str | float] = {}
        try:
            with _routing(case["routing"]) as replay:
                pretrain(["--config", str(directory / CONFIG)], case["device"])
            if replay is not None:
                outcome = {name: getattr(replay, name) for name in COUNTS}
        except UserError as error:
            outcome = {"refused": str(error)}
        path_of_rank = directory / OUTCOME.format(rank=os.environ.get("RANK", "0"))
        path_of_rank.write_text(json.dumps(outcome), encoding="utf-8")
        gc.collect()  # the model of this case makes room for the next one's


@contextlib.contextmanager
def _routing(arguments: Routing | None) -> Iterator[RoutingReplay | None]:
    if arguments is None:
        yield None
        return
    with RoutingReplay(Path(arguments["directory"]), arguments["record"]).active() as replay:
        yield replay


if __name__ == "__main__":
    main(sys.argv[1])
