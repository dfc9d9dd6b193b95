"""Program: compiles the Triton kernels for a Hopper GPU on a machine that has none, and prints one JSON line for each.

    python tests/kernels/compile_for_gpu.py [--all] [--head-dim D] [--dtype bfloat16]

Operations run on CPU tensors, so every kernel sees the arguments it would see; instead of a launch it is compiled with
each tile of its tuning space (``--all``; else with the last, the smallest). A line has the kernel, the tile, the bytes
of shared memory, and the registers and stack (spills) of a thread. What is computed is thrown away.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_LIMIT = 227 * 1024  # bytes a block may use on Hopper
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class NoDevice:
    """As much of a Triton driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def usage(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and the bytes of its stack, which is where registers are spilled to."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(cubin)
        said = subprocess.run([CUOBJDUMP, "--dump-resource-usage", binary], capture_output=True, text=True).stdout
    return {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", said)}


class Compile:
    """Takes the place of a kernel: ``kernel[grid](...)`` compiles it."""

    def __init__(self, kernel: Any, every_tile: bool) -> None:
        self.kernel, self.every_tile = kernel, every_tile

    def __getitem__(self, grid: Any) -> Any:
        return self.compile

    def compile(self, *args: Any, **kwargs: Any) -> None:
        tuner = None if isinstance(self.kernel, JITFunction) else self.kernel
        function = self.kernel if tuner is None else tuner.fn
        tiles = [None]
        if tuner is not None:
            tiles = tuner.configs if self.every_tile else tuner.configs[-1:]
        fits = False
        for tile in tiles:
            options = (
                {} if tile is None else {**tile.kwargs, "num_warps": tile.num_warps, "num_stages": tile.num_stages}
            )
            compiled = function.warmup(*args, grid=(1,), **kwargs, **options)
            name = function.fn.__name__
            line = {"kernel": name, "tile": options, "shared": compiled.metadata.shared, **usage(compiled.asm["cubin"])}
            print(json.dumps(line), flush=True)
            fits = fits or compiled.metadata.shared <= SHARED_LIMIT
        if not fits:
            raise SystemExit(f"no tile of {function.fn.__name__} fits into shared memory")


def put_in_place(module: Any, every_tile: bool) -> None:
    """Replace the kernels that ``module`` launches."""
    for name, value in list(vars(module).items()):
        if name.endswith("_kernel") and not isinstance(value, Compile) and hasattr(value, "run"):
            setattr(module, name, Compile(value, every_tile))


def attention(dtype: torch.dtype, width: int, every_tile: bool) -> None:
    """The fused kernel and the one beside a vendor's, with grouped queries and three copies."""
    from phd_megatron.kernels.phd_attention import sdpa_triton, triton, window
    from phd_megatron.phd.kv_policy import KVPolicy

    for module in (triton, window):
        put_in_place(module, every_tile)
    policy = KVPolicy(3, 16, 32)
    for attend in (triton.triton_attention, sdpa_triton.sdpa_triton_attention):
        leaves = [torch.zeros(3, 128, 1, heads, width, dtype=dtype, requires_grad=True) for heads in (8, 2, 2)]
        attend(*leaves, policy).sum().backward()
    if every_tile:
        leaves = [torch.zeros(3, 128, 1, heads, width, dtype=dtype, requires_grad=True) for heads in (8, 2, 2)]
        triton.triton_attention(*leaves, policy, deterministic=False).sum().backward()
        leaves = [torch.zeros(1, 1, 1, 1, width, dtype=dtype, requires_grad=True) for _ in range(3)]
        triton.triton_attention(*leaves, KVPolicy(1)).sum().backward()  # every size is 1
        # Two slices of a context-parallel rank.
        rows = triton.Rows(64, (64, 192), (0, 15))
        problem = triton.Problem.of(torch.zeros(3, 128, 1, 8, width), 2, policy, rows, 1.0)
        query, keys = (torch.zeros(3, 128, 1, 8, width, dtype=dtype), torch.zeros(1, 256, 1, 2, width, dtype=dtype))
        hidden = torch.zeros(2, 143, 1, 2, width, dtype=dtype)
        both = triton.Keys(keys, keys, hidden, hidden)
        out, lse = triton.launch_forward(query, both, problem)
        triton.launch_backward(query, query, both, out, lse, both, problem)


def norm_rope(dtype: torch.dtype, width: int, every_tile: bool) -> None:
    """All three norms with RoPE, by positions of all and of each; then one row of one group without, all sizes 1."""
    from phd_megatron.kernels import qkv_norm_rope as front
    from phd_megatron.kernels.qkv_norm_rope import norm_rope_kernels
    from phd_megatron.kernels.qkv_rope import rope_table

    put_in_place(norm_rope_kernels, every_tile)
    weights = {name: torch.zeros(width, dtype=dtype, requires_grad=True) for name in "qkv"}
    for rows, batch, groups, norms, table in (
        (64, 1, 2, weights, rope_table(torch.zeros(64, 1, 1, width), dtype)),
        (64, 3, 2, weights, rope_table(torch.zeros(64, 3, 1, width), dtype)),
        (1, 1, 1, {"k": weights["k"]}, None),
    ):
        mixed = torch.zeros(rows, batch, groups, 6 * width, dtype=dtype, requires_grad=True)
        sum(x.sum() for x in front.qkv_norm_rope(mixed, 4, table, norms, 1e-5)).backward()


def decode(dtype: torch.dtype, width: int, every_tile: bool) -> None:
    """Four copies over a long cache, and one copy of one head over one token."""
    from phd_megatron.kernels import decode_attention as front
    from phd_megatron.kernels.decode_attention import decode_kernels
    from phd_megatron.phd.kv_policy import KVPolicy

    put_in_place(decode_kernels, every_tile)
    front._starts_early = lambda device: True  # as on the GPU that is compiled for
    for policy, groups, length in ((KVPolicy(4, 16, 32), 2, 1024), (KVPolicy(1), 1, 1)):
        key = torch.zeros(1, groups, length, width, dtype=dtype)
        hidden = torch.zeros(1, groups, policy.repeat - 1, 16, width, dtype=dtype)
        slots = torch.zeros(1, 16, dtype=torch.long)
        given = (hidden, hidden, slots) if policy.repeat > 1 else (None, None, None)
        query, zero = torch.zeros(policy.repeat, 1, 4 * groups, width, dtype=dtype), torch.zeros(1, dtype=torch.long)
        front.decode_attention(query, zero, key, key, torch.zeros(1, length, dtype=torch.long), *given, policy)


def cross_entropy(dtype: torch.dtype, width: int, every_tile: bool) -> None:
    """A vocabulary of any size; ``width`` is for the others."""
    from phd_megatron.kernels import cross_entropy as front
    from phd_megatron.kernels.cross_entropy import cross_entropy_kernels

    put_in_place(cross_entropy_kernels, every_tile)
    logits = torch.zeros(4, 1000, dtype=dtype, requires_grad=True)
    front.cross_entropy(logits * 1, torch.zeros(4, dtype=torch.long)).sum().backward()


def experts(dtype: torch.dtype, width: int, every_tile: bool) -> None:
    """What has no choice of tiles: SwiGLU with and without weights, permutation, sums of groups and zeros."""
    from phd_megatron.kernels import grouped_mm, moe_permute, swiglu
    from phd_megatron.kernels.grouped_mm import grouped_mm_kernels
    from phd_megatron.kernels.moe_permute import permute_kernels
    from phd_megatron.kernels.swiglu import swiglu_kernels

    for module in (swiglu_kernels, permute_kernels, grouped_mm_kernels):
        put_in_place(module, every_tile)
    for columns in (width, 1):
        rows = torch.zeros(8, 2 * columns, dtype=dtype, requires_grad=True)
        swiglu.swiglu_triton(rows).sum().backward()
        swiglu.weighted_swiglu_triton(rows, torch.zeros(8, requires_grad=True)).sum().backward()
        moe_permute.gather_triton(rows.detach()[:, :columns], torch.zeros(16, dtype=torch.long))
        moe_permute.gather_sum_triton(rows.detach()[:, :columns], torch.zeros(4, 2, dtype=torch.long))
        matrices, ends = rows.detach().view(8, 2, columns), torch.zeros(8, dtype=torch.int32)
        grouped_mm.clear_empty_groups_triton(matrices, ends)
        grouped_mm.add_groups_triton(matrices.float(), matrices, ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    driver.set_active(NoDevice())
    # Only compiling is wanted here, so the CPU counts as a GPU.
    for operation in ("phd_attention.backends", "qkv_norm_rope", "decode_attention"):
        module = importlib.import_module(f"phd_megatron.kernels.{operation}")
        module.triton_problem = lambda *_: None
    for operation in (attention, norm_rope, decode, cross_entropy, experts):
        operation(getattr(torch, args.dtype), args.head_dim, args.all)


if __name__ == "__main__":
    main()
