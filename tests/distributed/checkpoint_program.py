"""A tiny training run under torchrun, for test_checkpointing.py: trains, saves, resumes, and misbehaves on request.

Prints one line ``RESULT {json}`` per rank: losses as hex floats, digests of parameters and of optimizer state, step
counts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from phd_megatron.checkpoint.store import read_tracker
from phd_megatron.config.schema import ParallelConfig, RunConfig
from phd_megatron.errors import UserError
from phd_megatron.runtime.context import Runtime

SLOW = threading.Event()  # lets the writer of the faults "slow" and "kill-while-writing" go on


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--plain-optimizer", action="store_true")
    parser.add_argument("--overlap", action="store_true")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--save")
    parser.add_argument("--save-at", type=int, nargs="*", default=[])
    parser.add_argument("--load")
    parser.add_argument("--keep-last", type=int)
    parser.add_argument("--background", action="store_true")
    faults = [
        "kill-before-commit",
        "kill-before-tracker",
        "file-size",
        "full",
        "slow",
        "kill-while-writing",
        "nan",
        "large",
    ]
    parser.add_argument("--fault", choices=faults)
    parser.add_argument("--fault-at", type=int, default=0)
    parser.add_argument("--fault-rank", type=int, default=0)
    parser.add_argument("--refusals", type=json.loads, help="list of {load, layers, hidden, ...}: try each, print why")
    parser.add_argument("--sleep", type=float, default=0.0)
    return parser.parse_args()


def build(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    config = TransformerConfig(
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_attention_heads=4,
        tensor_model_parallel_size=args.tp,
        pipeline_model_parallel_size=args.pp,
        pipeline_dtype=torch.bfloat16 if args.bf16 else torch.float32,
        hidden_dropout=0.1,  # so that a lost random-number state shows
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        bf16=args.bf16,
        params_dtype=torch.bfloat16 if args.bf16 else torch.float32,
        gradient_accumulation_fusion=False,
    )
    model: Any = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=64,
        max_sequence_length=16,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    if args.bf16:
        model = Float16Module(config, model)
    distributed = not args.plain_optimizer
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=distributed,
        overlap_grad_reduce=args.overlap,
        overlap_param_gather=args.overlap,
        bucket_size=3000 if args.overlap else None,
        grad_reduce_in_fp32=True,
    )
    model = DistributedDataParallel(config, ddp_config, model)
    model.broadcast_params()
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            lr=1e-2,
            min_lr=1e-3,
            use_distributed_optimizer=distributed,
            overlap_param_gather=args.overlap,
            clip_grad=1.0,
            bf16=args.bf16,
            weight_decay=0.1,
            params_dtype=torch.bfloat16 if args.bf16 else torch.float32,
        ),
        [model],
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=1e-2,
        min_lr=1e-3,
        lr_warmup_steps=4,
        lr_decay_steps=40,
        lr_decay_style="cosine",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return model, optimizer, scheduler


def train_step(args: argparse.Namespace, model: Any, optimizer: Any, scheduler: Any, step: int) -> float:
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config

    config = get_model_config(model)
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    generator = torch.Generator().manual_seed(1000 * step + parallel_state.get_data_parallel_rank())
    tokens = torch.randint(0, 64, (2, 17), generator=generator)

    def forward(_: Any, chunk: Any) -> Any:
        position = torch.arange(16).expand(2, 16)
        mask = torch.ones(1, 1, 16, 16, dtype=torch.bool).triu(1)
        output = chunk(tokens[:, :-1], position, mask, labels=tokens[:, 1:])
        return output, lambda loss: (loss.float().mean(), {"loss": loss.float().mean().detach()})

    model.zero_grad_buffer()
    optimizer.zero_grad()
    losses = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=None,
        model=[model],
        num_microbatches=1,
        seq_length=16,
        micro_batch_size=2,
        forward_only=False,
    )
    optimizer.step()
    scheduler.step(increment=1)
    return float(losses[0]["loss"]) if losses else 0.0


def digest(tensors: Any) -> str:
    """Of all values, whatever the order of the tensors: kinds of optimizers have orders of their own."""
    each = [hashlib.sha256(t.detach().contiguous().view(torch.uint8).numpy().tobytes()).digest() for t in tensors]
    return hashlib.sha256(b"".join(sorted(each))).hexdigest()[:16]


class Letters:
    """Stands in for a tokenizer."""

    def save(self, directory: Path) -> None:
        (directory / "tokenizer.json").write_text("{}")


def install_fault(fault: str | None, step: int) -> None:
    from phd_megatron.checkpoint import store

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if fault == "kill-before-commit":
        store.commit_iteration = die
    elif fault == "kill-before-tracker":
        write_tracker = store.write_tracker
        # an earlier save may still be under way in the background
        store.write_tracker = lambda root, iteration: die() if iteration == step else write_tracker(root, iteration)
    elif fault in ("slow", "kill-while-writing"):
        from phd_megatron.checkpoint import writer as checkpoint_writer

        original = checkpoint_writer.ShardWrite.write

        def wait(write: Any) -> None:
            SLOW.wait(600)  # until training has gone on for two steps
            if fault == "kill-while-writing":
                (write._directory / "__0_0.distcp").write_bytes(b"half")
                die()
            original(write)

        checkpoint_writer.ShardWrite.write = wait  # type: ignore[method-assign]
    elif fault == "file-size":
        # what a quota or a full disk looks like to the writer: write() fails half-way through a file
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    elif fault == "full":
        import shutil

        shutil.disk_usage = lambda _: shutil._ntuple_diskusage(100, 90, 10)  # type: ignore[attr-defined]


def try_refusals(args: argparse.Namespace, runtime: Runtime) -> None:
    """Load each described checkpoint into a model of its own and print the refusal."""
    from phd_megatron.checkpoint.load import load_checkpoint

    for case in args.refusals:
        variant = argparse.Namespace(**{**vars(args), **case})
        model, optimizer, scheduler = build(variant)
        before = digest(model.parameters())
        try:
            objects = {"models": [model], "optimizer": optimizer, "scheduler": scheduler, "runtime": runtime}
            load_checkpoint(case["load"], verify=not case.get("no_verify"), **objects)
            message = "loaded"
        except UserError as error:
            message = str(error)
            verified = (Path(case["load"]) / "checksums.json").exists()
            assert not verified or digest(model.parameters()) == before, "refused, and yet something was loaded"
        print("REFUSAL " + json.dumps(message), flush=True)


def main() -> None:
    args = parse()
    parallel = ParallelConfig(tensor_model_parallel_size=args.tp, pipeline_model_parallel_size=args.pp, device="cpu")
    runtime = Runtime.start(parallel, verbose=False)
    from phd_megatron.checkpoint.load import find_checkpoint, load_checkpoint, lock_save_dir
    from phd_megatron.checkpoint.run_directory import claim
    from phd_megatron.checkpoint.saver import CheckpointSaver
    from phd_megatron.runtime.launcher import die_with_launcher
    from phd_megatron.training.signals import ExitController

    die_with_launcher()
    if args.refusals:
        try_refusals(args, runtime)
        return
    result: dict[str, Any] = {"rank": runtime.rank, "losses": [], "exit": None, "tracker": []}
    lock = lock_save_dir(args.save) if args.save else None
    model, optimizer, scheduler = build(args)
    start, found = 0, None
    if args.load:
        found = find_checkpoint(args.load, log=runtime.log, save_dir=args.save)
        if found is not None:
            objects = {"models": [model], "optimizer": optimizer, "scheduler": scheduler, "runtime": runtime}
            state = load_checkpoint(found, **objects)
            start = state["iteration"]
            assert state["consumed_samples"] == 4 * start
    result["start"] = start
    options = {"models": [model], "optimizer": optimizer, "scheduler": scheduler, "background": args.background}
    saver = (
        CheckpointSaver(
            args.save,
            run_config=RunConfig(),
            tokenizer=Letters(),
            runtime=runtime,
            keep_last=args.keep_last,
            place=claim(args.save, lock, resume_from=found, log=runtime.log),
            loaded=found,
        )
        if args.save
        else None
    )
    with ExitController() as exits:
        for step in range(start + 1, args.steps + 1):
            result["losses"].append(train_step(args, model, optimizer, scheduler, step).hex())
            result["exit"] = exits.should_exit(step)
            if saver and (step in args.save_at or result["exit"]):
                if step == args.fault_at and runtime.rank == args.fault_rank:
                    install_fault(args.fault, step)
                    if args.fault == "nan":
                        list(model.parameters())[-1].data.view(-1)[-1] = float("nan")
                if args.fault == "large" and step >= args.fault_at and runtime.rank == args.fault_rank:
                    list(model.parameters())[-1].data.view(-1)[-1] = 1e30
                state = {"consumed_samples": 4 * step}
                saver.save(iteration=step, training_state=state, patient=True, **options)
            elif saver:
                if args.fault == "slow" and runtime.rank != args.fault_rank:
                    saver.close()  # this rank has surely written, and the other has surely not
                saver.poll()
            result["tracker"].append(read_tracker(args.save) if args.save else None)
            if result["exit"]:
                break
            if step >= args.fault_at + 2:
                SLOW.set()
            if args.sleep:
                print(f"step {step}", flush=True)
                time.sleep(args.sleep)
    if saver:
        saver.wait()
    if args.overlap:
        model.disable_forward_pre_hook(param_sync=True)
    inner = [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]
    states = [value for part in inner for value in part.state.values()]
    result["parameters"] = digest(model.parameters())
    result["main_parameters"] = digest(p for part in inner for group in part.param_groups for p in group["params"])
    result["moments"] = [digest(state[key] for state in states) for key in ("exp_avg", "exp_avg_sq")]
    result["adam_steps"] = sorted({float(state["step"]) for state in states})
    result["num_steps"] = scheduler.num_steps
    sys.stdout.write("RESULT " + json.dumps(result) + "\n")
    sys.stdout.flush()
    if lock is not None:
        lock.release()
    runtime.barrier()
    runtime.shutdown()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.stdout.write(f"error: {error}\n")  # one write: torchrun's -u makes print two, and two ranks' lines mix
        sys.stdout.flush()
        os._exit(2)
