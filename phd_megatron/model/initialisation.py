"""Initial values that do not depend on the layout.

A parameter's values follow from the seed and its name in the checkpoint (with its expert's global number) alone: the
full tensor is drawn in float32 from a CPU generator seeded by both, then this rank's slice is copied into place. What
the slice is, Megatron-Core's own sharded state dict says, so tensor, pipeline and expert parallelism, fused, grouped
and separate modules, and tied weights on two stages all agree.
"""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from phd_megatron.model.copy_embedding import COPY_EMBEDDING

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from phd_megatron.model.transformer_config import PHDTransformerConfig

TRUNCATED_AT = 3.0  # standard deviations
MOST_THREADS = 16  # that draw
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_FFN = re.compile(r"\.mlp\..*linear_fc[12]\.weight$")
_HEAD = "output_layer.weight"  # a tied head has the embedding's name
_OUTPUT_PROJECTIONS = ("linear_proj.weight", "linear_fc2.weight")


def sharded_tensors(model: MegatronModule, dp_cp_group: ProcessGroup) -> Iterator[ShardedTensor]:
    """This rank's part of every parameter, with its checkpoint name and its place in the full tensor.

    ``data`` shares memory with the parameter. Keys hold the global layer number.
    """
    metadata = {"non_homogeneous_layers": True, "singleton_local_shards": False, "dp_cp_group": dp_cp_group}
    for entry in nested_values(model.sharded_state_dict(metadata=metadata)):
        if isinstance(entry, ShardedTensorFactory):
            yield from (part for part in nested_values(entry.build()) if isinstance(part, ShardedTensor))
        elif isinstance(entry, ShardedTensor):
            yield entry


@torch.no_grad()
def fill(parts: Iterable[ShardedTensor], read: Callable[[str], Tensor]) -> None:
    """Copy full tensors into this rank's parts; each is read once, by its checkpoint name."""
    key, whole = "", torch.empty(0)
    for part in sorted(parts, key=lambda part: part.key):  # experts' tensors take turns otherwise
        if part.key != key:
            key, whole = part.key, read(part.key)
        part.data.copy_(whole[part.global_slice()].view_as(part.data))


def output_projection_std(std: float, scheme: str, layer_number: int, num_layers: int) -> float:
    """Std of attention-out and FFN-out weights (HybridNorm, Sec. 3): ``layer_number`` is 1-based and global."""
    depth = {"normal": None, "depth_scaled": layer_number, "megatron": num_layers, "deepnorm": None}[scheme]
    return std if depth is None else std / (2 * depth) ** 0.5


def draw(key: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """The full tensor named ``key``: normal with ``std``, truncated at three of them, float32 on CPU.

    What lies outside is drawn again, and of a whole new tensor, until nothing does. ``torch.nn.init.trunc_normal_``
    gives other values in other versions of torch; these stay, so that a seed means the same weights everywhere.
    """
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    values = torch.empty(shape).normal_(0.0, std, generator=generator)
    while bool((outside := values.abs() > TRUNCATED_AT * std).any()):
        values = torch.where(outside, torch.empty(shape).normal_(0.0, std, generator=generator), values)
    return values


def scale_by_gain(key: str, full: Tensor, config: PHDTransformerConfig) -> None:
    """Multiply by ``config.init_gain``, in place, what DeepNorm (arXiv 2203.00555) scales: not query, key, router."""
    if key.endswith("linear_qkv.weight"):
        groups = full.unflatten(0, (config.num_query_groups, -1, config.kv_channels))  # query heads, key, value of each
        groups[:, -1].mul_(config.init_gain)
    elif key.endswith("linear_proj.weight") or _FFN.search(key):
        full.mul_(config.init_gain)


@torch.no_grad()
def initialise(model: MegatronModule, config: PHDTransformerConfig, seed: int, dp_cp_group: ProcessGroup) -> None:
    """Fill every weight matrix of ``model``. Norm weights, biases and copies' vectors keep their ones and zeros.

    Raises:
        RuntimeError: if a parameter has no entry in the sharded state dict, so that none stays uninitialised.
    """
    covered: dict[int, int] = {}
    jobs: list[tuple[ShardedTensor, str, float]] = []
    for part in sharded_tensors(model, dp_cp_group):
        storage = part.data.untyped_storage().data_ptr()
        covered[storage] = covered.get(storage, 0) + part.data.numel()
        from_zero = part.key == COPY_EMBEDDING
        if len(part.global_shape) - part.prepend_axis_num < 2 or from_zero:
            if part.key.endswith("bias") or from_zero:
                part.data.zero_()
            continue
        std = config.init_method_std
        if part.key == _HEAD and config.head_init_method_std is not None:
            std = config.head_init_method_std
        layer = _LAYER.match(part.key)
        if layer and part.key.endswith(_OUTPUT_PROJECTIONS):
            std = output_projection_std(std, config.init_scheme, int(layer[1]) + 1, config.num_layers)
        # Axes before a parameter's own count its siblings (experts); each is drawn alone, by its global number.
        name = "/".join([part.key, *map(str, part.global_offset[: part.prepend_axis_num])])
        jobs.append((part, name, std))
    for part, full in _drawn(jobs, seed):
        if config.init_gain != 1 and _LAYER.match(part.key):
            scale_by_gain(part.key, full, config)
        own = part.prepend_axis_num
        place = tuple(
            slice(start, start + size) for start, size in zip(part.global_offset[own:], part.local_shape, strict=True)
        )
        part.data.copy_(full[place])
    for name, parameter in model.named_parameters():
        if covered.get(parameter.untyped_storage().data_ptr(), 0) < parameter.numel():
            raise RuntimeError(f"parameter {name} {tuple(parameter.shape)} was not initialised")


def _drawn(jobs: Iterable[tuple[ShardedTensor, str, float]], seed: int) -> Iterator[tuple[ShardedTensor, Tensor]]:
    """The full tensor of each (part, name, std), in order, drawn by several threads; few are held at a time.

    A generator draws one number after the other, so a billion of them take one core half a minute.
    """
    workers = min(MOST_THREADS, torch.get_num_threads())
    waiting: deque[tuple[ShardedTensor, Future[Tensor]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for part, name, std in jobs:
            shape = tuple(part.global_shape[part.prepend_axis_num :])
            waiting.append((part, pool.submit(draw, name, shape, std, seed)))
            if len(waiting) > workers:
                first, future = waiting.popleft()
                yield first, future.result()
        for last, future in waiting:
            yield last, future.result()
