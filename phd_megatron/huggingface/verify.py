"""Load an exported directory as its users will, and compare it with the checkpoint it came from."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import phd_megatron
from phd_megatron.data.tokenizers import load_tokenizer
from phd_megatron.errors import UserError
from phd_megatron.huggingface import megatron_logits
from phd_megatron.huggingface.architecture import Architecture
from phd_megatron.huggingface.checkpoint import MegatronCheckpoint
from phd_megatron.huggingface.families import FAMILIES
from phd_megatron.huggingface.family import TensorNames
from phd_megatron.huggingface.json_values import JSON
from phd_megatron.huggingface.loading import load_directory
from phd_megatron.huggingface.mapping import Rule
from phd_megatron.runtime.temporary import temporary_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: of logits and hidden states in float32, whatever type the export has
TOLERANCE = 1e-5
_LENGTH = 128
#: what transformers' own classes call the parts of a block with experts, all of which lie in one tensor
_IN_MEMORY = re.compile(r"(.*\.)mlp\.(gate\.weight|experts\.(gate_up_proj|down_proj))")
_MANY_ROWS = 8  # from so many on a product's rows are the same bits, however many there are
_TEXT = (
    "A transformer reads a text from left to right and says, after every word, which one it expects next. Some words "
    "are easy: the end of a common phrase, a closing bracket. Others need 3 or 4 facts from far above, and more "
    "thought than one pass through the layers allows. def think(word, times=2): return [word] * times\n"
)


class VerificationError(UserError):
    """The exported directory is not the checkpoint's model."""


def verify_export(
    directory: Path, source: MegatronCheckpoint, rules: Sequence[Rule], dtype: torch.dtype, level: str
) -> None:
    """Reload through ``AutoModelForCausalLM``, map every tensor back onto the checkpoint's bit for bit, compare logits.

    Logits are those of the Megatron-Core model with the same (rounded) parameters, both computed in float32. Needs
    memory for the model as exported for ``tensors``, in float32 for ``full``.

    Raises:
        VerificationError: naming the first tensor that is missing, left over or different, or the first layer whose
            output differs, or non-finite logits.
    """
    expected = _megatron_outputs(source, dtype) if level == "full" else None  # before the model takes its memory
    model = _load(directory, run_its_code=True)
    _compare_tensors(model, source, rules, dtype)
    if expected is not None:
        _compare_outputs(model.float().eval(), expected)
        return
    tokens = torch.arange(min(model.config.vocab_size, 64)).unsqueeze(0)
    with torch.no_grad():
        if not model.eval()(tokens, use_cache=False).logits.isfinite().all():
            raise VerificationError(
                f"the exported model gives logits that are not finite in {dtype}; the checkpoint's own values are at "
                "fault if it was trained so, else export with --dtype float32"
            )


@dataclass(frozen=True)
class Losses:
    """Nats a token of one text: the imported model's before any training, and its source's."""

    here: float
    source: float


def verify_import(checkpoint: Path, directory: Path, source: Architecture) -> Losses | None:
    """Compare logits of an imported checkpoint with those that transformers computes from the directory it came from.

    Args:
        source: the directory's own model; the checkpoint's parameters are compared as that model's. Where the imported
            model has other copies, its originals must be the source's after every layer but the last: bit for bit, or
            within the tolerance where products of a few rows are rounded otherwise than those of more (experts).

    Returns:
        The losses of a model with other copies than its source, else None.

    Raises:
        VerificationError: naming the first layer that differs.
    """
    imported = MegatronCheckpoint(checkpoint, verify=False)
    model, vocab_size = imported.run.model, imported.run.model.vocab_size
    assert vocab_size is not None  # completed when it was saved
    here = Architecture.from_model(model, vocab_size)
    changed = here.copies != source.copies
    # One thread: products are cut among several by their rows, and copies have more of those.
    threads = 1 if changed else None
    expected = _megatron_outputs(imported, torch.float32, source.copies, threads)
    _compare_outputs(_load(directory, run_its_code=False).float().eval(), expected)
    if not changed:
        return None
    found = _megatron_outputs(imported, torch.float32, None, threads)
    few_rows = here.moe is not None or expected[megatron_logits.TOKENS].numel() < _MANY_ROWS
    for name, hidden in expected.items():
        if not name.startswith(megatron_logits.ORIGINALS) or torch.equal(found[name], hidden):
            continue
        error = _relative(hidden, found[name])
        if not few_rows or not error <= TOLERANCE:
            raise VerificationError(
                f"originals are not the source's with copies beside them: {name} differs by {error:.1e} relative; "
                "this is a mistake of phd-megatron, please report it"
            )
    return Losses(_text_loss(found), _text_loss(expected))


def _text_loss(outputs: dict[str, Tensor]) -> float:
    """Mean loss of the text's tokens after the first, under logits ``[b, n, V]``."""
    logits, tokens = outputs[megatron_logits.LOGITS], outputs[megatron_logits.TOKENS]
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))


