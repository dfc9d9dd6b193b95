"""Program: compiles the Triton kernels for a Hopper GPU on a machine that has none, and prints one JSON line for each.

    python tests/kernels/compile_for_gpu.py [--all] [--head-dim D] [--dtype bfloat16]

Operations run on CPU tensors, so every kernel sees the arguments it would see; instead of a launch it is compiled with
each tile of its tuning space (``--all``; else with the first and the last). A line has the kernel, the tile, the bytes of shared
memory, and the registers and stack (spills) of a thread. What is computed is thrown away.
"""

from __future__ import annotations

import argparse
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
        tiles = [None] if tuner is None else tuner.configs[:: 1 if self.every_tile else len(tuner.configs) - 1]
        fits = False
        for tile in tiles:
            options = {} if tile is None else {**tile.kwargs, "num_warps": tile.num_warps, "num_stages": tile.num_stages}
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
    from phd_megatron.kernels.phd_attention import fused
    from phd_megatron.phd.kv_policy import KVPolicy

    put_in_place(fused, every_tile)
    policy = KVPolicy(3, 16, 32)
    for attend in (fused.triton_attention, fused.sdpa_triton_attention):
        leaves = [torch.zeros(3, 128, 1, heads, width, dtype=dtype, requires_grad=True) for heads in (8, 2, 2)]
        attend(*leaves, policy).sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    driver.set_active(NoDevice())
    attention(getattr(torch, args.dtype), args.head_dim, args.all)


if __name__ == "__main__":
    main()
