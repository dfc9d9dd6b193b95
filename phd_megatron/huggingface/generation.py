"""Continue a prompt from an exported directory or, through a temporary export, from a Megatron checkpoint."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from phd_megatron.errors import UserError
from phd_megatron.huggingface.loading import load_directory


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedy unless any of temperature, top_k and top_p is given."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def options(self) -> dict[str, Any]:
        """Arguments of ``generate``.

        Raises:
            UserError: for a value that cannot be.
        """
        checks = (
            ("temperature", self.temperature, lambda v: v > 0, "above 0; leave it out for greedy decoding"),
            ("top_k", self.top_k, lambda v: v >= 1, "at least 1"),
            ("top_p", self.top_p, lambda v: 0 < v <= 1, "above 0 and at most 1"),
        )
        given = {}
        for name, value, valid, cure in checks:
            if value is None:
                continue
            if not valid(value):
                raise UserError(f"{name}={value}: it must be {cure}")
            given[name] = value
        if not given:
            return {"do_sample": False}
        # transformers would add a top_k of 50 by itself.
        return {"do_sample": True, "top_k": 0, **given}


@dataclass(frozen=True)
class Continuation:
    """A continued prompt, with the size of the KV cache at its end, per sequence."""

    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    decode_attention: str
    cache_tokens: int
    hidden_entries: int
    hidden_bound: int
    cache_bytes: int
    vanilla_bytes: int
    trained_positions: int

    def summary(self) -> str:
        """Speed, and the cache beside a vanilla model's."""
        speed = f"{self.new_tokens / self.seconds:.1f} tokens/s, decode attention: {self.decode_attention}"
        lines = [f"{self.new_tokens} tokens in {self.seconds:.2f} s, {speed}"]
        extra = f" + {self.hidden_entries} hidden entries (at most {self.hidden_bound})" if self.hidden_bound else ""
        share = self.cache_bytes / self.vanilla_bytes - 1
        lines.append(
            f"KV cache per layer: {self.cache_tokens} entries{extra}; {self.cache_bytes / 1024:.1f} KiB in all layers, "
            f"a vanilla model's {self.vanilla_bytes / 1024:.1f} KiB ({share:+.1%})"
        )
        if self.prompt_tokens + self.new_tokens > self.trained_positions:
            lines.append(f"note: the text is longer than the {self.trained_positions} tokens the model was trained on")
        return "\n".join(lines)


@contextmanager
def hf_directory(path: str | Path, verify_checkpoint: bool = True) -> Iterator[Path]:
    """``path`` itself when it is an exported directory, else a temporary export of the checkpoint in it."""
    path = Path(path)
    if (path / "config.json").is_file():
        yield path
        return
    from phd_megatron.huggingface.export import export_checkpoint

    with tempfile.TemporaryDirectory(prefix="phd-megatron-export-") as parent:
        output = Path(parent) / "model"
        export_checkpoint(path, output, verify="none", verify_checkpoint=verify_checkpoint)
        yield output


def load(
    path: str | Path, device: str | None = None, trust_remote_code: bool = False, verify_checkpoint: bool = True
) -> tuple[Any, Any]:
    """Model, in eval mode, and tokenizer of an exported directory or a Megatron checkpoint.

    Code in the directory is run only if ``trust_remote_code`` says so; else the classes of this package and of
    transformers do. Files of a checkpoint are compared with their checksums first, unless ``verify_checkpoint`` is
    false.

    Raises:
        UserError: if it cannot be loaded, or has no tokenizer.
    """
    import torch
    from transformers import AutoTokenizer

    with hf_directory(path, verify_checkpoint) as directory:
        if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            raise UserError(f"{path} holds no tokenizer, so a prompt cannot be read; add its files beside the model")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = load_model(directory, path, device, trust_remote_code)
        try:
            # With the configuration at hand transformers does not look for the class that the directory names.
            tokenizer = AutoTokenizer.from_pretrained(
                directory, config=model.config, trust_remote_code=trust_remote_code, local_files_only=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{path} cannot be loaded: {str(error).strip()}") from error
        return model, tokenizer


def load_model(directory: Path, named: str | Path, device: str, trust_remote_code: bool = False) -> Any:
    """The model of an exported directory, in eval mode on ``device``; ``named`` is what an error calls the directory.

    Raises:
        UserError: if it cannot be loaded, or needs code of its own without ``trust_remote_code``.
    """
    return load_directory(directory, named, trust_remote_code).to(device).eval()


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    kernel: str = "auto",
) -> Continuation:
    """Continue ``prompt`` by at most ``max_new_tokens`` tokens through the KV cache.

    ``kernel`` is what attends in steps of one token: ``torch``, ``triton`` (:mod:`.decoding`), or ``auto``, which is
    ``triton`` on a GPU where it can run.
    """
    import torch

    from phd_megatron.huggingface.decoding import decode_kernel, takes_decode_kernel

    options = (sampling or Sampling()).options()
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: it must be at least 1")
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    length = inputs["input_ids"].size(1)
    if length == 0:
        raise UserError(f"the prompt {prompt!r} has no tokens; give some text to continue")
    if sampling is not None and sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    triton = takes_decode_kernel(model, kernel)
    began = time.perf_counter()
    with decode_kernel(model) if triton else nullcontext():
        result = model.generate(**inputs, max_new_tokens=max_new_tokens, return_dict_in_generate=True, **options)
    seconds = time.perf_counter() - began
    tokens = result.sequences[0, length:]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    cache = result["cache" if "cache" in result else "past_key_values"]  # renamed in transformers 5.24
    attention = "triton" if triton else "torch"
    return Continuation(text, length, len(tokens), seconds, attention, **_cache_size(model, cache))


def _cache_size(model: Any, cache: Any) -> dict[str, int]:
    config = model.config
    tokens = cache.get_seq_length()
    item = next(model.parameters()).element_size()
    vanilla = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * item * tokens
    hidden = cache.hidden_entries() if hasattr(cache, "hidden_entries") else 0
    bound = cache.policy.max_hidden_entries if hasattr(cache, "policy") else 0
    held = cache.nbytes() if hasattr(cache, "nbytes") else vanilla
    return {
        "cache_tokens": tokens,
        "hidden_entries": hidden,
        "hidden_bound": bound,
        "cache_bytes": held,
        "vanilla_bytes": vanilla,
        "trained_positions": config.max_position_embeddings,
    }
