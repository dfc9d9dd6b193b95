"""Follow the words of a command line until they are a completed configuration, and count the files on the way.

A stop is a stay in one file. The first call of a function from another one moves there, in the order in which the
program makes them; a stop is upwards where its file's floor is above that of the one before. Nothing is trained.

    python tools/follow_words.py                              # a preset, a YAML file and flags
    python tools/follow_words.py --list -- --preset NAME      # each stop, of other words
"""

from __future__ import annotations

import argparse
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType

from house import FLOOR, ROOT

PACKAGE = ROOT / "phd_megatron"
WORDS = ["--preset", "phd-550m", "--config", str(ROOT / "examples/quickstart_phd.yaml"), "--train-iters", "1"]


class Way:
    """Files of the package in the order in which calls enter them, as a profiler sees it."""

    def __init__(self) -> None:
        self.stops: list[str] = []
        self._seen: set[tuple[CodeType | None, CodeType]] = set()

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        """A call enters the file of its function, unless its caller has called that before."""
        here = _file(frame.f_code)
        if event != "call" or here is None or frame.f_code.co_name == "<module>":
            return
        caller = frame.f_back
        while caller is not None and _file(caller.f_code) is None:  # a library between
            caller = caller.f_back
        step = (None if caller is None else caller.f_code, frame.f_code)
        if step not in self._seen:
            self._seen.add(step)
            if self.stops[-1:] != [here]:
                self.stops.append(here)

    def __str__(self) -> str:
        floors = [FLOOR.get(stop.split("/")[0], -1) for stop in self.stops]  # errors.py is below all
        up = sum(after > before for before, after in pairwise(floors))
        return f"{len(self.stops)} stops in {len(set(self.stops))} files, {up} of them upwards"


@cache
def _file(code: CodeType) -> str | None:
    path = Path(code.co_filename)
    return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name each stop")
    parser.add_argument("words", nargs="*", default=WORDS, metavar="WORD", help="of `phd-megatron pretrain`, after --")
    args = parser.parse_args()
    from phd_megatron.config.load import load_run_config
    from phd_megatron.config.resolve import resolve

    way = Way()
    sys.setprofile(way)
    try:
        resolve(load_run_config(args.words, transformer_fields={}).config)
    finally:
        sys.setprofile(None)
    print(way)
    if args.list:
        print(*way.stops, sep="\n")


if __name__ == "__main__":
    main()
