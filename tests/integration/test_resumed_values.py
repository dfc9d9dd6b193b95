"""What a resumed run computes with: whose hyper-parameters, and which weights, by value.

The optimizer's groups are looked at as the real program built them, the weights as its checkpoints hold them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from phd_megatron.cli.main import main
from phd_megatron.huggingface.checkpoint import MegatronCheckpoint

from .conftest import TINY_MODEL, flags, read_metrics

pytestmark = pytest.mark.timeout(300)

STEPS, STOPPED = 8, 2
#: of the run that saves, and of the one that goes on
SAVED = {
    **{"lr": 1e-2, "min_lr": 1e-3, "adam_beta1": 0.85, "adam_beta2": 0.9, "adam_eps": 1e-6, "weight_decay": 0.2},
    **{"lr_decay_style": "linear", "clip_grad": 0.5, "decoupled_lr": 5e-3, "decoupled_min_lr": 5e-4},
}
GIVEN = {
    **{"lr": 2e-2, "min_lr": 4e-3, "adam_beta1": 0.6, "adam_beta2": 0.7, "adam_eps": 1e-4, "weight_decay": 0.3},
    **{"clip_grad": 0.25, "decoupled_lr": 8e-3, "decoupled_min_lr": 2e-3},
}
#: which of the two has the say, and what is found then: (max_lr, min_lr) -> decay, and the rate of step n of 8
SAID: dict[str, dict[str, Any]] = {
    "given": {
        **{"betas": (0.6, 0.7), "eps": 1e-4, "clip_grad": 0.25, "decay": 0.3},
        **{"rates": {(2e-2, 4e-3), (8e-3, 2e-3)}, "learning_rate": lambda n: 2e-2 - (2e-2 - 4e-3) * n / STEPS},
    },
    "saved": {
        **{"betas": (0.85, 0.9), "eps": 1e-6, "clip_grad": 0.5, "decay": 0.2},
        **{"rates": {(1e-2, 1e-3), (5e-3, 5e-4)}, "learning_rate": lambda n: 1e-2 - (1e-2 - 1e-3) * n / STEPS},
    },
}


def options(data: Path, **more: object) -> dict[str, object]:
    common = {
        **TINY_MODEL,
        **{"data-path": data, "micro-batch-size": 2, "global-batch-size": 4, "train-iters": STEPS, "eval-iters": 0},
        **{"log-interval": 1, "device": "cpu", "untie-embeddings-and-output-weights": True},
    }
    return {**common, **dashed(more)}


def dashed(values: dict[str, Any]) -> dict[str, object]:
    return {name.replace("_", "-"): value for name, value in values.items()}


@pytest.fixture(scope="module")
def saved(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = tmp_path_factory.mktemp("resumed") / "save"
    assert main(["pretrain", *flags(options(documents, **SAVED, save=save, exit_interval=STOPPED))]) == 0
    return save


@pytest.fixture
def at_the_first_step(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trainer of each run, and its groups and moments as they were when its first step began."""
    from phd_megatron.training import pretrain

    found: list[Any] = []
    train = pretrain.Trainer.train

    def look(trainer: Any, *args: Any) -> Any:
        optimizer = trainer.state.optimizer
        states = [state for part in optimizer.chained_optimizers for state in part.optimizer.state.values()]
        moments = {(float(state["step"]), bool(state["exp_avg_sq"].any())) for state in states}
        found.append((trainer, [{**group} for group in optimizer.param_groups], moments))
        return train(trainer, *args)

    monkeypatch.setattr(pretrain.Trainer, "train", look)
    return found


