"""Continue a prompt from an exported directory or, through a temporary export, from a Megatron checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from phd_megatron.errors import UserError, naming
from phd_megatron.huggingface.json_values import Fields
from phd_megatron.huggingface.loading import first_words, load_directory
from phd_megatron.huggingface.weights import TOKENIZER_JSON, check_json
from phd_megatron.runtime.context import choose_device
from phd_megatron.runtime.temporary import temporary_directory

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import BatchEncoding, Cache, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

#: what the size of a cache is made of, in a config.json; a family may lack the last two
_SIZES = ("num_hidden_layers", "num_attention_heads", "hidden_size", "num_key_value_heads", "head_dim")
MOST_TOKENS = 1_000_000
#: logits over less are infinite
LEAST_TEMPERATURE = 1e-6
_TEMPERATURE = "at least 1e-6 and at most 1e6; leave it out for greedy decoding"
#: options of sampling with the values that leave every token its probability
_SAMPLING: Fields = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedy unless any of temperature, top_k and top_p is given."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def options(self) -> Fields:
        """Arguments of ``generate``.

        Raises:
            UserError: for a value that cannot be.
        """
        checks = (
            # Above they are all alike.
            ("temperature", self.temperature, lambda v: LEAST_TEMPERATURE <= v <= 1e6, _TEMPERATURE),
            ("top_k", self.top_k, lambda v: 1 <= v < 2**31, "at least 1 and below 2^31"),
            ("top_p", self.top_p, lambda v: 0 < v <= 1, "above 0 and at most 1"),
        )
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise UserError(f"seed={self.seed}: it must be at least -2^63 and below 2^63")
        given = {}
        for name, value, valid, cure in checks:
            if value is None:
                continue
            if not valid(value):
                raise UserError(f"{name}={value}: it must be {cure}")
            given[name] = value
        # What is not given is neutral, whatever the directory's generation_config.json says.
        if not given:
            return {"do_sample": False, "num_beams": 1, **_SAMPLING, "top_k": 50}  # 50 is what says nothing there
        return {"do_sample": True, "num_beams": 1, **_SAMPLING, **given}


@dataclass(frozen=True)
class Continuation:
    """A continued prompt, with the size of the KV cache at its end, per sequence; 0 for what is not known."""

    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    decode_attention: str
    cache_tokens: int = 0
    hidden_entries: int = 0
    cache_bytes: int = 0
    vanilla_bytes: int = 0
    trained_positions: int = 0

    def summary(self) -> str:
        """Speed, and the cache beside a vanilla model's."""
        speed = f"{self.new_tokens / self.seconds:.1f} tokens/s, decode attention: {self.decode_attention}"
        lines = [f"{self.new_tokens} tokens in {self.seconds:.2f} s, {speed}"]
        if self.vanilla_bytes:
            lines.append(self._cache_line())
        if 0 < self.trained_positions < self.prompt_tokens + self.new_tokens:
            lines.append(f"note: the text is longer than the {self.trained_positions} tokens the model was trained on")
        return "\n".join(lines)

    def _cache_line(self) -> str:
        extra = f" + {self.hidden_entries} hidden entries" if self.hidden_entries else ""
        share = self.cache_bytes / self.vanilla_bytes - 1
        return (
            f"KV cache per layer: {self.cache_tokens} entries{extra}; {self.cache_bytes / 1024:.1f} KiB in all layers, "
            f"a vanilla model's {self.vanilla_bytes / 1024:.1f} KiB ({share:+.1%})"
        )


@contextmanager
def hf_directory(path: str | Path, verify_checkpoint: bool = True) -> Iterator[Path]:
    """``path`` itself when it is an exported directory, else a temporary export of the checkpoint in it."""
    path = Path(path)
    if (path / "config.json").is_file():
        yield path
        return
    from phd_megatron.huggingface.export import export_checkpoint

    with temporary_directory("export") as parent:
        output = parent / "model"
        export_checkpoint(path, output, verify="none", verify_checkpoint=verify_checkpoint)
        with naming(output, path):
            yield output


