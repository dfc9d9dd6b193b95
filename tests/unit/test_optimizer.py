"""Every option of optimizer, schedule and data-parallel wrapping arrives, and two updates are those of the formula.

What is expected is written out by hand. Each option is set to a value that is neither its default nor Megatron-Core's,
so that a dropped one shows; the last test holds that no option is missing here.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import OptimizerConfig, ParallelConfig, RunConfig
from phd_megatron.config.serialize import assign
from phd_megatron.runtime.context import Runtime

VOCAB, LENGTH, MICRO, BATCH = 50, 8, 2, 4
TINY: dict[str, Any] = {
    **{"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 24, "num_attention_heads": 2, "seq_length": LENGTH},
    **{"make_vocab_size_divisible_by": 10, "micro_batch_size": MICRO, "global_batch_size": BATCH, "device": "cpu"},
}


@pytest.fixture(scope="module")
def runtime() -> Any:
    with Runtime.start(ParallelConfig(device="cpu"), verbose=False) as started:
        yield started


def make_run(**values: Any) -> RunConfig:
    run = RunConfig()
    length = {} if "train_samples" in values else {"train_iters": 4}
    for name, value in {**TINY, **length, **values}.items():
        assign(run, name, value)
    resolve(run)
    return run


@pytest.mark.parametrize(("half", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), (None, torch.float32)])
def test_the_model_is_cast_where_half_precision_is_asked_for(
    runtime: Runtime, half: str | None, dtype: torch.dtype
) -> None:
    from phd_megatron.model.build import build_model
    from phd_megatron.training.optimizer import in_run_precision

    run = make_run(**({half: True} if half else {}))
    (model,) = in_run_precision(build_model(run, VOCAB, torch.device("cpu")), run)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def build(run: RunConfig) -> Any:
    """Wrapped model, optimizer and scheduler as a run has them, and the bare model as it was before any step."""
    from phd_megatron.model.build import build_model
    from phd_megatron.training.optimizer import build_optimizer, build_scheduler, wrap_data_parallel
    from phd_megatron.training.schedule import plan_schedule

    bare = build_model(run, VOCAB, torch.device("cpu"))
    untouched = build_model(run, VOCAB, torch.device("cpu"))[0]
    untouched.load_state_dict(bare[0].state_dict())
    models = wrap_data_parallel(bare, run)
    optimizer = build_optimizer(models, run)
    scheduler = build_scheduler(optimizer, run, plan_schedule(run, BATCH))
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return SimpleNamespace(
        models=models,
        optimizer=optimizer,
        scheduler=scheduler,
        untouched=untouched,
        config=parts[0].config,
        ddp=models[0].ddp_config,
        groups=optimizer.param_groups,
        kind=type(parts[0]).__name__,
    )


def facts(built: Any) -> dict[str, Any]:
    """What Megatron-Core was told, by the place that it was told at."""
    config, ddp, scheduler = built.config, built.ddp, built.scheduler
    each = {
        f"groups.{name}": {group[name] for group in built.groups}
        for name in ("betas", "eps", "max_lr", "min_lr", "lr", "wd_mult")
    }
    for source, place in ((config, "config"), (ddp, "ddp"), (scheduler, "scheduler")):
        each |= {f"{place}.{name}": value for name, value in vars(source).items()}
    return {**each, "groups": {(g["max_lr"], g["min_lr"], g["wd_mult"]) for g in built.groups}, "kind": built.kind}


#: options, and what must be found where
ARRIVES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Adam": (
        {"adam_beta1": 0.8, "adam_beta2": 0.7, "adam_eps": 1e-5, "clip_grad": 0.25, "weight_decay": 0.3},
        {
            **{"groups.betas": {(0.8, 0.7)}, "groups.eps": {1e-5}, "config.optimizer": "adam"},
            **{"config.adam_beta1": 0.8, "config.adam_beta2": 0.7, "config.adam_eps": 1e-5, "config.clip_grad": 0.25},
            **{"config.weight_decay": 0.3, "scheduler.start_wd": 0.3, "scheduler.end_wd": 0.3},
            **{"scheduler.wd_incr_style": "constant", "config.decoupled_weight_decay": True},
        },
    ),
    "no clipping": ({"clip_grad": 0.0}, {"config.clip_grad": 0.0}),
    "rates": (
        {"lr": 2e-2, "min_lr": 3e-3, "lr_decay_style": "linear", "lr_decay_iters": 3, "lr_warmup_init": 1e-3}
        | {"lr_warmup_iters": 2},
        {
            **{"groups": {(2e-2, 3e-3, 1.0), (2e-2, 3e-3, 0.0)}, "groups.lr": {1e-3}},
            **{"config.lr": 2e-2, "config.min_lr": 3e-3, "scheduler.max_lr": 2e-2, "scheduler.min_lr": 3e-3},
            **{"scheduler.init_lr": 1e-3, "scheduler.lr_warmup_steps": 2 * BATCH, "scheduler.lr_decay_steps": 12},
            **{"scheduler.lr_decay_style": "linear", "scheduler.wsd_decay_steps": None, "scheduler.num_steps": 0},
        },
    ),
    "lengths in samples": (
        {"train_samples": 40, "lr_decay_samples": 30, "lr_warmup_samples": 5, "lr_decay_style": "WSD"}
        | {"lr_wsd_decay_samples": 7, "lr_wsd_decay_style": "minus_sqrt"},
        {
            **{"scheduler.lr_warmup_steps": 5, "scheduler.lr_decay_steps": 30, "scheduler.wsd_decay_steps": 7},
            **{"scheduler.lr_wsd_decay_style": "minus_sqrt", "scheduler.wd_incr_steps": 40},
        },
    ),
    "other lengths": (
        {"lr_warmup_tokens": 3 * LENGTH - 1, "lr_decay_style": "WSD", "lr_wsd_decay_iters": 2},
        {
            **{"scheduler.lr_warmup_steps": 3, "scheduler.lr_decay_steps": 16, "scheduler.wsd_decay_steps": 8},
            **{"scheduler.lr_decay_style": "WSD", "scheduler.lr_wsd_decay_style": "exponential"},
        },
    ),
    "lengths that follow": (
        {"train_iters": 40},
        {
            **{"scheduler.lr_warmup_steps": 0, "scheduler.lr_decay_steps": 160, "scheduler.lr_decay_style": "cosine"},
            **{"scheduler.wd_incr_steps": 160, "scheduler.init_lr": 0.0},
        },
    ),
    "a share": ({"lr_warmup_fraction": 0.375, "lr_decay_iters": 2}, {"scheduler.lr_warmup_steps": 3}),
    "decoupled": (
        {"lr": 2e-2, "decoupled_lr": 1e-2, "decoupled_min_lr": 1e-4, "min_lr": 3e-3},
        {
            **{"groups": {(2e-2, 3e-3, 1.0), (2e-2, 3e-3, 0.0), (1e-2, 1e-4, 1.0)}, "groups.lr": {2e-2, 1e-2}},
            **{"config.decoupled_lr": 1e-2, "config.decoupled_min_lr": 1e-4},
        },
    ),
    "decay that grows": (
        {"start_weight_decay": 0.05, "end_weight_decay": 0.6, "weight_decay_incr_style": "cosine"},
        {
            **{"scheduler.start_wd": 0.05, "scheduler.end_wd": 0.6, "scheduler.wd_incr_style": "cosine"},
            **{"scheduler.wd_incr_steps": 16},
        },
    ),
    "all is decayed": ({"decay_norms": True}, {"groups.wd_mult": {1.0}}),
    "matrices are decayed": ({"decay_embeddings": False}, {"groups.wd_mult": {0.0, 1.0}}),
    "float32": (
        {"use_distributed_optimizer": False},
        {
            **{"config.bf16": False, "config.fp16": False, "config.params_dtype": torch.float32},
            **{"ddp.grad_reduce_in_fp32": False, "ddp.use_distributed_optimizer": False, "kind": "FP32Optimizer"},
            **{"config.use_distributed_optimizer": False, "config.overlap_param_gather": False},
            **{"ddp.overlap_grad_reduce": False, "ddp.overlap_param_gather": False, "ddp.align_param_gather": False},
            **{"ddp.fp8_param_gather": False, "config.fp8_recipe": None},
        },
    ),
    "bfloat16": (
        {"bf16": True},
        {
            **{"config.bf16": True, "config.fp16": False, "config.params_dtype": torch.bfloat16},
            **{"ddp.grad_reduce_in_fp32": True, "ddp.use_distributed_optimizer": True, "kind": "DistributedOptimizer"},
            **{"config.use_distributed_optimizer": True, "ddp.bucket_size": None},
        },
    ),
    "gradients in bfloat16": (
        {"bf16": True, "accumulate_allreduce_grads_in_fp32": False},
        {"ddp.grad_reduce_in_fp32": False},
    ),
    # For megatron the scale is of a mean over the 16 tokens of a micro-batch.
    "float16": (
        {"fp16": True, "loss_scale": 160.0, "initial_loss_scale": 320.0, "min_loss_scale": 32.0}
        | {"loss_scale_window": 7, "hysteresis": 3},
        {
            **{"config.fp16": True, "config.bf16": False, "config.params_dtype": torch.float16},
            **{"config.loss_scale": 10.0, "config.initial_loss_scale": 20.0, "config.min_loss_scale": 2.0},
            **{"config.loss_scale_window": 7, "config.hysteresis": 3, "ddp.grad_reduce_in_fp32": True},
        },
    ),
    "overlap": (
        {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 3000},
        {
            **{"ddp.overlap_grad_reduce": True, "ddp.overlap_param_gather": True, "config.overlap_param_gather": True},
            **{"ddp.bucket_size": 3000, "ddp.align_param_gather": False},
        },
    ),
    "only gradients overlap": (
        {"overlap_grad_reduce": True},
        {"ddp.overlap_grad_reduce": True, "ddp.overlap_param_gather": False, "config.overlap_param_gather": False},
    ),
}


@pytest.mark.parametrize("case", ARRIVES)
def test_options_arrive(runtime: Any, case: str) -> None:
    options, expected = ARRIVES[case]
    built = build(make_run(**options))
    found = facts(built)
    assert {place: found[place] for place in expected} == expected
    config = built.models[0].config
    assert config.grad_scale_func == built.optimizer.scale_loss
    assert (config.no_sync_func is not None) is options.get("overlap_grad_reduce", False)


#: with their own tests, where Megatron-Core has them: test_muon_step.py, test_skipped_steps.py
OF_NEWER = {name for name in OptimizerConfig.__dataclass_fields__ if name.startswith("muon_")}
OF_NEWER |= {"optimizer", "grad_norm_skip_threshold"}


def test_no_option_is_left_out() -> None:
    set_here = {name for options, _ in ARRIVES.values() for name in options} | OF_NEWER
    assert {field.name for field in dataclasses.fields(OptimizerConfig)} <= set_here
    others = {name for name, field in vars(RunConfig().training).items() if "scale" in name or name == "hysteresis"}
    assert others | {"bf16", "fp16", "accumulate_allreduce_grads_in_fp32"} <= set_here
    overlap = {name for name in vars(RunConfig().parallel) if name.startswith(("overlap_grad", "overlap_param", "ddp"))}
    assert len(overlap) == 3 and overlap | {"use_distributed_optimizer"} <= set_here


def batches(seed: int = 0, masked: bool = True) -> list[dict[str, torch.Tensor]]:
    """Two micro-batches, of which unlike numbers of tokens carry loss."""
    found = []
    for number in range(BATCH // MICRO):
        generator = torch.Generator().manual_seed(100 * seed + number)
        tokens = torch.randint(0, VOCAB, (MICRO, LENGTH + 1), generator=generator)
        mask = torch.ones(MICRO, LENGTH)
        if masked:
            mask[0, 2 : 5 + number] = 0.0
            mask[1, : 1 + 4 * number] = 0.0
        positions = torch.arange(LENGTH).expand(MICRO, -1)
        found.append({"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask, "position_ids": positions})
    return found


def hand_made_loss(model: Any, each: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, float]:
    """Masked sum of the cross-entropy, and the tokens in it: from logits, by torch."""
    total, tokens = torch.zeros(()), 0.0
    for batch in each:
        logits = model(input_ids=batch["tokens"], position_ids=batch["position_ids"], attention_mask=None)
        entropy = torch.nn.functional.cross_entropy(
            logits[..., :VOCAB].float().transpose(1, 2), batch["labels"], reduction="none"
        )
        total = total + (entropy * batch["loss_mask"]).sum()
        tokens += float(batch["loss_mask"].sum())
    return total, tokens


def stepper(built: Any) -> Any:
    from phd_megatron.training.megatron_engine import MegatronEngine
    from phd_megatron.training.step import Stepper

    return Stepper(MegatronEngine(built.models, built.optimizer), torch.device("cpu"), MICRO, LENGTH, 1)


def named(model: Any) -> dict[str, torch.nn.Parameter]:
    while hasattr(model, "module"):
        model = model.module
    return dict(model.named_parameters())


UPDATES: dict[str, dict[str, Any]] = {
    "clipped": {},
    "below the limit": {"clip_grad": 1e3},
    "never clipped": {"clip_grad": 0.0},
    "plain": {"use_distributed_optimizer": False},
    "norms": {"decay_norms": True, "decay_embeddings": False},
    "embeddings": {"decay_norms": False, "decay_embeddings": False},
    "all": {"decay_norms": True},
    "untied": {"decay_embeddings": False, "untie_embeddings_and_output_weights": True, "decoupled_lr": 0.5},
    "bf16": {"bf16": True},
    "bf16 plain": {"bf16": True, "use_distributed_optimizer": False},
    "overlap": {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 900},
}


@pytest.mark.parametrize("case", UPDATES)
def test_two_updates_are_those_of_the_formula(runtime: Any, case: str) -> None:
    """AdamW with bias correction and the clipping of the global norm, in float64, from the gradients of torch."""
    options = UPDATES[case]
    rates, decays, (beta1, beta2), eps = (0.2, 0.155), (0.1, 0.2), (0.6, 0.8), 1e-3
    run = make_run(
        **{"lr": 0.2, "min_lr": 0.02, "lr_decay_style": "linear", "weight_decay_incr_style": "linear"},
        **{"start_weight_decay": 0.1, "end_weight_decay": 0.5, "adam_beta1": beta1, "adam_beta2": beta2},
        **{"adam_eps": eps, "clip_grad": 0.05, "normalization": "LayerNorm", "add_bias_linear": True} | options,
    )
    half = run.training.bf16
    built = build(run)
    trainer, reference = stepper(built), built.untouched.float()
    if half:
        reference = None  # its gradients are taken from the buffers, as autograd's would be rounded elsewhere
    live = named(built.models[0])
    value = {name: parameter.detach().double().clone() for name, parameter in live.items()}
    first = {name: torch.zeros_like(v) for name, v in value.items()}
    second = {name: torch.zeros_like(v) for name, v in value.items()}
    for step in (1, 2):
        gradients: dict[str, torch.Tensor] = {}

        def keep(kept: dict[str, torch.Tensor] = gradients) -> None:
            kept.update({name: parameter.main_grad.double().clone() for name, parameter in live.items()})

        result = trainer.train(iter(batches(step)), BATCH // MICRO, [keep])
        if reference is not None:
            reference.zero_grad()
            total, tokens = hand_made_loss(reference, batches(step))
            (total / tokens).backward()
            assert result.loss.tolist() == pytest.approx([float(total), tokens], rel=1e-5)
            for name, parameter in reference.named_parameters():
                torch.testing.assert_close(gradients[name], parameter.grad.double(), rtol=1e-4, atol=1e-6)
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        assert result.grad_norm == pytest.approx(norm, rel=1e-5) and result.updated
        limit = run.optimizer.clip_grad
        factor = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
        assert (factor < 0.5) is (0 < limit < 10), "the limit is below what the gradients are, or far above"
        for name, gradient in gradients.items():
            g = factor * gradient
            first[name] = beta1 * first[name] + (1 - beta1) * g
            second[name] = beta2 * second[name] + (1 - beta2) * g**2
            direction = (first[name] / (1 - beta1**step)) / ((second[name] / (1 - beta2**step)).sqrt() + eps)
            rate, decay = rates[step - 1], decays[step - 1]
            if "word_embeddings" in name or "output_layer" in name:
                if run.optimizer.decoupled_lr:  # falls to min_lr = 0.02
                    rate = (0.5, 0.38)[step - 1]
                decay *= "output_layer" in name or run.optimizer.decay_embeddings
            elif gradient.dim() == 1:
                decay *= run.optimizer.decay_norms
            value[name] = value[name] - rate * (decay * value[name] + direction)
        for name, parameter in live.items():
            tolerance = {"rtol": 2**-8, "atol": 1e-4} if half else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(
                parameter.detach().double(), value[name], msg=lambda text, n=name: f"{n}: {text}", **tolerance
            )
        if reference is not None:
            with torch.no_grad():
                for name, parameter in reference.named_parameters():
                    parameter.copy_(value[name])
        built.scheduler.step(BATCH)


def test_an_evaluation_has_no_dropout_and_counts_what_carries_loss(runtime: Any) -> None:
    built = build(make_run(hidden_dropout=0.5))
    trainer, each = stepper(built), [*batches(1), *batches(2)]
    built.untouched.eval()
    with torch.no_grad():
        total, tokens = hand_made_loss(built.untouched, each)
    assert 0 < tokens < 4 * MICRO * LENGTH - 4
    for _ in range(2):
        found = trainer.evaluate(iter(each), 2, BATCH // MICRO)
        assert found.dtype == torch.float64 and found.tolist() == pytest.approx([float(total), tokens], rel=1e-5)
    assert all(module.training for module in built.models[0].modules()), "training goes on with dropout"
    trained = trainer.train(iter(each), 4)
    assert float(trained.loss[0]) != pytest.approx(float(total), rel=1e-3), "a step does have dropout"


@pytest.mark.parametrize("plain", [False, True], ids=["distributed", "plain"])
def test_gradients_that_are_written_or_measured_are_those_of_the_step(
    runtime: Any, tmp_path: Path, plain: bool
) -> None:
    """By the autograd of the bare model; a layer's norm is over its own parameters."""
    from phd_megatron.training.observers.gradient_dump import dump_gradients, iteration_place, load_gradients
    from phd_megatron.training.observers.layer_statistics import LayerStatistics

    built = build(make_run(use_distributed_optimizer=not plain, ddp_bucket_size=900))
    trainer = stepper(built)
    place = iteration_place(tmp_path, 12)
    assert place == tmp_path / "iter_0000012"
    statistics = LayerStatistics(built.models, trainer.groups, LENGTH)
    look = [lambda: dump_gradients(built.models, place, 0, trainer.groups.dp_cp), statistics.take_gradients]
    with statistics.watching():
        trainer.train(iter(batches()), BATCH // MICRO, look)
    total, tokens = hand_made_loss(built.untouched, batches())
    (total / tokens).backward()
    expected = {name: parameter.grad for name, parameter in built.untouched.named_parameters()}
    found = load_gradients(place)
    assert len(found) == len(expected) == 14
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6)
    squares = dict.fromkeys((1, 2), 0.0)
    for name, gradient in expected.items():
        if name.startswith("decoder.layers."):
            squares[int(name.split(".")[2]) + 1] += float(gradient.double().square().sum())
    norms = statistics.collect(2, 4.0)["gradient_norm"]
    assert norms == pytest.approx({number: square**0.5 / 4.0 for number, square in squares.items()}, rel=1e-4)
