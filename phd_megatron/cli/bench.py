"""``phd-megatron bench``: each a module ``bench/<name>.py`` with ``run(args)``, its flags in ``bench/arguments.py``."""

from __future__ import annotations

import importlib
import importlib.util

from phd_megatron.console.arguments import unknown_word
from phd_megatron.console.terminal import show
from phd_megatron.errors import UserError

BENCHES = {
    "attention": "PHD attention against K vanilla attentions, a dense mask and naive repetition",
    "decode": "K new rows over a long KV cache against vanilla decoding",
    "documents": "attention over documents that are kept apart, against one document",
    "generate": "prefill and decode latency over K, against vanilla and naive repetition",
    "norm-rope": "fused norm and RoPE of q, k, v against separate operations and a plain copy",
    "train": "training steps of our loop against Hugging Face's, and PHD against vanilla",
}


def _module(name: str) -> str:
    return f"phd_megatron.bench.{name.replace('-', '_')}"


def available() -> dict[str, str]:
    """The measurements whose module is installed."""
    return {name: text for name, text in BENCHES.items() if importlib.util.find_spec(_module(name))}


def _usage() -> str:
    lines = [f"  {name:<{max(map(len, BENCHES))}}  {text}" for name, text in available().items()]
    return "\n".join(["usage: phd-megatron bench WHAT [OPTIONS]", "", "what:", *lines, "", "WHAT --help says more."])


def run(argv: list[str]) -> int:
    """Run one measurement. 0 is success, 1 a result that is wrong or too slow."""
    if not argv or argv[0] in ("-h", "--help"):
        show(_usage())
        return 0 if argv else 2
    name, *rest = argv
    if name not in available():
        raise unknown_word("measurement", name, available())
    if name == "train" and any(word.split("=")[0] == "--preset" for word in rest):
        name = "members"
    from phd_megatron.bench.arguments import parse

    module = importlib.import_module(_module(name))
    try:
        result: int = module.run(parse(name.replace("-", "_"), rest, module.__doc__))
    except (RuntimeError, MemoryError) as error:
        said = str(error).strip().splitlines()
        if not isinstance(error, MemoryError) and not any("allocate memory" in s or "out of memory" in s for s in said):
            raise
        raise UserError(
            f"bench {' '.join(argv)}: there is not enough memory ({(said or ['none left'])[0]}); lower "
            "lengths, sizes or the batch"
        ) from None
    return result
