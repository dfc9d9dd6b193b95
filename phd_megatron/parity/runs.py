"""Run models over layouts with the real program, and compare each with its single-rank run.

All runs of one world size share one launch of torchrun: starting Python and Megatron takes longer than a small run.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import phd_megatron
from phd_megatron.config.catalog import fields
from phd_megatron.config.facts import SCHEDULE
from phd_megatron.config.layouts import SINGLE, Layout, microbatches
from phd_megatron.config.schema import CheckpointConfig, LoggingConfig, OptimizerConfig, RunConfig
from phd_megatron.config.serialize import dump_yaml
from phd_megatron.config.validate import require_for_pretraining
from phd_megatron.errors import UserError
from phd_megatron.parity.compare import FLOAT32, GRADIENTS, METRICS, STEPS, Comparison, Tolerance, compare
from phd_megatron.parity.worker import CONFIG, COUNTS, OUTCOME, Routing
from phd_megatron.runtime.environment import without_launcher
from phd_megatron.training.start import complete

#: the program of a rank, as torchrun takes it
WORKER = ("-m", "phd_megatron.parity.worker")
#: Adam's first update is g / (|g| + eps). With the usual 1e-8 it turns the rounding error of a gradient of that size,
#: which any other order of summation changes, into an update of the size of the learning rate, and later steps compare
#: noise.
ADAM_EPS = 1e-5
Log = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """What became of one layout of one model.

    Attributes:
        status: ``equal``, ``differs``, ``layout-dependent`` (differs, and the configuration says that it may),
            ``refused`` (it does not fit), or ``failed`` (the run ended otherwise).
        note: the reason, where there is one.
    """

    layout: str
    ranks: int
    status: str
    comparison: Comparison | None = None
    note: str = ""

    @property
    def is_bad(self) -> bool:
        """Whether it makes the command fail."""
        return self.status in ("differs", "failed")


@dataclass
class Case:
    """One run: a model in a layout, in a directory of its own.

    Attributes:
        routing: which experts are chosen, of a model whose choices are replayed.
        note: what it has to say about itself.
    """

    layout: Layout
    config: RunConfig
    directory: Path
    routing: Routing | None = None
    problem: str = ""
    refused: bool = False
    note: str = ""


def run_parity(
    models: Mapping[str, tuple[RunConfig, Sequence[Layout]]],
    work: Path,
    tolerances: Mapping[str, Tolerance],
    *,
    worker: Sequence[str] | None = None,
    log: Log = print,
    keep: bool = False,
    timeout: float | None = None,
) -> dict[str, list[Row]]:
    """Every layout of every model against one rank.

    Args:
        models: name -> configuration, not resolved, and layouts. The configuration's own layout, schedule, checkpoint
            and logging options are not used.
        work: an empty directory; the runs' files go there and are deleted when they have been compared, unless
            ``keep``.
        tolerances: of each model.
        worker: the program of a rank; default :data:`WORKER`.
        timeout: seconds of one launch.

    Returns:
        Rows of each model, in the order of its layouts.

    Raises:
        UserError: when a single-rank run is refused or fails.
    """
    cases = {name: _cases(name, config, layouts, work, tolerances[name]) for name, (config, layouts) in models.items()}
    everything = [case for group in cases.values() for case in group]
    rows: dict[tuple[str, str], Row] = {}
    for ranks in sorted({case.layout.ranks for case in everything}):
        due = [case for case in everything if case.layout.ranks == ranks]
        for case in due:
            _check(case)
        ready = [case for case in due if not case.refused]
        if ready:
            log(f"{len(ready)} run{'s' * (len(ready) > 1)} of {ranks} rank{'s' * (ranks > 1)}: {_names(ready)}")
            _run(ready, ranks, work, worker or WORKER, timeout)
        for name, (reference, *others) in cases.items():
            if reference in due and (reference.refused or reference.problem):
                of = f" of {name}" if name else ""
                raise UserError(f"the single-rank run{of} cannot be compared with: {reference.problem}")
            for case in others:
                if case in due:
                    rows[name, case.layout.name] = _row(case, reference, tolerances[name])
                    if not keep:
                        shutil.rmtree(case.directory, ignore_errors=True)
    return {name: [rows[name, case.layout.name] for case in group[1:]] for name, group in cases.items()}


def fixed_steps(base: RunConfig, layouts: Sequence[Layout]) -> RunConfig:
    """``base`` as a run of a few steps that touches none of its files, with the same batches in all layouts.

    The learning rate is constant, so that every step changes the parameters, Adam's epsilon at least
    :data:`ADAM_EPS`, and muon's products are in float32.
    """
    config = copy.deepcopy(base)
    config.checkpoint, config.logging = CheckpointConfig(), LoggingConfig(log_interval=1, progress="off")
    size = config.training.micro_batch_size * microbatches(layouts)
    config.training = dataclasses.replace(
        config.training,
        global_batch_size=size,
        rampup_batch_size=None,
        train_iters=STEPS,
        train_samples=None,
        eval_iters=0,
        evals_per_run=None,
        exit_interval=None,
        exit_duration_in_mins=None,
    )
    own = vars(config.optimizer)
    kept = {name: value for name, value in own.items() if SCHEDULE not in fields()[name].groups}
    kept |= {"lr": own["lr"], "weight_decay": own["weight_decay"], "lr_decay_style": "constant"}
    if kept["optimizer"] == "muon":
        kept["muon_fp32_matmul_prec"] = "highest"  # its bfloat16 would be what is compared
    config.optimizer = OptimizerConfig(**{**kept, "adam_eps": max(kept["adam_eps"], ADAM_EPS)})
    config.data.data_horizon_samples = None
    return config


def _cases(name: str, base: RunConfig, layouts: Sequence[Layout], work: Path, tolerance: Tolerance) -> list[Case]:
    shared = fixed_steps(base, layouts)
    replayed = tolerance is not FLOAT32 and has_replayable_routing(base)
    shared.data.data_cache_path = str(work / "cache")
    cases = []
    for layout in (SINGLE, *layouts):
        directory = work / name / layout.name
        config = layout.apply(shared)
        config.logging.metrics_file = str(directory / METRICS)
        config.logging.dump_gradients_dir = str(directory / GRADIENTS)
        routing: Routing | None = None
        if replayed:
            routing = {"directory": str(work / name / "routing"), "record": layout is SINGLE}
        cases.append(Case(layout, config, directory, routing))
    return cases


def has_replayable_routing(config: RunConfig) -> bool:
    """Whether the ranks of a layout can be given the experts that one rank chose.

    Where float32 rounds otherwise two scores are hardly ever close enough to change places; in half precision a few
    are, and the layouts then train on other experts.
    """
    extra = config.model.transformer
    return extra.get("num_moe_experts") is not None and not extra.get("moe_router_fusion")


def _check(case: Case) -> None:
    """Refuse what can be refused without starting a rank."""
    from phd_megatron.model.transformer_config import build_transformer_config

    trial = copy.deepcopy(case.config)
    try:
        require_for_pretraining(trial)
        complete(trial, case.layout.ranks)
        build_transformer_config(trial)
    except UserError as error:
        case.problem, case.refused = str(error), True
        return
    case.directory.mkdir(parents=True)
    dump_yaml(case.config, case.directory / CONFIG)


def _run(cases: list[Case], ranks: int, work: Path, worker: Sequence[str], timeout: float | None) -> None:
    """Run the cases; where one takes the launch down, it has failed and the others get a new launch."""
    waiting = list(cases)
    while waiting:
        due = [
            {"directory": str(case.directory), "device": case.config.parallel.device, "routing": case.routing}
            for case in waiting
        ]
        (work / "cases.json").write_text(json.dumps(due), encoding="utf-8")
        output = _launch([*worker, str(work / "cases.json")], ranks, work / "output.txt", timeout)
        while waiting and _has_ended(waiting[0], ranks):
            waiting.pop(0)
        if waiting:
            waiting.pop(0).problem = output or "the ranks ended without a word"


def _launch(program: list[str], ranks: int, output: Path, timeout: float | None) -> str:
    """Start torchrun and wait for it. What it printed last."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *program]
    variables = without_launcher(os.environ)
    variables.setdefault("PYTHONFAULTHANDLER", "1")  # a rank that crashes says where
    variables["PYTHONSAFEPATH"] = "1"  # the folder kernels/ of a checkout would hide another package
    root = str(Path(phd_megatron.__file__).parents[1])
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):  # a checkout
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [root, variables.get("PYTHONPATH")]))
    with output.open("w", encoding="utf-8") as stream:
        try:
            subprocess.run(command, env=variables, stdout=stream, stderr=subprocess.STDOUT, timeout=timeout)
        except subprocess.TimeoutExpired:
            stream.write(f"\nstopped after {timeout} s")
    return output.read_text(encoding="utf-8", errors="replace")[-3000:]


