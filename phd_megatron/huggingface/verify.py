"""Load an exported directory as its users will, and compare it with the checkpoint it came from."""

from __future__ import annotations

from pathlib import Path

import torch

from phd_megatron.errors import UserError
from phd_megatron.huggingface.checkpoint import MegatronCheckpoint
from phd_megatron.huggingface.mapping import Rule


class VerificationError(UserError):
    """The exported directory is not the checkpoint's model."""


@torch.no_grad()
def verify_export(directory: Path, source: MegatronCheckpoint, rules: list[Rule], dtype: torch.dtype) -> None:
    """Reload through ``AutoModelForCausalLM`` and map every tensor back onto the checkpoint's, bit for bit.

    Raises:
        VerificationError: naming the first tensor that is missing, left over or different, or non-finite logits.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            directory, trust_remote_code=True, local_files_only=True, dtype="auto", output_loading_info=True
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            raise VerificationError(f"the export does not load cleanly: {problem} {sorted(info[problem])[:5]}")
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    if left := set(state) - {name for rule in rules for name in rule.hf}:
        raise VerificationError(f"the loaded model has parameters that no checkpoint tensor gave: {sorted(left)[:5]}")
    for rule in rules:
        expected = source.read(rule.mcore).to(dtype)
        found = rule.to_mcore(state)
        if not torch.equal(found, expected[: found.size(0)]):
            raise VerificationError(f"{', '.join(rule.hf)} do not give {rule.mcore} back after reloading")
    tokens = torch.arange(min(model.config.vocab_size, 64)).unsqueeze(0)
    if not model.eval()(tokens, use_cache=False).logits.isfinite().all():
        raise VerificationError(
            f"the exported model gives logits that are not finite in {dtype}; the checkpoint's own values are at fault "
            "if it was trained so, else export with --dtype float32"
        )
