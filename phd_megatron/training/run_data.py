"""What data a run trains on: read once for all ranks, kept in every checkpoint, compared when the run goes on.

Data is known by its content, so it may be moved. A checkpoint says what it was trained on under ``data`` in its
``training_state.json``: for each set that was read, the fingerprints of its data sets in the order of the blend.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from phd_megatron.checkpoint.store import TRAINING_STATE
from phd_megatron.config.schema import RunConfig
from phd_megatron.data.blend import SPLIT_NAMES, plan_splits
from phd_megatron.data.datasets import verify_data
from phd_megatron.data.tokenizers import Tokenizer
from phd_megatron.data.verify import Fingerprint
from phd_megatron.errors import UserError
from phd_megatron.runtime import agreement

Facts = dict[str, str | int]
Record = dict[str, list[Facts]]
"""Set ("training", "validation") -> fingerprints as plain values."""


def agree_on_data(run: RunConfig, tokenizer: Tokenizer, wanted: tuple[int, int, int], local_rank: int) -> Record:
    """Read the data on one rank of each node; collective.

    Args:
        wanted: of the training, validation and test sets; one with 0 is not read.

    Returns:
        What the sets hold, for the checkpoints of the run.

    Raises:
        UserError: on all ranks, for data that is damaged, or not the same on all nodes.
    """

    def read() -> Record | None:
        if local_rank and agreement.rank():
            return None
        found = verify_data(run, tokenizer, wanted)
        sets = zip(SPLIT_NAMES, found, strict=True)
        return {name: [item.as_dict() for item in items] for name, items in sets if items is not None}

    answers = agreement.gather(agreement.everywhere(read))
    first = answers[0]
    assert first is not None  # rank 0 reads
    for rank, answer in enumerate(answers):
        if answer is not None and answer != first:
            name = next(name for name in first if answer[name] != first[name])
            raise UserError(
                f"the {name} data of the node of rank {rank} is not that of rank 0, though both have it under the same "
                "name; copy it again, so that all nodes read the same"
            )
    return first


def read_record(checkpoint: Path) -> Record | None:
    """What a checkpoint was trained on; None where it does not say, or was not trained.

    Raises:
        UserError: for a record that is none.
    """
    path = checkpoint / TRAINING_STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(state, dict) or "data" not in state or not state.get("consumed_samples"):
            return None
        record = state["data"]
        if not isinstance(record, dict) or not all(isinstance(items, list) for items in record.values()):
            raise ValueError("no record of data")
        return {name: [Fingerprint.from_dict(item).as_dict() for item in items] for name, items in record.items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): load another checkpoint, or, if only what it says of its data is "
            "damaged, add --allow-changed-data"
        ) from error


def compare_data(checkpoint: Path, found: Record, run: RunConfig) -> list[str]:
    """Whether a run that goes on from ``checkpoint`` reads what that was trained on. To be called by one rank.

    Returns:
        Notes: that the data differs and this is allowed, or cannot be compared.

    Raises:
        UserError: when it differs, with the data sets.
    """
    if run.checkpoint.finetune:
        return []
    allowed = run.data.allow_changed_data
    try:
        before = read_record(checkpoint)
    except UserError:
        if allowed:
            return [f"{checkpoint} does not say in a form that can be read what data it was trained on"]
        raise
    if before is None:
        if _is_trained(checkpoint):
            return [f"{checkpoint} does not say what data it was trained on, so this run's is not compared with it"]
        return []
    changes = _changes(before, found, run)
    if not changes:
        return []
    if allowed:
        return [f"{change}; it goes on since allow_changed_data is set" for change in changes]
    raise UserError(
        f"{'; '.join(changes)}: to go on from {checkpoint} would repeat some text, leave out other, and be no "
        "continuation; bring the data back, start a run of its own with --finetune, or go on knowingly with "
        "--allow-changed-data"
    )


def check_own_data(checkpoint: Path, found: Record, run: RunConfig) -> None:
    """Refuse to evaluate on data that only has the name of what ``checkpoint`` was trained with; for one rank.

    Raises:
        UserError: with the data sets.
    """
    try:
        changes = _changes(read_record(checkpoint) or {}, found, run)
    except UserError:  # its losses do not depend on what is written there
        return
    if changes:
        raise UserError(
            f"{'; '.join(changes)}; bring the data back, or evaluate {checkpoint} on what is there now by naming it "
            "with --data-path"
        )


def _is_trained(checkpoint: Path) -> bool:
    try:
        state = json.loads((checkpoint / TRAINING_STATE).read_text(encoding="utf-8"))
        return bool(state.get("consumed_samples"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _changes(before: Record, found: Record, run: RunConfig) -> list[str]:
    """In words; the validation set only where the training set is the same."""
    plans = dict(zip(SPLIT_NAMES, plan_splits(run.data), strict=True))
    for name in SPLIT_NAMES:
        if name not in before or name not in found or before[name] == found[name]:
            continue
        plan = plans[name]
        prefixes = plan.prefixes if plan is not None else []
        old, new = before[name], found[name]
        subject = f"the {name} data is not what the checkpoint was trained with"
        if len(old) != len(new):
            return [f"{subject} ({len(new)} data sets, {', '.join(prefixes)}, and {len(old)} then)"]
        if Counter(map(str, map(_ordered, old))) == Counter(map(str, map(_ordered, new))):
            return [f"{subject} (the same data sets in another order: {', '.join(prefixes)})"]
        lines = [
            f"{prefix}: {_difference(was, now)}"
            for prefix, was, now in zip(prefixes, old, new, strict=True)
            if was != now
        ]
        more = f", and {len(lines) - 3} more" if len(lines) > 3 else ""
        return [f"{subject} ({', '.join(lines[:3])}{more})"]
    return []


def _ordered(item: Facts) -> list[tuple[str, str | int]]:
    return sorted(item.items())


def _difference(was: Facts, now: Facts) -> str:
    if (was["bin_bytes"], was["idx_bytes"]) != (now["bin_bytes"], now["idx_bytes"]):
        return (
            f".bin and .idx have {now['bin_bytes']} and {now['idx_bytes']} bytes, and had {was['bin_bytes']} and "
            f"{was['idx_bytes']}"
        )
    if was["index"] != now["index"]:
        return "documents of other lengths in as many bytes"
    return "other tokens in as many bytes"