def _has_ended(case: Case, ranks: int) -> bool:
    outcomes = [case.directory / OUTCOME.format(rank=rank) for rank in range(ranks)]
    if not all(path.is_file() for path in outcomes):
        return False
    said = [json.loads(path.read_text(encoding="utf-8")) for path in outcomes]
    case.problem = next(filter(None, (outcome.get("refused") for outcome in said)), "")
    case.refused = bool(case.problem)
    if case.routing and not case.routing["record"] and not case.problem:
        rows, changed, gap = zip(*([outcome[name] for name in COUNTS] for outcome in said), strict=True)
        case.note = (
            f"took the experts that one rank chose; {sum(changed)} of {sum(rows)} rows would have gone to others "
            f"(scores closer than {max(gap):.1e})"
        )
    return True


def _row(case: Case, reference: Case, tolerance: Tolerance) -> Row:
    layout = case.layout
    if case.problem:
        return Row(layout.name, layout.ranks, "refused" if case.refused else "failed", note=case.problem)
    try:
        comparison = compare(reference.directory, case.directory, tolerance)
    except ValueError as error:
        return Row(layout.name, layout.ranks, "failed", note=str(error))
    if comparison.within(tolerance):
        return Row(layout.name, layout.ranks, "equal", comparison, case.note)
    reason = layout_dependent(case.config)
    note = "; ".join(filter(None, (reason, case.note)))
    return Row(layout.name, layout.ranks, "layout-dependent" if reason else "differs", comparison, note)


def layout_dependent(config: RunConfig) -> str:
    """Why numbers of this configuration may depend on the layout; empty when they may not."""
    extra = config.model.transformer
    balancing = extra.get("moe_router_load_balancing_type")
    reasons = {
        f"hidden_dropout={config.model.hidden_dropout} draws from a stream of each rank": config.model.hidden_dropout,
        f"attention_dropout={config.model.attention_dropout} draws from a stream of each rank": (
            config.model.attention_dropout
        ),
        "the global auxiliary loss counts the tokens of the micro-batches that run at once": (
            "global_aux_loss" in (balancing if isinstance(balancing, list) else [balancing])
        ),
        "moe_expert_capacity_factor drops tokens among those that meet on a rank": extra.get(
            "moe_expert_capacity_factor"
        ),
        f"moe_input_jitter_eps={extra.get('moe_input_jitter_eps')} draws from a stream of each rank": extra.get(
            "moe_input_jitter_eps"
        ),
    }
    return "; ".join(reason for reason, applies in reasons.items() if applies)


def _names(cases: Sequence[Case]) -> str:
    names = list(dict.fromkeys(case.layout.name for case in cases))
    return ", ".join(names)
