"""The ranks of one start find one another in a store that may be older than they are.

torchrun keeps its store over a restart of the ranks, so it still holds the addresses and answers of those that died.
No variable tells one start from the next on every machine: torchrun counts restarts for each machine by itself, and
does not count those that come from a machine that joins or leaves. So rank 0 draws a name for this start, and a rank
believes the name only when rank 0 has answered to what this rank itself drew.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import TYPE_CHECKING

from phd_megatron.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

_PAUSE = 0.02  # seconds between two looks into the store


def meet(store: Store, rank: int, world_size: int, seconds: float) -> str:
    """A name for this start that no earlier one had, the same on all ranks; prefix the store's keys with it.

    Args:
        store: a ``torch.distributed`` store that all ranks share.
        seconds: how long to wait for the others.

    Raises:
        UserError: naming the ranks that did not come.
    """
    deadline = time.monotonic() + seconds
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set("meeting/name", mine)
        present = {0: mine}
        while len(present) < world_size:
            for other in range(1, world_size):
                if other not in present and (answer := _read(store, f"meeting/{mine}/{other}")):
                    present[other] = answer
            if len(present) < world_size:
                _pause(deadline, store, mine, world_size, seconds)
        store.set(f"meeting/{mine}/all", json.dumps([present[number] for number in range(world_size)]))
        return mine
    name = None
    while True:
        found = _read(store, "meeting/name")
        if found is not None and found != name:
            name = found
            store.set(f"meeting/{name}/{rank}", mine)
        if name is not None:
            everybody = json.loads(_read(store, f"meeting/{name}/all") or "[]")
            if len(everybody) == world_size and everybody[rank] == mine:
                return name
        _pause(deadline, store, name, world_size, seconds)


def did_not_answer(missing: list[int], world_size: int, seconds: float) -> UserError:
    """The refusal of a start whose ranks are not all there."""
    return UserError(
        f"rank {', '.join(map(str, missing))} of {world_size} did not answer within {seconds:.0f} s: it was not "
        "started, has died (see its own output), or cannot reach MASTER_ADDR:MASTER_PORT; start as many processes as "
        "the world size says, or raise distributed_timeout_minutes"
    )


def _pause(deadline: float, store: Store, name: str | None, world_size: int, seconds: float) -> None:
    if time.monotonic() < deadline:
        time.sleep(_PAUSE)
        return
    missing = [number for number in range(1, world_size) if not _read(store, f"meeting/{name}/{number}")]
    # Those that are there wait for rank 0 when they cannot see that anybody else is missing.
    raise did_not_answer(missing or [0], world_size, seconds)


def _read(store: Store, key: str) -> str | None:
    try:
        return store.get(key).decode() if store.check([key]) else None
    except Exception as error:  # what a store raises differs between torch versions
        raise UserError(
            f"the store that the ranks meet in is gone ({type(error).__name__}: {error}): the process that serves "
            "MASTER_ADDR:MASTER_PORT has died; see its output, and start the run again"
        ) from error
