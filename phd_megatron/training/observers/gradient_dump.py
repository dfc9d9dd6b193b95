"""Write the gradient of every parameter, so that two layouts can be compared parameter by parameter.

Each rank writes its slices with their checkpoint names and places; :func:`load_gradients` puts the full tensors
together without any process group.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.module import MegatronModule
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import ProcessGroup

from phd_megatron.config.schema import RunConfig
from phd_megatron.errors import UserError
from phd_megatron.model.initialisation import sharded_tensors
from phd_megatron.runtime.context import Runtime
from phd_megatron.training.observers.observer import Observer, Step


class GradientDump(Observer):
    """Writes the gradients of the steps that ``--dump-gradients-iterations`` names.

    Args:
        directory: gets a folder for each of these steps.
        iterations: the steps.
        rank: of this process, for the file names.
    """

    def __init__(self, directory: str, iterations: Sequence[int], rank: int) -> None:
        self._directory, self._iterations, self._rank = directory, iterations, rank

    @classmethod
    def of_run(cls, run: RunConfig, runtime: Runtime, first: int, last: int) -> GradientDump | None:
        """Only where a dump is asked for, and can be."""
        directory, iterations = run.logging.dump_gradients_dir, run.logging.dump_gradients_iterations
        if not directory:
            return None
        check_places(directory, iterations, runtime.world_size)
        if note := check_steps(iterations, first, last):
            runtime.log(note)
        return cls(directory, iterations, runtime.rank)

    def on_gradients(self, step: Step) -> None:
        """Write them in a step that is named."""
        if step.iteration in self._iterations:
            place = iteration_place(self._directory, step.iteration)
            with step.state.engine.final_gradients() as models:
                dump_gradients(models, place, self._rank, step.groups.dp_cp)


def iteration_place(directory: str | Path, iteration: int) -> Path:
    """Where the gradients of one step go."""
    return Path(directory) / f"iter_{iteration:07d}"


def check_places(directory: str | Path, iterations: Sequence[int], world_size: int) -> None:
    """Refuse places that hold something else than gradients of as many ranks, before anything is trained.

    Raises:
        UserError: with what stands there.
    """
    own = {f"rank_{rank:05d}.safetensors" for rank in range(world_size)}
    for place in (iteration_place(directory, iteration) for iteration in iterations):
        if not place.exists():
            continue
        for path in sorted(place.iterdir()) if place.is_dir() else [place]:
            if path.name not in own or not _is_dump(path):
                raise UserError(
                    f"dump_gradients_dir={str(directory)!r}: {path} is not of a dump of {world_size} rank(s), so it is "
                    "neither replaced nor mixed with one; choose another directory"
                )


def check_steps(iterations: Sequence[int], first: int, last: int) -> str | None:
    """Refuse a dump that would hold nothing.

    Args:
        first, last: the steps that this start goes through.

    Returns:
        What is said of steps that are past already, as in a run that was started again.

    Raises:
        UserError: for a step that the run does not have.
    """
    beyond = [iteration for iteration in iterations if iteration > last]
    if beyond:
        raise UserError(
            f"dump_gradients_iterations={list(iterations)}: the run ends with step {last}, so {beyond[0]} is never "
            f"reached; name steps up to {last}"
        )
    past = [iteration for iteration in iterations if iteration < first]
    if not past:
        return None
    return f"note: dump_gradients_iterations: {past} are past, since this start begins with step {first}"


def _is_dump(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return "places" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def dump_gradients(models: Sequence[MegatronModule], directory: Path, rank: int, dp_cp_group: ProcessGroup) -> None:
    """Write this rank's final gradients to ``directory/rank_<n>.safetensors``."""
    tensors: dict[str, Tensor] = {}
    places: dict[str, dict[str, str | list[int]]] = {}
    for model in models:
        _gather_reduced_shards(model)
        module = model.module
        while hasattr(module, "module"):
            module = module.module
        gradients = {
            parameter.untyped_storage().data_ptr() + parameter.storage_offset() * parameter.element_size(): (
                parameter.main_grad
            )
            for parameter in module.parameters()
        }
        written = 0
        for part in sharded_tensors(module, dp_cp_group):
            gradient = _gradient_of(part.data, gradients)
            if gradient is None:
                continue  # a buffer, such as a router's expert bias
            offset = [int(o) for o in part.global_offset]
            name = f"{part.key}|{','.join(map(str, offset))}"
            tensors[name] = gradient.float().cpu().contiguous().clone()
            places[name] = {"key": part.key, "shape": [int(n) for n in part.global_shape], "offset": offset}
            written += tensors[name].numel()
        expected = sum(gradient.numel() for gradient in gradients.values())
        if written != expected:
            raise RuntimeError(
                f"gradients of {written} elements found, of {expected} in the parameters of this model chunk"
            )
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / f"rank_{rank:05d}.safetensors", metadata={"places": json.dumps(places)})


def _gather_reduced_shards(model: DistributedDataParallel) -> None:
    """With the distributed optimizer each rank has reduced its shard of a bucket only: fetch the others'."""
    if not model.ddp_config.use_distributed_optimizer:
        return
    for buffer in model.buffers + model.expert_parallel_buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            shards = bucket.grad_data.chunk(group.size())
            torch.distributed.all_gather(list(shards), shards[group.rank()].clone(), group=group)


def _gradient_of(data: Tensor, gradients: dict[int, Tensor]) -> Tensor | None:
    """The main gradient of the parameter (or of the row block of it) whose memory ``data`` is; None for a buffer.

    Args:
        gradients: by the address of their parameter.
    """
    address = data.untyped_storage().data_ptr() + data.storage_offset() * data.element_size()
    for start, gradient in gradients.items():
        begin = (address - start) // data.element_size()
        if 0 <= begin < gradient.numel():
            return gradient.view(-1)[begin : begin + data.numel()].view(data.shape)
    return None


def load_gradients(directory: Path) -> dict[str, Tensor]:
    """Full float32 gradients by checkpoint name, from the files of all ranks."""
    full: dict[str, Tensor] = {}
    filled: dict[str, Tensor] = {}
    for path in sorted(directory.glob("rank_*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name, place in json.loads(file.metadata()["places"]).items():
                key, part = place["key"], file.get_tensor(name)
                if key not in full:
                    full[key] = torch.zeros(place["shape"])
                    filled[key] = torch.zeros(place["shape"], dtype=torch.bool)
                prepended = len(place["shape"]) - part.dim()
                sizes = [1] * prepended + list(part.shape)
                where = tuple(slice(o, o + n) for o, n in zip(place["offset"], sizes, strict=True))
                full[key][where] = part.view(sizes)
                filled[key][where] = True
    for key, mask in filled.items():
        if not mask.all():
            raise ValueError(f"{directory}: {int((~mask).sum())} elements of {key} are missing")
    if not full:
        raise ValueError(f"{directory}: no rank_*.safetensors files")
    return full
