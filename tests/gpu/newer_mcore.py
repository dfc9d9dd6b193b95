"""What newer versions of Megatron-Core bring, measured with Megatron's own modules: why we use it, or do not.

Two questions, answered in one process, without an optimizer. Is a norm that returns its residual too
(``fused_residual_rmsnorm``) faster than a norm and autograd's own sum of two gradients (times taken in turn)? What do
layers of a stock GPTModel take in time and memory whose inputs go to the host (``fine_grained_activation_offloading``),
beside the same layers as they are, with attention recomputed, and with whole layers recomputed (one model after the
other, so that differences of time below the spread of a model's rounds say nothing)?

    python tests/gpu/newer_mcore.py [FILE.json]      Megatron-Core 0.19 and Transformer Engine; about two minutes
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from megatron.core import __version__, parallel_state, tensor_parallel
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig

SHAPE = {"hidden_size": 2048, "num_attention_heads": 16, "num_query_groups": 4, "ffn_hidden_size": 5632}
LAYERS, SEQUENCE, SAMPLES, VOCABULARY, ROUNDS = 16, 4096, 4, 32768, 7
OFFLOAD = {"fine_grained_activation_offloading": True}
MEMBERS = {
    "as it is": {},
    "attention recomputed": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "whole layers recomputed": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "attention to the host": {**OFFLOAD, "offload_modules": ["core_attn", "attn_proj"]},
    "attention's first inputs to the host": {**OFFLOAD, "offload_modules": ["qkv_linear"]},
    "attention and its inputs to the host": {**OFFLOAD, "offload_modules": ["qkv_linear", "core_attn", "attn_proj"]},
}


def config(**changes: object) -> TransformerConfig:
    return TransformerConfig(
        num_layers=LAYERS,
        **SHAPE,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **changes,
    )


def seconds(work: Callable[[], object], times: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / times


def in_turn(works: dict[str, Callable[[], object]], times: int) -> dict[str, list[float]]:
    """Seconds of each, round after round, so that what disturbs the machine disturbs all."""
    for work in works.values():
        seconds(work, 2)
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            taken[name].append(seconds(work, times))
    return taken


def norm_step(norm: torch.nn.Module, hidden: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and backward of a residual connection with an identity as its block: gradients reach both ways."""
    hidden = hidden.detach().requires_grad_()
    read = hidden * 1.0  # not a leaf, as between layers
    normed = norm(read)
    normed, residual = normed if isinstance(normed, tuple) else (normed, read)
    (normed + residual).backward(weights)
    assert hidden.grad is not None
    return normed.detach(), hidden.grad


def residual_norms() -> dict[str, object]:
    results: dict[str, object] = {}
    for rows in (8192, 65536):
        hidden, weights = (torch.randn(rows, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        norms = {
            name: TENorm(config(fused_residual_rmsnorm=fused), 2048, has_residual=True)
            for name, fused in (("a norm", False), ("a norm that returns its residual", True))
        }
        (a, a_grad), (b, b_grad) = (norm_step(norm, hidden, weights) for norm in norms.values())
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a_grad, b_grad, rtol=2e-2, atol=2e-2)
        results[str(rows)] = in_turn(
            {name: partial(norm_step, norm, hidden, weights) for name, norm in norms.items()}, 50
        )
    return results


def forward_step(batches: object, model: GPTModel) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple]]:
    tokens = torch.arange(SEQUENCE, device="cuda").expand(SAMPLES, -1)
    losses = model(tokens % VOCABULARY, tokens, None, labels=(tokens * 7 + 1) % VOCABULARY)
    return losses, lambda losses: (losses.float().mean(), {"loss": losses.detach().float().mean()})


def model_step(model: GPTModel) -> float:
    for parameter in model.parameters():
        parameter.grad = None
    (report,) = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=None,
        model=[model],
        num_microbatches=1,
        seq_length=SEQUENCE,
        micro_batch_size=SAMPLES,
        forward_only=False,
    )
    return report["loss"]


def whole_models() -> dict[str, object]:
    """One model after the other, since what each holds in memory is measured."""
    results: dict[str, object] = {}
    for name, changes in MEMBERS.items():
        try:
            torch.manual_seed(1)
            tensor_parallel.model_parallel_cuda_manual_seed(1)
            model = GPTModel(
                config(**changes),
                get_gpt_layer_with_transformer_engine_spec(),
                VOCABULARY,
                SEQUENCE,
                position_embedding_type="rope",
                share_embeddings_and_output_weights=False,
            ).cuda()
            loss = float(model_step(model))
            norm = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
            model_step(model)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            taken = [seconds(partial(model_step, model), 2) for _ in range(ROUNDS)]
            peak = (torch.cuda.max_memory_allocated() - before) / 2**30
            results[name] = {"loss": loss, "norm": norm, "seconds": taken, "GiB above parameters": peak}
            print(f"{name}: {statistics.median(taken) * 1e3:.1f} ms, {peak:.1f} GiB, loss {loss:.5f}, norm {norm:.5f}")
        except Exception as error:  # one that cannot be had is a result too
            results[name] = {"refused": f"{type(error).__name__}: {error}"[:600]}
            print(name, results[name])
        model = None
        torch.cuda.empty_cache()
    return results


def main(arguments: list[str]) -> None:
    torch.distributed.init_process_group("nccl", init_method="tcp://localhost:29533", world_size=1, rank=0)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    results = {
        "megatron-core": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(),
        "norms": residual_norms(),
    }
    for rows, taken in results["norms"].items():
        print(rows, {name: f"{statistics.median(each) * 1e6:.0f} us" for name, each in taken.items()})
    results["models"] = whole_models()
    for path in arguments[:1]:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main(sys.argv[1:])