def load(
    path: str | Path, device: str | None = None, trust_remote_code: bool = False, verify_checkpoint: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model, in eval mode, and tokenizer of an exported directory or a Megatron checkpoint.

    Code in the directory is run only if ``trust_remote_code`` says so; else the classes of this package and of
    transformers do. Files of a checkpoint are compared with their checksums first, unless ``verify_checkpoint`` is
    false.

    Raises:
        UserError: if it cannot be loaded, or has no tokenizer.
    """
    from transformers import AutoTokenizer

    device = choose_device(device or "auto")[0]
    with hf_directory(path, verify_checkpoint) as directory:
        if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            raise UserError(f"{path} holds no tokenizer, so a prompt cannot be read; add its files beside the model")
        check_json(directory, TOKENIZER_JSON)
        model = load_model(directory, path, device, trust_remote_code)
        try:
            # With the configuration at hand transformers does not look for the class that the directory names.
            tokenizer = AutoTokenizer.from_pretrained(
                directory, config=model.config, trust_remote_code=trust_remote_code, local_files_only=True
            )
        except Exception as error:  # what a damaged tokenizer makes the libraries raise is of many kinds
            raise UserError(f"the tokenizer of {path} cannot be loaded: {first_words(error)}; copy it again") from error
        return model, tokenizer


def load_model(directory: Path, named: str | Path, device: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of an exported directory, in eval mode on ``device``; ``named`` is what an error calls the directory.

    Raises:
        UserError: if it cannot be loaded, or needs code of its own without ``trust_remote_code``.
    """
    return load_directory(directory, named, trust_remote_code).to(device).eval()


def check_amount(max_new_tokens: int) -> None:
    """Refuse a number of tokens that cannot be made.

    Raises:
        UserError: with the range.
    """
    if not 1 <= max_new_tokens <= MOST_TOKENS:
        raise UserError(f"max_new_tokens={max_new_tokens}: it must be at least 1 and at most {MOST_TOKENS:,}")


def check_prompt(prompt: str) -> None:
    """Refuse a prompt that is no text; a terminal's bytes that are no UTF-8 reach Python as lone surrogates.

    Raises:
        UserError: with the prompt.
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt {prompt!r} is no valid UTF-8; give it as text") from error


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
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
    from transformers import LogitsProcessorList

    from phd_megatron.huggingface.decoding import decode_kernel, takes_decode_kernel

    options = (sampling or Sampling()).options()
    check_amount(max_new_tokens)
    check_prompt(prompt)
    inputs = _tokens_of(model, tokenizer, prompt)
    if sampling is not None and sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    triton = takes_decode_kernel(model, kernel)
    began = time.perf_counter()
    with decode_kernel(model) if triton else nullcontext():
        try:
            result = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                return_dict_in_generate=True,
                tokenizer=tokenizer,  # for stop strings
                logits_processor=LogitsProcessorList([_nan_is_refused()]),
                **options,
            )
        except (RuntimeError, ValueError, IndexError, TypeError, OverflowError, MemoryError) as error:
            raise UserError(
                f"the model cannot continue the prompt: {first_words(error)}; its parameters or its "
                "generation_config.json are at fault, so look at both, or export it again"
            ) from error
    seconds = time.perf_counter() - began
    length = inputs["input_ids"].size(1)
    tokens = result.sequences[0, length:]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    # Renamed in transformers 5.24; a model without attention has neither.
    cache = next((result[name] for name in ("cache", "past_key_values") if name in result), None)
    attention = "triton" if triton else "torch"
    return Continuation(text, length, len(tokens), seconds, attention, **_cache_size(model, cache))


def _tokens_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> BatchEncoding:
    """Arguments of ``generate``: token ids ``[1, n]`` of the prompt, n at least 1, all in the model's vocabulary."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    check_tokens(prompt, inputs["input_ids"][0].tolist(), model.get_input_embeddings().num_embeddings)
    return inputs


def check_tokens(prompt: str, tokens: Sequence[int], rows: int) -> None:
    """Refuse a text that has no tokens, or one that is none of the model's ``rows``: the tokenizer is another model's.

    Raises:
        UserError: with the text or the token.
    """
    if not tokens:
        raise UserError(f"the prompt {prompt!r} has no tokens; give some text to continue")
    if (largest := max(tokens)) >= rows:
        raise UserError(
            f"the tokenizer gives token {largest}, and the model has a vocabulary of {rows}; the two do not belong "
            "together, so copy the directory again"
        )


def _nan_is_refused() -> LogitsProcessor:
    """Looks at the prompt's logits; later ones would cost a wait for the device at every step."""
    from transformers import LogitsProcessor

    class NaNIsRefused(LogitsProcessor):
        seen = False

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if not self.seen and scores.isnan().any():
                raise UserError(
                    "the model's logits are NaN, so it has diverged or its parameters are damaged; use "
                    "another checkpoint"
                )
            self.seen = True
            return scores

    return NaNIsRefused()


def _cache_size(model: PreTrainedModel, cache: Cache | None) -> dict[str, int]:
    """Fields of a continuation, as far as the model's family has what they are made of."""
    config = model.config
    positions = getattr(config, "max_position_embeddings", None)
    found = {"trained_positions": positions if isinstance(positions, int) else 0}
    layers, heads, width, groups, head = (getattr(config, name, None) for name in _SIZES)
    groups = groups or heads
    if head is None and isinstance(width, int) and isinstance(heads, int):
        head = width // heads
    if not isinstance(layers, int) or not isinstance(groups, int) or not isinstance(head, int) or cache is None:
        return found
    tokens = cache.get_seq_length()
    vanilla = 2 * layers * groups * head * next(model.parameters()).element_size() * tokens
    return {
        **found,
        "cache_tokens": tokens,
        "hidden_entries": cache.hidden_entries() if hasattr(cache, "hidden_entries") else 0,
        "cache_bytes": cache.nbytes() if hasattr(cache, "nbytes") else vanilla,
        "vanilla_bytes": vanilla,
    }
