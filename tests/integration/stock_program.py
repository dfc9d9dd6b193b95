"""Megatron-Core's own GPT model, optimizer and checkpoints, and nothing of ours but the CPU backend and the samples.

``python stock_program.py JOBS.json``: each job trains some steps and saves as Megatron-LM, as Megatron-Bridge or as
bare Megatron-Core does, or loads what an export wrote. Prints ``RESULT`` and a list: of each job the ``losses`` of all
steps in training, and those that the saved or loaded parameters have on each step's samples, ``evaluated``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml

VOCAB, SEQUENCE, BATCH, STEPS, LR = 272, 24, 8, 6, 5e-3
DENSE: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-6,
    "gated_linear_unit": True,
    "add_bias_linear": False,
}
EXPERTS: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_router_dtype": "fp32",
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "none",
}
#: fields of TransformerConfig, and options of GPTModel below "gpt"
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**DENSE, "gpt": {"rotary_base": 500000}},
    "qwen3": {**DENSE, "qk_layernorm": True, "kv_channels": 12, "gpt": {"tied": True, "rotary_base": 1000000}},
    "experts": {**DENSE, **EXPERTS, "moe_layer_freq": 1, "gpt": {}},
    "some-experts": {
        **{**DENSE, **EXPERTS, "moe_layer_freq": [0, 1, 1, 1], "moe_shared_expert_intermediate_size": 16},
        **{"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "gpt": {}},
    },
}


class Stock:
    """A model with its optimizer, and the samples that a run of ours would train on."""

    def __init__(self, name: str, data: str, plain: bool = False, bf16: bool = False) -> None:
        import torch
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
        from megatron.core.transformer import TransformerConfig
        from megatron.core.transformer.module import Float16Module

        torch.manual_seed(7)
        model_parallel_cuda_manual_seed(7)
        self.fields = {key: value for key, value in MODELS[name].items() if key != "gpt"}
        self.gpt = {"tied": False, "rotary_base": 10000, **MODELS[name]["gpt"]}
        self.config = TransformerConfig(
            **self.fields,
            activation_func=torch.nn.functional.silu,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            calculate_per_token_loss=True,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
        )
        if isinstance(self.fields.get("moe_layer_freq"), list):
            spec = get_gpt_decoder_block_spec(self.config, use_transformer_engine=False, normalization="RMSNorm")
        else:
            experts = self.fields.get("num_moe_experts")
            qk = self.fields.get("qk_layernorm", False)
            spec = get_gpt_layer_local_spec(num_experts=experts, qk_layernorm=qk, normalization="RMSNorm")
        self.model = GPTModel(
            self.config,
            spec,
            vocab_size=VOCAB,
            max_sequence_length=SEQUENCE,
            position_embedding_type="rope",
            rotary_base=self.gpt["rotary_base"],
            share_embeddings_and_output_weights=self.gpt["tied"],
        )
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=not plain, grad_reduce_in_fp32=bf16)
        inner = Float16Module(self.config, self.model) if bf16 else self.model
        self.chunk = DistributedDataParallel(self.config, ddp, inner)
        options = OptimizerConfig(
            optimizer="adam",
            lr=LR,
            min_lr=0.0,
            weight_decay=0.0,
            adam_beta2=0.95,
            clip_grad=1.0,
            bf16=bf16,
            params_dtype=self.config.params_dtype,
            use_distributed_optimizer=not plain,
        )
        self.optimizer = get_megatron_optimizer(options, [self.chunk])
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=LR,
            min_lr=0.0,
            lr_warmup_steps=2 * BATCH,
            lr_decay_steps=STEPS * BATCH,
            lr_decay_style="linear",
            start_wd=0.0,
            end_wd=0.0,
            wd_incr_steps=STEPS * BATCH,
            wd_incr_style="constant",
        )
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.schedule = get_forward_backward_func()
        self.samples = samples(data)

    def loss(self, number: int, *, train: bool = True) -> float:
        """Mean over the tokens of step ``number``, after which the model is trained on it."""
        import torch

        self.chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

        def loss_function(output):
            total, count = output.float().sum(), torch.tensor(output.numel(), dtype=torch.int)
            return total, count, {"lm": torch.stack([total.detach(), count.float()])}

        def forward(iterator, model):
            sample = next(iterator)
            tokens, labels, positions = (sample[name][None] for name in ("tokens", "labels", "position_ids"))
            return model(tokens, positions, None, labels=labels), loss_function

        reports = self.schedule(
            forward_step_func=forward,
            data_iterator=iter([self.samples[number * BATCH + index] for index in range(BATCH)]),
            model=self.chunk,
            num_microbatches=BATCH,
            seq_length=SEQUENCE,
            micro_batch_size=1,
            forward_only=not train,
        )
        if train:
            assert self.optimizer.step()[0]
            self.scheduler.step(BATCH)
        total, count = sum(report["lm"] for report in reports)
        return float(total / count)

    def metadata(self, kind: str) -> dict[str, Any]:
        from megatron.core import parallel_state

        return {
            "distrib_optim_sharding_type": kind,
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }

    def save(self, directory: Path, iteration: int, writer: str, kind: str) -> None:
        import torch
        from megatron.core import dist_checkpointing
        from megatron.core.transformer.enums import AttnBackend

        metadata = self.metadata(kind)
        model = self.model.sharded_state_dict(metadata=metadata)
        state: dict[str, Any] = {"model": model}
        state["optimizer"] = self.optimizer.sharded_state_dict(dict(state), metadata=metadata)
        state["opt_param_scheduler"] = self.scheduler.state_dict()
        path = directory / f"iter_{iteration:07d}"
        path.mkdir(parents=True)
        if writer != "core":
            state |= {"checkpoint_version": 3.0, "iteration": iteration}
        if writer == "megatron-lm":
            words = {"norm_epsilon": "layernorm_epsilon", "swiglu": "gated_linear_unit"}
            words |= {"num_experts": "num_moe_experts"}
            said = {**self.fields, **{theirs: self.fields.get(name) for theirs, name in words.items()}}
            state["args"] = argparse.Namespace(
                **said,
                group_query_attention=True,
                rotary_base=self.gpt["rotary_base"],
                rotary_percent=1.0,
                position_embedding_type="rope",
                untie_embeddings_and_output_weights=not self.gpt["tied"],
                consumed_train_samples=iteration * BATCH,
                global_batch_size=BATCH,
                attention_backend=AttnBackend.auto,
                params_dtype=torch.float32,
                data_path=[Path("/data/of/others")],
            )
        dist_checkpointing.save(
            state, str(path), content_metadata={key: value for key, value in metadata.items() if key != "dp_cp_group"}
        )
        if writer == "bridge":
            said = {"_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider", **self.fields}
            said |= {"rotary_base": self.gpt["rotary_base"], "share_embeddings_and_output_weights": self.gpt["tied"]}
            config = {"_target_": "megatron.bridge.training.config.ConfigContainer", "model": said}
            config["train"] = {"_target_": "megatron.bridge.training.config.TrainingConfig", "global_batch_size": BATCH}
            (path / "run_config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
            place = {"step": iteration, "consumed_train_samples": iteration * BATCH, "skipped_train_samples": 0}
            torch.save(
                {name: torch.tensor(value, dtype=torch.int32) for name, value in place.items()}, path / "train_state.pt"
            )
        (directory / "latest_checkpointed_iteration.txt").write_text(str(iteration), encoding="utf-8")

    def load(self, directory: Path) -> None:
        from megatron.core import dist_checkpointing

        state = {"model": self.model.sharded_state_dict(metadata=self.metadata("fully_reshardable"))}
        loaded = dist_checkpointing.load(state, str(directory), strict="raise_unexpected")
        self.model.load_state_dict(loaded["model"])


def samples(data: str) -> Any:
    """Those of a run of ours over STEPS steps."""
    from phd_megatron.config.schema import RunConfig
    from phd_megatron.data.datasets import build_datasets, resolve_tokenizer

    run = RunConfig()
    run.data.data_path = [data]
    run.model.seq_length = SEQUENCE
    found = build_datasets(run, resolve_tokenizer(run), (STEPS * BATCH, 0, 0))[0]
    assert found is not None
    return found


def work(job: dict[str, Any]) -> dict[str, list[float]]:
    """``model``, ``data``; ``load`` an export, or train ``steps``, ``save`` and train to the end."""
    stock = Stock(job["model"], job["data"], plain=job.get("plain", False), bf16=job.get("bf16", False))
    if "load" in job:
        stock.load(Path(job["load"]))
        return {"evaluated": [stock.loss(number, train=False) for number in range(STEPS)]}
    done = job["steps"]
    losses = [stock.loss(number) for number in range(done)]
    stock.save(Path(job["save"]), done, job["writer"], job.get("kind", "fully_reshardable"))
    evaluated = [stock.loss(number, train=False) for number in range(STEPS)]
    return {"losses": losses + [stock.loss(number) for number in range(done, STEPS)], "evaluated": evaluated}


def main() -> None:
    from phd_megatron.config.schema import ParallelConfig
    from phd_megatron.runtime import cpu_backend
    from phd_megatron.runtime.context import Runtime

    cpu_backend.install()
    results = []
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        with Runtime.start(ParallelConfig(device="cpu"), config={}):
            results.append(work(job))
    print("RESULT", json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
