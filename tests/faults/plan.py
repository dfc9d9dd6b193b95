"""Which faults come, drawn from a seed: the same seed gives the same plan."""

from __future__ import annotations

import random
from dataclasses import dataclass

from layouts import Layout

#: moments of a save: (audit event, pattern of the path, rank 0 only). In the order in which they come.
MOMENTS = {
    "directory made": ("os.mkdir", r"/iter_\d{7}/?$", True),
    "tensors begun": ("open", r"/__\d+_\d+\.distcp$", False),
    "index begun": ("open", r"/\.metadata", True),
    "checksums begun": ("open", r"/checksums\.json", True),
    "before the commit": ("os.rename", r"/iter_\d{7}/metadata\.json$", True),
    "commit, not yet tracked": ("os.rename", r"/latest_checkpointed_iteration\.txt$", True),
    "pruning begun": ("os.remove", r"/metadata\.json$", True),
    "pruning half done": ("shutil.rmtree", r"/iter_\d{7}$", True),
}
START, STEP = "while starting", "between steps"

#: what is killed, and how often
KILLS = {"kill -9 rank": 5, "kill -9 torchrun": 3, "kill -9 all": 2, "stop, go on, kill -9 rank": 1}
WRITER = "kill -9 rank, writer in background"
OTHERS = [
    "damaged file",
    "full disk",
    "full disk in a save",
    "read-only directory",
    "directory moved away",
    "unfinished checkpoint removed",
    "SIGTERM",
    "rank stopped for good",
]


@dataclass(frozen=True)
class Fault:
    """One fault: what, when, where.

    Args:
        kind: what happens.
        moment: :data:`START`, :data:`STEP`, or a key of :data:`MOMENTS`.
        rank: that is killed, stopped or held.
        steps: that are made before it (:data:`STEP`), or which save is meant (a moment of a save).
        delay: seconds after that.
        choice: a number in [0, 1) for what else is to be chosen, such as the damaged byte.
    """

    kind: str
    moment: str
    rank: int
    held_rank: int
    steps: int
    delay: float
    choice: float

    @property
    def is_kill(self) -> bool:
        """Whether a process is killed."""
        return "kill -9" in self.kind


def draw_kill(generator: random.Random, layout: Layout) -> Fault:
    """A kill at a random time, or at a moment of a save."""
    (kind,) = generator.choices([*KILLS], [*KILLS.values()])
    # Half of them by the clock, which falls into saves as well; the rest forced.
    where = generator.random()
    if where < 0.15:
        moment, delay = START, generator.uniform(0.3, 9.0)
    elif where < 0.5:
        moment, delay = STEP, generator.uniform(0.0, 0.5)
    else:
        moment, delay = generator.choice([*MOMENTS]), 0.0
    if kind.startswith("stop") and moment == START:
        moment, delay = STEP, generator.uniform(0.0, 0.5)
    if kind == "kill -9 rank" and layout.background and moment == "tensors begun":
        kind = WRITER
    return _place(generator, layout, kind, moment, delay)


def draw_other(generator: random.Random, layout: Layout, kind: str) -> Fault:
    """A fault of the disk, or a signal."""
    moment = STEP
    if kind == "rank stopped for good" and layout.ranks == 1:
        kind = "SIGTERM"  # nobody is there to miss it
    if kind in ("full disk in a save", "unfinished checkpoint removed"):
        moment = "tensors begun"
    return _place(generator, layout, kind, moment, generator.uniform(0.0, 0.3))


def _place(generator: random.Random, layout: Layout, kind: str, moment: str, delay: float) -> Fault:
    rank = generator.randrange(layout.ranks)
    held = 0
    if moment in MOMENTS and not MOMENTS[moment][2]:
        held = generator.randrange(layout.ranks)
    if kind == WRITER:
        rank = held
    # Three saves until something is pruned; a directory that is set aside counts as well.
    steps = generator.randint(1, 2) if moment in MOMENTS else generator.randint(0, 9)
    return Fault(kind, moment, rank, held, steps, delay, generator.random())


def plan(seed: int, kills: int, others: int, layouts: list[Layout], chains: int) -> list[tuple[Layout, list[Fault]]]:
    """Chains of faults. Within a chain the run that resumes after one fault is the victim of the next."""
    length = max(chains, 1)
    drawn: list[tuple[Layout, list[Fault]]] = []
    for chain in range(length):
        layout = layouts[chain % len(layouts)]
        generator = random.Random(f"{seed}/{chain}")
        mine = [draw_kill(generator, layout) for _ in range(kills // length + (chain < kills % length))]
        for number in range(chain, others, length):
            # One kind further each time round, so that no layout meets the same kind again and again.
            mine.append(draw_other(generator, layout, OTHERS[(number + number // length) % len(OTHERS)]))
        generator.shuffle(mine)
        drawn.append((layout, mine))
    return drawn