def _load(directory: Path, run_its_code: bool) -> PreTrainedModel:
    try:
        return load_directory(directory, directory.name, run_its_code)
    except UserError as error:
        raise VerificationError(f"the directory does not load cleanly: {error}") from error


# ---------------------------------------------------------------- tensors


@torch.no_grad()
def _compare_tensors(
    model: PreTrainedModel, source: MegatronCheckpoint, rules: Sequence[Rule], dtype: torch.dtype
) -> None:
    names = {name for rule in rules for name in rule.hf}
    state = _as_files_have_them(model.state_dict(), FAMILIES[model.config.model_type].names)
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    if left := set(state) - names:
        raise VerificationError(f"the loaded model has parameters that no checkpoint tensor gave: {sorted(left)[:5]}")
    for rule in rules:
        expected = source.read(rule.mcore).to(rule.dtype(dtype))
        found = rule.to_mcore(state)
        if not torch.equal(found, expected[: found.size(0)]):
            raise VerificationError(f"{', '.join(rule.hf[:3])} do not give {rule.mcore} back after reloading")


def _as_files_have_them(state: dict[str, Tensor], names: TensorNames) -> dict[str, Tensor]:
    """Undo the stacking of experts with which transformers loads its own classes: views, by the names in the files."""
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        match = _IN_MEMORY.fullmatch(key)
        if match is None:
            found[key] = tensor
            continue
        block, name, stacked = f"{match[1]}{names.experts}", match[2], match[3]
        if stacked is None:
            found[f"{block}.{name}"] = tensor
            continue
        words = (names.gate, names.up) if stacked == "gate_up_proj" else (names.down,)
        for number, expert in enumerate(tensor):
            parts = zip(words, expert.chunk(len(words)), strict=True)
            found |= {f"{block}.experts.{number}.{word}.weight": part for word, part in parts}
    return found


# ---------------------------------------------------------------- logits


def _tokens(source: MegatronCheckpoint) -> Tensor:
    """Token ids ``[2, n]`` of a text and of its second half first, or of nothing in particular without a tokenizer."""
    length = min(source.run.model.seq_length, _LENGTH)
    vocab_size = source.run.model.vocab_size or 2
    if source.tokenizer_dir is None:
        ids = [index % vocab_size for index in range(2 * length)]
    else:
        ids = load_tokenizer(source.tokenizer_dir).tokenize(_TEXT)
        ids = ids * -(-2 * length // len(ids))
    return torch.tensor(ids[: 2 * length]).view(2, length)


def _megatron_outputs(
    source: MegatronCheckpoint,
    dtype: torch.dtype,
    changes: Mapping[str, JSON] | None = None,
    threads: int | None = None,
) -> dict[str, Tensor]:
    root = str(Path(phd_megatron.__file__).parents[1])
    variables = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    variables |= {"PYTHONPATH": os.pathsep.join(filter(None, [root, variables.get("PYTHONPATH")]))}
    variables |= {"PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": ""}
    if threads is not None:
        variables |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    with temporary_directory("verify") as work:
        tokens, output = work / "tokens.safetensors", work / "output.safetensors"
        ids = _tokens(source)
        save_file({megatron_logits.TOKENS: ids}, tokens)
        words = [str(source.directory), str(dtype).removeprefix("torch."), str(tokens), str(output)]
        words += [json.dumps(changes)] if changes else []
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", megatron_logits.__name__, *words],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            last = done.stdout.strip().splitlines()[-1:] or ["no output"]
            raise VerificationError(
                f"the Megatron model of {source.directory} cannot be run to compare logits with (exit code "
                f"{done.returncode}): {last[0]}; --verify tensors compares the weights alone"
            )
        return {**load_file(output), megatron_logits.TOKENS: ids}


@torch.no_grad()
def _compare_outputs(model: PreTrainedModel, expected: dict[str, Tensor]) -> None:
    tokens = expected[megatron_logits.TOKENS]
    if not expected[megatron_logits.LOGITS].isfinite().all():
        raise VerificationError(
            "the Megatron model's own logits are not finite, so there is nothing to compare: it has diverged; take an "
            "earlier checkpoint"
        )
    found = model(tokens, use_cache=False, output_hidden_states=True)
    error = _relative(expected[megatron_logits.LOGITS], model(tokens, use_cache=False).logits)
    if error <= TOLERANCE:
        return
    for index, hidden in enumerate(found.hidden_states[1:-1]):
        layer = _relative(expected[megatron_logits.layer_name(index)], hidden)
        if not layer <= TOLERANCE:
            raise VerificationError(
                f"the Hugging Face directory computes something else than the Megatron model: logits differ by "
                f"{error:.1e} relative (at most {TOLERANCE:g}), and layer {index} is the first whose output differs, "
                f"by {layer:.1e}"
            )
    raise VerificationError(
        f"the Hugging Face directory computes something else than the Megatron model: logits differ by {error:.1e} "
        f"relative (at most {TOLERANCE:g}), though the outputs of all layers but the last agree; look at the last "
        "layer, the final norm and the head"
    )


def _relative(expected: Tensor, found: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))
