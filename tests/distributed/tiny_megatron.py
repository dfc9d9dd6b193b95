"""A tiny stock megatron-core GPT on CPU, run as a script by the tests of the runtime.

``train KEY=VALUE...``: three steps under torchrun or alone; prints ``RESULT [[loss, grad_norm], ...]``.
``resume DIRECTORY``: two steps, save, two more; then the last two again from the checkpoint; prints both.
``redirects DIRECTORY``: each case of CASES with its redirect and without; prints ``RESULT {name: [with, without]}``.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
import traceback
from pathlib import Path

VOCAB, SEQUENCE, BATCH = 128, 16, 8


def start(skip=(), fixes_skip=(), **parallel):
    from phd_megatron.config.schema import ParallelConfig
    from phd_megatron.runtime import cpu_backend, mcore_fixes
    from phd_megatron.runtime.context import Runtime

    cpu_backend.install(skip=skip)
    if fixes_skip:
        mcore_fixes.REDIRECTS = tuple(row for row in mcore_fixes.REDIRECTS if row.name not in fixes_skip)
    return Runtime.start(ParallelConfig(device="cpu", **parallel), config={"parallel": parallel})


class Tiny:
    """Model, optimizer and schedule; weights depend on their global names alone."""

    def __init__(
        self,
        tp=1,
        pp=1,
        vpp=None,
        sp=0,
        bf16=0,
        sharded=1,
        overlap=0,
        fused=0,
        moe=0,
        ep=1,
        recompute="",
        wire=0,
        accumulates=0,
    ):
        import torch
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.transformer import TransformerConfig
        from megatron.core.transformer.module import Float16Module

        more: dict = {}
        if moe:
            more |= {"num_moe_experts": 4, "moe_router_topk": 2, "moe_token_dispatcher_type": "alltoall"}
            more |= {"moe_router_dtype": "fp32", "moe_aux_loss_coeff": 0.01, "expert_model_parallel_size": ep}
        if recompute:
            more |= {"recompute_granularity": "selective", "recompute_modules": [recompute]}
        if accumulates:
            more |= {"gradient_accumulation_fusion": True}
        dtype = torch.bfloat16 if bf16 else torch.float32
        self.tp, self.moe, self.vpp = tp, moe, vpp
        self.config = TransformerConfig(
            num_layers=4,
            hidden_size=64,
            num_attention_heads=4,
            ffn_hidden_size=128,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp,
            sequence_parallel=bool(sp),
            pipeline_dtype=dtype,
            params_dtype=dtype,
            bf16=bool(bf16),
            calculate_per_token_loss=True,
            deallocate_pipeline_outputs=True,
            bias_activation_fusion=bool(fused),
            bias_dropout_fusion=bool(fused),
            batch_p2p_comm=not wire,
            overlap_p2p_comm=bool(wire and vpp),
            **more,
        )
        self.models = [self._chunk(stage) for stage in (range(vpp) if vpp else [None])]
        if bf16:
            self.models = [Float16Module(self.config, model) for model in self.models]
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=bool(sharded),
            overlap_grad_reduce=bool(overlap),
            overlap_param_gather=bool(overlap and sharded),
            bucket_size=30000,
        )
        self.chunks = [
            DistributedDataParallel(self.config, ddp, model, disable_bucketing=index > 0)
            for index, model in enumerate(self.models)
        ]
        optimizer = OptimizerConfig(
            optimizer="adam",
            lr=1e-3,
            weight_decay=0.1,
            bf16=bool(bf16),
            use_distributed_optimizer=bool(sharded),
            clip_grad=1.0,
            overlap_param_gather=bool(overlap and sharded),
        )
        self.optimizer = get_megatron_optimizer(optimizer, self.chunks)
        self.config.no_sync_func = [c.no_sync for c in self.chunks] if vpp else self.chunks[0].no_sync
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.schedule = get_forward_backward_func()

    def _chunk(self, stage):
        import re

        import torch
        from megatron.core import parallel_state as state
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

        class Norm(torch.nn.Module):
            def __init__(self, config, hidden_size, eps=1e-5, **_):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
                self.weight.sequence_parallel = config.sequence_parallel
                self.shape, self.eps = (hidden_size,), eps

            def forward(self, x):
                return torch.nn.functional.rms_norm(x, self.shape, self.weight, self.eps)

        layer = get_gpt_layer_local_spec(num_experts=4 if self.moe else None)
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
        count = get_num_layers_to_build(self.config, vp_stage=stage)
        model = GPTModel(
            self.config,
            TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=Norm),
            vocab_size=VOCAB,
            max_sequence_length=SEQUENCE,
            pre_process=state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            vp_stage=stage,
        )
        first = model.decoder.layers[0].layer_number - 1
        rank = state.get_tensor_model_parallel_rank()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                continue
            name = re.sub(r"layers\.(\d+)", lambda match: f"layers.{int(match[1]) + first}", name)
            dim = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
            shape = list(parameter.shape)
            if dim is not None:
                shape[dim] *= self.tp
            seed = int(hashlib.md5(name.encode()).hexdigest()[:8], 16)
            full = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05
            if dim is not None:
                halves = full.chunk(2, 0) if "fc1" in name else [full]  # gate rows, then up rows
                full = torch.cat([half.chunk(self.tp, dim)[rank] for half in halves], 0)
            parameter.data.copy_(full)
        return model

    def step(self, number):
        import torch
        from megatron.core import parallel_state as state

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        size, rank = state.get_data_parallel_world_size(), state.get_data_parallel_rank()

        def batches():
            for sample in range(rank, BATCH, size):
                generator = torch.Generator().manual_seed(number * 1000 + sample)
                yield torch.randint(0, VOCAB, (1, SEQUENCE + 1), generator=generator)

        def loss_function(output):
            total, count = output.float().sum(), torch.tensor(output.numel(), dtype=torch.int)
            return total, count, {"lm": torch.stack([total.detach(), count.float()])}

        def forward(iterator, model):
            batch = next(iterator)
            positions = torch.arange(SEQUENCE)[None]
            return model(batch[:, :-1].contiguous(), positions, None, labels=batch[:, 1:].contiguous()), loss_function

        reports = self.schedule(
            forward_step_func=forward,
            data_iterator=[batches() for _ in self.chunks] if self.vpp else batches(),
            model=self.chunks if self.vpp else self.chunks[0],
            num_microbatches=BATCH // size,
            seq_length=SEQUENCE,
            micro_batch_size=1,
            forward_only=False,
        )
        _, norm, _ = self.optimizer.step()
        total = torch.zeros(2)
        for report in reports:
            total += report["lm"]
        torch.distributed.all_reduce(total)
        return [(total[0] / total[1]).item(), float(norm)]

    def sharded_state(self, loading, kind):
        from megatron.core import parallel_state as state

        metadata = {
            "distrib_optim_sharding_type": kind,
            "non_homogeneous_layers": True,
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": state.get_data_parallel_group(with_context_parallel=True),
        }
        model = self.models[0].sharded_state_dict(metadata=metadata)
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
        return {"model": model, "optimizer": optimizer}, {k: v for k, v in metadata.items() if k != "dp_cp_group"}


def save_and_resume(directory, kind="fully_reshardable", **options):
    """Losses and norms of two steps after a save, uninterrupted and resumed by a new model and optimizer."""
    from megatron.core import dist_checkpointing
    from torch import distributed

    tiny = Tiny(**options)
    before = [tiny.step(number) for number in range(2)]
    Path(directory).mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    state, metadata = tiny.sharded_state(False, kind)
    dist_checkpointing.save(state, str(directory), content_metadata=metadata)
    straight = [tiny.step(number) for number in range(2, 4)]
    fresh = Tiny(**options)
    loaded = dist_checkpointing.load(fresh.sharded_state(True, kind)[0], str(directory))
    fresh.models[0].load_state_dict(loaded["model"])
    fresh.optimizer.load_state_dict(loaded["optimizer"])
    resumed = [fresh.step(number) for number in range(2, 4)]
    assert all(x == x for x, _ in before)
    return [straight, resumed]


def _train(**options):
    tiny = Tiny(**options)
    return [tiny.step(number) for number in range(2)]


def _broadcast():
    import torch
    from megatron.core.tensor_parallel import broadcast_data

    return broadcast_data(["text"], {"text": torch.arange(4)}, torch.int64)["text"].tolist()


def _schedule_node():
    """A piece of a layer that frees its input, forward and backward."""
    import torch
    from megatron.core.pipeline_parallel import utils

    given = torch.ones(4, requires_grad=True)
    node = utils.ScheduleNode(lambda x: x * 3, utils.torch.cuda.Stream(), utils.torch.cuda.Event(), free_input=True)
    assert node.forward(given * 1).tolist() == [3.0] * 4
    return node.backward(torch.ones(4)).tolist()


def _rng_tracker():
    """Draws inside a fork are its own, draws outside are as if it had not been, and nothing is logged about it."""
    import logging

    import torch
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron").addHandler(handler)
    torch.manual_seed(5)
    expected = torch.rand(3).tolist()
    torch.manual_seed(5)
    with get_cuda_rng_tracker().fork():
        inside = torch.rand(3).tolist()
    assert not said, said
    assert inside != expected and torch.rand(3).tolist() == expected
    return inside


def _resume(directory, **options):
    straight, resumed = save_and_resume(directory, **options)
    assert straight == resumed, (straight, resumed)
    return straight


def _is_fused():
    import torch

    tiny = Tiny()
    inner = tiny.optimizer.chained_optimizers[0].optimizer
    assert isinstance(inner, torch.optim.AdamW) and inner.defaults["fused"], inner
    return "fused"


def _collectives_of_one_rank():
    """Nothing is sent where there is nobody to send to."""
    import torch

    tiny = Tiny()
    with torch.profiler.profile() as profile:
        tiny.step(0)
    names = {event.name for event in profile.events()}
    heavy = {name for name in names if "reduce_scatter" in name or "allgather" in name or "all_gather" in name}
    assert any("allreduce" in name for name in names), names  # the profiler does see collectives
    assert not heavy, heavy
    return "nothing sent"


def _groups_keep_their_parameters():
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    kind = {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}
    other = {**kind, "wd_mult": 0.0}
    current = [{**kind, "params": ["a"]}, {**kind, "params": ["b", "c"]}, {**other, "params": ["d"]}]
    saved = [{**group, "params": numbers} for group, numbers in zip(current, ([0], [1, 2], [3]), strict=True)]
    reorder = MegatronOptimizer._filter_and_reorder_param_groups
    assert [group["params"] for group in reorder(current, saved)] == [[0], [1, 2], [3]]
    turned = reorder(current[1:], saved[:0:-1])  # still brought into this order, where they can be told apart
    assert [(group["wd_mult"], group["params"]) for group in turned] == [(1.0, [3]), (0.0, [1, 2])]


def _clips_in_place():
    """The scaled gradients are where they were, right, and never exist twice."""
    import torch
    from megatron.core.utils import local_multi_tensor_scale

    size = 1 << 22
    gradient = torch.arange(float(size))
    with torch.profiler.profile(profile_memory=True) as profile:
        local_multi_tensor_scale(65536, None, [[gradient], [gradient]], 0.5)
    assert gradient[3] == 1.5
    most = max((event.cpu_memory_usage for event in profile.events()), default=0)
    assert most < size, f"{most} bytes were allocated"
    return "in place"


def _norm_is_not_read():
    """Every reading of a number is a wait for the device on a GPU; the values are those of the loop, bit for bit."""
    import torch
    from megatron.core.utils import local_multi_tensor_l2_norm

    gradients = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in (7, 500, 12345)]
    with torch.profiler.profile() as profile:
        norm, _ = local_multi_tensor_l2_norm(65536, None, [gradients], False)
    assert norm.shape == (1,) and norm.dtype == torch.float32
    assert norm.item() == torch.norm(torch.tensor([torch.norm(gradient).item() for gradient in gradients])).item()
    assert "aten::_local_scalar_dense" not in {event.name for event in profile.events()}
    return "not read"


#: redirect, or redirect/aspect -> what needs it; a case returns something or raises
CASES = {
    "cuda-names": lambda directory: _train(),
    "device-literals": lambda directory: _train(),
    "tensor-cuda": lambda directory: _broadcast(),
    "record-stream": lambda directory: _schedule_node(),
    "rng": lambda directory: _rng_tracker(),
    "distrib-optimizer-types": lambda directory: _train(),
    "float16-optimizer-types": lambda directory: _train(bf16=1, sharded=0),
    "clip-grads-types": lambda directory: _train(),
    "torch-adamw/state": lambda directory: _resume(directory),
    "torch-adamw/speed": lambda directory: _is_fused(),
    "adam-state-without-step": lambda directory: _resume(directory),
    "padded-buckets": lambda directory: _resume(directory, overlap=1),
    "groups-of-one-kind": lambda directory: _groups_keep_their_parameters(),
    "checkpoint-without-output": lambda directory: _train(recompute="layernorm"),
    "te-general-gemm": lambda directory: _train(moe=1),
    "single-rank": lambda directory: _collectives_of_one_rank(),
    "scale-in-place": lambda directory: _clips_in_place(),
    "norm-on-device": lambda directory: _norm_is_not_read(),
    "weight-gradient": lambda directory: _train(accumulates=1),
}


def _child(connection, case, without, directory):
    name = case.split("/")[0]
    try:
        from phd_megatron.runtime import mcore_fixes

        of_fixes = name in {row.name for row in mcore_fixes.REDIRECTS}
        start(skip=[name] if without and not of_fixes else [], fixes_skip=[name] if without and of_fixes else [])
        CASES[case](directory)
        connection.send("ok")
    except BaseException as error:
        connection.send(f"{type(error).__name__}: {error} {traceback.format_exc()[-2000:]}")


def try_redirects(directory):
    """Every case in its own process, forked after the slow imports: with all redirects, and without its own."""
    import megatron.core.distributed
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.optimizer  # noqa: F401

    context, results = multiprocessing.get_context("fork"), {}
    for index, name in enumerate(CASES):
        results[name] = []
        for without in (False, True):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_child, args=(theirs, name, without, Path(directory) / f"{index}{without}")
            )
            process.start()
            results[name].append(ours.recv() if ours.poll(300) else "hangs")
            process.join(1 if results[name][-1] == "hangs" else 60)
            if process.is_alive():
                process.kill()
    return results


def main():
    what, *rest = sys.argv[1:]
    if what == "redirects":
        print("RESULT", json.dumps(try_redirects(rest[0])), flush=True)
        return
    words = {key: value for key, value in (word.split("=") for word in rest)}
    skip = [words.pop("skip")] if "skip" in words else []
    directory, kind = words.pop("directory", None), words.pop("kind", "fully_reshardable")
    options = {key: value if key == "recompute" else int(value) for key, value in words.items()}
    names = {"tp": "tensor", "pp": "pipeline", "vpp": "virtual_pipeline", "ep": "expert"}
    sizes = {f"{names[key]}_model_parallel_size": options[key] for key in names if key in options}
    runtime = start(skip=skip, sequence_parallel=bool(options.get("sp")), **sizes)
    if what == "resume":
        result = save_and_resume(directory, kind, **options)
    else:
        tiny = Tiny(**options)
        result = [tiny.step(number) for number in range(3)]
    runtime.log("RESULT " + json.dumps(result))
    runtime.shutdown()


if __name__ == "__main__":
    main()
