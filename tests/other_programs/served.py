"""An export with drawn weights, vLLM on it, and what the exported model itself says, for comparison."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phd_megatron.huggingface.families.phd import AUTO_MAP
from phd_megatron.huggingface.installed import config_class, model_class

SIZES = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
#: tokens must be equal where the best two of the export's log-probabilities are further apart
APART = 1e-3
LOG_PROBABILITY = 1e-4
#: engines that are to be closed
OPEN: list[Any] = []


def export(folder: Path, fields: Mapping[str, Any]) -> torch.nn.Module:
    """A model with drawn weights in float32, its directory written as an export's is."""
    config = config_class()(**SIZES | dict(fields))
    torch.manual_seed(0)
    model = model_class()(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "copy" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    path = folder / "config.json"
    written = json.loads(path.read_text()) | {"architectures": ["PHDForCausalLM"], "auto_map": AUTO_MAP}
    path.write_text(json.dumps(written))
    return model


def engine(folder: Path, **options: Any) -> Any:
    """vLLM on a directory, whose code is not run."""
    from vllm import LLM

    defaults = {"max_model_len": 128, "max_num_seqs": 6, "max_num_batched_tokens": 24}
    llm = LLM(
        str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        seed=0,
        **defaults | options,
    )
    OPEN.append(llm)
    return llm


def draw(count: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    """Prompts of unequal lengths; every third one begins as the one before."""
    source = random.Random(seed)
    prompts: list[list[int]] = []
    for number in range(count):
        prompt = [source.randrange(1, 61) for _ in range(source.randrange(1, longest))]
        if number % 3 == 2:
            prompt = (prompts[-1] + prompt)[:longest]
        prompts.append(prompt)
    return prompts


def answers(llm: Any, prompts: Sequence[Sequence[int]], tokens: int = 10, from_cache: bool = False) -> list[Any]:
    """Greedy continuations with log-probabilities, of the prompt too.

    Who asks for those of the prompt gets nothing from vLLM's cache of prefixes; ``from_cache`` leaves them out.
    """
    from vllm import SamplingParams

    how = SamplingParams(
        temperature=0,
        max_tokens=tokens,
        detokenize=False,
        ignore_eos=True,
        logprobs=1,
        prompt_logprobs=None if from_cache else 0,
    )
    return llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], how, use_tqdm=False)


@torch.no_grad()
def expected(model: torch.nn.Module, tokens: Sequence[int]) -> Tensor:
    """Log-probabilities ``[tokens, vocabulary]`` by the exported model, all at once and alone."""
    return model(torch.tensor([list(tokens)]), use_cache=False).logits[0].log_softmax(-1)


def assert_as_exported(model: torch.nn.Module, prompts: Sequence[Sequence[int]], outputs: Sequence[Any]) -> None:
    """Every token and log-probability is the exported model's."""
    for prompt, output in zip(prompts, outputs, strict=True):
        answer = list(output.outputs[0].token_ids)
        wanted = expected(model, [*prompt, *answer])
        for place, token in enumerate(answer):
            row = wanted[len(prompt) - 1 + place]
            best = row.topk(2).values
            if best[0] - best[1] > APART:
                assert token == int(row.argmax()), (prompt, answer, place)
            found = output.outputs[0].logprobs[place][token].logprob
            assert abs(found - float(row[token])) <= LOG_PROBABILITY
        for place in range(1, len(prompt)) if output.prompt_logprobs else ():
            found = output.prompt_logprobs[place][prompt[place]].logprob
            assert abs(found - float(wanted[place - 1, prompt[place]])) <= LOG_PROBABILITY