#: words of the resume, who has the say in the schedule (rates and decay), and who in the rest
RESUMES: dict[str, tuple[dict[str, object], str, str]] = {
    "what is given holds": (GIVEN, "given", "given"),
    "what is not given is inherited": ({}, "saved", "saved"),
    "the saved schedule is asked for": ({**GIVEN, "use_checkpoint_opt_param_scheduler": True}, "saved", "given"),
    "the other flag": ({**GIVEN, "override_opt-param_scheduler": True}, "given", "given"),
    "without the moments": ({**GIVEN, "no_load_optim": True}, "given", "given"),
    "with the plain optimizer": ({**GIVEN, "no_use_distributed_optimizer": True}, "given", "given"),
}


@pytest.mark.parametrize("case", RESUMES)
def test_whose_hyper_parameters_hold(saved: Path, tmp_path: Path, at_the_first_step: list[Any], case: str) -> None:
    words, schedule, rest = RESUMES[case]
    metrics = tmp_path / "metrics.jsonl"
    places = {"load": saved, "metrics_file": metrics}
    assert main(["pretrain", *flags(dashed({**places, **words}))]) == 0
    ((trainer, groups, moments),) = at_the_first_step
    assert moments <= ({(0.0, False)} if "no_load_optim" in words else {(float(STOPPED), True)})
    assert moments or "no_load_optim" in words
    rates, others = SAID[schedule], SAID[rest]
    assert {(group["max_lr"], group["min_lr"]) for group in groups} == rates["rates"]
    for group in groups:
        assert group["betas"] == others["betas"] and group["eps"] == others["eps"]
        assert group["weight_decay"] == rates["decay"] * group["wd_mult"]
        fallen = (group["max_lr"] - group["min_lr"]) * STOPPED / STEPS
        assert group["lr"] == pytest.approx(group["max_lr"] - fallen, rel=1e-9)
    assert {group["wd_mult"] for group in groups} == {0.0, 1.0}
    state = trainer.state
    for part in getattr(state.optimizer, "chained_optimizers", [state.optimizer]):
        assert part.config.clip_grad == others["clip_grad"]
    lines = read_metrics(metrics)
    assert [line["iteration"] for line in lines] == [*range(STOPPED + 1, STEPS + 1)]
    for line in lines:  # the rate of the next step
        assert line["learning_rate"] == pytest.approx(rates["learning_rate"](line["iteration"]), rel=1e-9)
    assert state.scheduler.num_steps == STEPS * 4 and state.counters.consumed_samples == STEPS * 4


@pytest.fixture(scope="module")
def half(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = tmp_path_factory.mktemp("bf16") / "save"
    words = options(documents, bf16=True, lr=1e-2, save=save, exit_interval=4, lr_decay_style="constant")
    assert main(["pretrain", *flags(words)]) == 0
    return save


def weights(save: Path) -> dict[str, torch.Tensor]:
    checkpoint = MegatronCheckpoint(save)
    return {key: checkpoint.read(key) for key in checkpoint.tensors if "_extra_state" not in key}


@pytest.mark.parametrize("plain", [False, True], ids=["distributed", "plain"])
@pytest.mark.parametrize("how", ["finetune", "no_load_optim"])
def test_a_step_in_bf16_starts_from_the_loaded_weights(half: Path, tmp_path: Path, how: str, plain: bool) -> None:
    """The optimizer's main parameters are copies: those made before the load would bring the initial weights back.

    A rate that changes nothing leaves every weight as it was loaded, bit for bit.
    """
    save, metrics = tmp_path / "save", tmp_path / "metrics.jsonl"
    more = {"load": half, "save": save, "metrics_file": metrics, how: True, "exit_interval": 2, "lr": 1e-30}
    if plain:
        more["no_use_distributed_optimizer"] = True
    assert main(["pretrain", *flags(dashed(more))]) == 0
    before, after = weights(half), weights(save)
    assert before.keys() == after.keys() and len(before) > 20
    for key, value in before.items():
        assert value.dtype == torch.bfloat16 and torch.equal(after[key], value), key
    assert [line["iteration"] for line in read_metrics(metrics)] == ([1, 2] if how == "finetune" else [5, 6])
