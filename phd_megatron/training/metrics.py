"""What a run reports: Megatron's log line, a JSON line per step, TensorBoard, Weights & Biases, live progress."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeAlias

from phd_megatron.config.plain import Plain
from phd_megatron.config.schema import LoggingConfig, RunConfig
from phd_megatron.config.serialize import to_dict
from phd_megatron.console.terminal import say
from phd_megatron.errors import UserError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Value: TypeAlias = float | str | Sequence[float] | Mapping[int, "Value"] | Mapping[str, "Value"] | None
"""What stands in a row of metrics under one name: a number, or a table, such as of layer number to value."""
Row: TypeAlias = dict[str, Value]


@dataclass
class StepMetrics:
    """One logged step; averages over the steps since the last one. Field names are those of ``--metrics-file``."""

    iteration: int
    consumed_samples: int
    consumed_tokens: int  #: original ones
    consumed_flops: float  #: by :mod:`phd_megatron.planning.flops`, of all ranks together
    lm_loss: float
    grad_norm: float
    learning_rate: float
    global_batch_size: int
    iteration_seconds: float
    tokens_per_second: float
    processed_tokens_per_second: float
    tflops_per_gpu: float
    mfu: float | None
    skipped_iterations: int
    validation_loss: float | None = None
    observed: Mapping[str, Value] = field(default_factory=dict)  #: by observers; its entries stand beside the others


class Reporter:
    """Writes metrics on the main rank and nothing elsewhere.

    Args:
        options: the logging section.
        enabled: true on one rank.
        total_iterations: for the log line and the progress bar.
        default_tensorboard_dir: used when the options name none.
        run_id: whose rows those of the metrics file are (:func:`run_of_rows`); None leaves it out.
        write: prints a line (a live display moves aside for it).
    """

    def __init__(
        self,
        options: LoggingConfig,
        enabled: bool,
        total_iterations: int,
        run_values: Mapping[str, Plain],
        default_tensorboard_dir: Path | None,
        run_id: str | None = None,
    ) -> None:
        self._run_id = run_id
        self.enabled = enabled
        self.total_iterations = total_iterations
        self._sinks: list[Callable[[Row], None]] = []
        self._closers: list[Callable[[], None]] = []
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        if not enabled:
            return
        if options.metrics_file:
            self._open_metrics_file(Path(options.metrics_file))
        directory = options.tensorboard_dir or (default_tensorboard_dir and str(default_tensorboard_dir))
        if directory:
            self._open_tensorboard(directory, asked_for=options.tensorboard_dir is not None)
        if options.wandb_project:
            self._open_wandb(options, run_values)
        if options.progress == "on" or (options.progress == "auto" and sys.stdout.isatty()):
            self._open_progress()

    def log(self, message: str) -> None:
        """One line on the main rank."""
        if not self.enabled:
            return
        if self._progress is not None:
            try:
                self._progress.console.print(message, markup=False, highlight=False, soft_wrap=True)
                return
            except OSError:  # no room, or the terminal is lost
                self._progress = None
        say(message)

    def advance(self, iteration: int) -> None:
        """Move the live display."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=iteration)

    def report(self, metrics: StepMetrics) -> None:
        """Write one step everywhere."""
        if not self.enabled:
            return
        self.log(log_line(metrics, self.total_iterations))
        values = asdict(metrics)
        values |= values.pop("observed")
        for sink in [*self._sinks]:
            try:
                sink(values)
            except OSError as error:  # a full disk must not end a run that can still save elsewhere
                self._sinks.remove(sink)
                self.log(f"warning: metrics cannot be written any more ({error}); training goes on without them")

    def close(self) -> None:
        """Flush and close what was opened."""
        for closer in self._closers:
            try:
                closer()
            except OSError as error:
                self.log(f"warning: the last metrics could not be written ({error})")
        self._closers.clear()

    def _open_metrics_file(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _first_row(path)
            stream = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise UserError(f"metrics_file={str(path)!r} cannot be written ({error}); choose another") from error
        own = {} if self._run_id is None else {"run": self._run_id}
        self._sinks.append(lambda values: _write_json(stream, {"iteration": values["iteration"], **own, **values}))
        self._closers.append(stream.close)

    def _open_tensorboard(self, directory: str, asked_for: bool) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            if asked_for:
                raise UserError(
                    f"tensorboard_dir={directory!r}, but tensorboard is not installed; pip install tensorboard, or "
                    "leave the option out"
                )
            return
        from torch.utils.tensorboard import SummaryWriter

        try:
            writer = SummaryWriter(directory)
        except OSError as error:
            raise UserError(f"tensorboard_dir={directory!r} cannot be written ({error}); choose another") from error

        def sink(values: Row) -> None:
            for name, value in flat(values).items():
                if name != "iteration" and isinstance(value, int | float):
                    writer.add_scalar(name, value, values["iteration"])

        self._sinks.append(sink)
        self._closers.append(writer.close)
        self._closers.append(_without_tracebacks_of("tensorboard"))

    def _open_wandb(self, options: LoggingConfig, run_values: Mapping[str, Plain]) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise UserError(
                f"wandb_project={options.wandb_project!r}, but wandb is not installed; pip install wandb, or leave the "
                "option out"
            )
        import wandb

        run = wandb.init(project=options.wandb_project, name=options.wandb_exp_name, config=run_values)
        self._sinks.append(lambda values: run.log(flat(values), step=values["iteration"]))
        self._closers.append(run.finish)

    def _open_progress(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._progress = display = Progress(*columns, transient=True)
        self._task = display.add_task("training", total=self.total_iterations)
        display.start()
        self._closers.append(display.stop)


def make_directory(name: str, directory: str) -> None:
    """Make a directory that is written into later; ``name`` is the field that says it.

    Raises:
        UserError: if it cannot be made.
    """
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{name}={directory!r} cannot be written ({error}); choose another") from error


def open_reporter(run: RunConfig, is_main: bool, total_iterations: int, run_id: str | None = None) -> Reporter:
    """The run's reporter; it writes on the main rank only."""
    default_dir = Path(run.checkpoint.save) / "tensorboard" if run.checkpoint.save else None
    for name, directory in (
        ("dump_gradients_dir", run.logging.dump_gradients_dir),
        ("profile_dir", run.logging.profile_dir if run.logging.profile else None),
    ):
        if directory is not None and is_main:
            make_directory(name, directory)
    return Reporter(run.logging, is_main, total_iterations, to_dict(run), default_dir, run_id)


def flat(values: Mapping[str, Value] | Mapping[int, Value], prefix: str = "") -> Row:
    """Tables by layer as a value for each, ``layer_statistics/residual_rms/3``: TensorBoard and wandb draw numbers."""
    result: Row = {}
    for name, value in values.items():
        result |= flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return result


def _without_tracebacks_of(package: str) -> Callable[[], None]:
    """A disk error in a package's writing thread is told by the next write, so its traceback is not printed as well.

    Returns:
        What undoes it.
    """
    previous = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith(package)):
            previous(args)

    def undo() -> None:
        threading.excepthook = previous

    threading.excepthook = hook
    return undo


def run_of_rows(path: str | Path, own: str, *, begins: bool) -> str:
    """The run that the rows of this start are of: the file's, where it goes on with one, else its ``own``.

    A start from a checkpoint goes on with any file, also of the run that it branched off from. One that begins goes on
    with a file that the same run began, such as a job that was killed before its first checkpoint: it has the id of its
    ``--save`` directory, and without one nobody knows, so the file is refused.

    Raises:
        UserError: the rows there are another run's, or it holds something else.
    """
    try:
        first = _first_row(Path(path))
    except OSError as error:
        raise UserError(f"metrics_file={str(path)!r} cannot be written ({error}); choose another") from error
    if not first:
        return own
    found = re.match(rb'\{"iteration": \d+, "run": "([0-9a-f]+)"', first)  # also in a row that was cut
    known = found[1].decode() if found is not None else None
    if begins and known != own:
        raise UserError(
            f"metrics_file={str(path)!r} holds the metrics of another run, and this one begins at iteration 0; choose "
            "another --metrics-file, or move it away"
        )
    return known or own


def _first_row(path: Path) -> bytes:
    """The row of metrics that a file begins with, so that more rows are lost on nobody; empty where there is none.

    Raises:
        OSError: it cannot be read.
        UserError: it begins with something else.
    """
    if path.is_fifo():
        raise OSError("it is a pipe, and a run does not wait for its reader")
    if path.is_char_device() or path.is_dir() or not path.exists():
        return b""
    with path.open("rb") if path.is_file() else io.BytesIO(b"no file") as stream:
        first = stream.readline(1 << 20).strip()
    try:
        is_row = not first or "iteration" in json.loads(first)
    except (ValueError, TypeError, RecursionError):
        is_row = first.startswith(b'{"iteration": ')  # cut by a full disk
    if not is_row:
        raise UserError(
            f"metrics_file={str(path)!r} exists and holds no metrics of a run, so none are put into it; choose another"
        )
    return first


def _write_json(stream: TextIO, values: Row) -> None:
    stream.write(json.dumps(values) + "\n")


def log_line(metrics: StepMetrics, total_iterations: int) -> str:
    """Megatron's line, with original and processed tokens per second."""
    fields = [
        f" [{time.strftime('%Y-%m-%d %H:%M:%S')}] iteration {metrics.iteration:8d}/{total_iterations:8d}",
        f"consumed samples: {metrics.consumed_samples:12d}",
        f"elapsed time per iteration (ms): {metrics.iteration_seconds * 1e3:.1f}",
        f"throughput per GPU (TFLOP/s/GPU): {metrics.tflops_per_gpu:.4g}",
        f"learning rate: {metrics.learning_rate:.6E}",
        f"global batch size: {metrics.global_batch_size:5d}",
        f"lm loss: {metrics.lm_loss:.6E}",
        f"grad norm: {metrics.grad_norm:.3f}",
        f"number of skipped iterations: {metrics.skipped_iterations:3d}",
        f"tokens/s: {metrics.tokens_per_second:.0f}",
        f"processed tokens/s: {metrics.processed_tokens_per_second:.0f}",
    ]
    fields += [
        f"{name.replace('_', ' ')}: {value:.6E}" for name, value in metrics.observed.items() if isinstance(value, float)
    ]
    if metrics.mfu is not None:
        fields.append(f"MFU: {metrics.mfu:.1%}")
    return " | ".join(fields) + " |"
