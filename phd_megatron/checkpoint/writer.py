"""Writing Megatron-core's torch_dist format in this process.

megatron-core 0.16 writes through forked workers and a spawned queue server: seconds for the smallest model, and a
worker that dies leaves the save waiting for ever. Here torch's own file writer does it: each rank writes and syncs one
file, and an error on any rank is raised on all of them. The result is the same format.

Planning and finishing are collective. The writing between them is not, so that it can be done by a thread.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as mcore_torch
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.utils import _DistWrapper

from phd_megatron.checkpoint.checksums import FileSum, SummingWriter
from phd_megatron.checkpoint.format import first_failure
from phd_megatron.checkpoint.store import CheckpointError
from phd_megatron.runtime import agreement

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import CommonStateDict, ShardedStateDict, StateDict
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
    from torch.distributed.checkpoint.storage import WriteResult

T = TypeVar("T")
_Written: TypeAlias = "tuple[list[WriteResult], dict[str, FileSum]]"
_Data: TypeAlias = "torch.Tensor | io.BytesIO"


def prepare_save(state: ShardedStateDict) -> tuple[ShardedStateDict, CommonStateDict]:
    """Split a sharded state dict into (sharded part, common part) and check that the shards cover every tensor once."""
    return agreement.everywhere(lambda: save_preprocess(state, validate_access_integrity=True))


def bytes_to_write(sharded: ShardedStateDict) -> int:
    """Bytes of tensors that this rank will write."""
    return sum(
        value.data.numel() * value.data.element_size()
        for value in nested_values(sharded)
        if isinstance(value, ShardedTensor) and is_main_replica(value.replica_id) and value.data is not None
    )


def check_space(directory: Path, sharded: ShardedStateDict) -> int:
    """Refuse a save that cannot fit, before anything is written.

    Returns:
        Bytes that all ranks together will write.

    Raises:
        CheckpointError: on all ranks, with the bytes needed and free.
    """
    total = sum(agreement.gather(bytes_to_write(sharded)))
    needed = total + total // 50 + (1 << 20)  # names, headers and random-number states

    def compare() -> None:
        free = shutil.disk_usage(directory).free
        if free < needed:
            raise CheckpointError(
                f"no space left for a checkpoint in {directory}: it needs {_size(needed)}, {_size(free)} are free; "
                "free some, lower keep_last, or choose another --save directory"
            )

    agreement.from_rank_zero(compare)
    return total


class ShardWrite:
    """The ``.distcp`` files, ``common.pt`` and ``.metadata`` of one checkpoint; made by all ranks together.

    Args:
        directory: empty directory to write into.
        sharded, common: the two parts of the state, from :func:`prepare_save`. ``common`` is copied here, the tensors
            of ``sharded`` are read by :meth:`write`, unless :meth:`copy_to_host` comes before it.

    Raises:
        CheckpointError: on all ranks, when a state cannot be laid out.
    """

    def __init__(self, directory: Path, sharded: ShardedStateDict, common: CommonStateDict) -> None:
        def translate() -> tuple[StateDict, bytes | None]:
            by_key, _, _ = mcore_torch._replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
            return mcore_torch.mcore_to_pyt_state_dict(by_key), _serialised(common) if agreement.rank() == 0 else None

        self._directory = directory
        tensors, self._common = agreement.everywhere(translate)
        self._ranks = _DistWrapper(agreement.control_group(), agreement.world_size() > 1, 0)
        self._planner = mcore_torch.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._writer = _Writer(directory)
        self._values: Any = self._planner
        self._metadata: Metadata | None = None
        self._outcome: _Written | BaseException = RuntimeError("nothing was written")
        plan = self._collective(lambda: self._ranks.reduce_scatter("plan", lambda: self._plan(tensors), self._merge))
        self._items = self._planner.finish_plan(plan)

    def copy_to_host(self) -> None:
        """Take copies of this rank's tensors, so that the originals may change while :meth:`write` runs."""
        self._values = _HostCopies(self._planner, self._items.items)
        self._writer.per_thread_copy_ahead = 0  # nothing to fetch, and no device streams in another thread

    def write(self) -> None:
        """Write this rank's files. Not collective, from any thread; an error waits for :meth:`finish`."""
        try:
            if self._common is not None:
                with open(self._directory / COMMON_STATE_FNAME, "wb") as stream:
                    stream.write(self._common)
                    stream.flush()
                    os.fsync(stream.fileno())
            with _system_error():
                results = self._writer.write_data(self._items, self._values).value()
            self._outcome = results, self._writer.sums
        except BaseException as error:
            self._outcome = error

    def finish(self, commit: Callable[[Mapping[str, FileSum]], None]) -> None:
        """Write ``.metadata`` on rank 0 and then call ``commit`` there with the checksums of all ``.distcp`` files.

        Raises:
            CheckpointError: on all ranks, naming the rank and the system's error (no space left, quota, input/output
                error), when writing or committing failed anywhere.
        """

        def outcome() -> _Written:
            if isinstance(self._outcome, BaseException):
                raise self._outcome
            return self._outcome

        def complete(outcomes: list[_Written]) -> None:
            assert self._metadata is not None  # made where the plans were merged, on this rank
            self._writer.finish(self._metadata, [results for results, _ in outcomes])
            commit({name: entry for _, sums in outcomes for name, entry in sums.items()})

        self._collective(lambda: self._ranks.all_reduce("write", outcome, complete))

    def _plan(self, tensors: StateDict) -> SavePlan:
        self._planner.set_up_planner(
            state_dict=tensors, storage_meta=self._writer.storage_meta(), is_coordinator=self._ranks.is_coordinator
        )
        self._writer.set_up_storage_writer(self._ranks.is_coordinator, rank=self._ranks.rank)
        return self._writer.prepare_local_plan(self._planner.create_local_plan())

    def _merge(self, plans: list[SavePlan]) -> list[SavePlan]:
        plans, self._metadata = self._planner.create_global_plan(plans)
        return self._writer.prepare_global_plan(plans)

    @staticmethod
    def _collective(step: Callable[[], T]) -> T:
        try:
            return step()
        except CheckpointException as error:
            raise CheckpointError(first_failure(error)) from error


class _HostCopies:
    """What the planner would give the writer, as it was when this was made; each value once."""

    def __init__(self, planner: SavePlanner, items: Iterable[WriteItem]) -> None:
        # Objects are serialised already; tensors share memory with parameters and optimizer states.
        self._values = {item.index: _copied(planner.resolve_data(item)) for item in items}

    def resolve_data(self, item: WriteItem) -> _Data:
        return self._values.pop(item.index)


def _copied(value: _Data) -> _Data:
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


class _SummingFileSystem(filesystem.FileSystem):
    def __init__(self) -> None:
        self.sums: dict[str, FileSum] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with SummingWriter(path) as stream:
            yield stream
            self.sums[Path(path).name] = stream.sum


class _Writer(dcp.FileSystemWriter):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory, single_file_per_rank=True, sync_files=True, thread_count=1)
        self._summing = self.fs = _SummingFileSystem()

    @property
    def sums(self) -> dict[str, FileSum]:
        return dict(self._summing.sums)


def _serialised(content: CommonStateDict) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


@contextmanager
def _system_error() -> Iterator[None]:
    """Raise the operating system's "No space left on device" where torch's archive writer hides it behind its own."""
    try:
        yield
    except RuntimeError as error:
        hidden: BaseException | None = error
        while hidden is not None and not isinstance(hidden, OSError):
            hidden = hidden.__cause__ or hidden.__context__
        if hidden is None:
            raise
        raise OSError(hidden.errno, hidden.strerror, hidden.filename) from error


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
