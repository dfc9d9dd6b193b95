"""What a piece may still do: experiments in order, each laid as a member of its section's sweep."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from phd_megatron.sweep.members import CHECKPOINTS, STATUS_FILE, PlannedMember
from phd_megatron.sweep.process import progress_of
from phd_megatron.sweep.store import Store, create

from .piece import DONE, RUNS, Piece
from .queue import Experiment, Queue
from .schedule import Load

_MEMORY_FACTOR = 1.3  #: the plan's memory is before what the allocator and libraries add: 1.26 at K = 2


@dataclass(frozen=True)
class Prepared:
    """An experiment whose folder has been laid."""

    experiment: Experiment
    member: PlannedMember
    store: Store

    @property
    def home(self) -> Path:
        return self.store.home(self.member.name)

    @property
    def is_trained(self) -> bool:
        return self.store.status(self.member.name).state == "finished"

    @property
    def load(self) -> Load:
        """Of the training that is still to be done."""
        share = progress_of(self.store, self.member.name) / self.member.samples
        memory = _MEMORY_FACTOR * self.member.plan.memory.total
        return Load(self.member.plan.flops * max(0.0, 1 - share), memory)


@dataclass
class Work:
    """The queue as a piece sees it."""

    piece: Piece
    queue: Queue
    texts: dict[str, Path]
    _stores: dict[tuple[str, str], tuple[Store, dict[str, PlannedMember]]] = field(default_factory=dict)

    def waiting(self, without: set[str]) -> list[Experiment]:
        """Experiments that could be started, in order; those that an earlier command began come first.

        Args:
            without: names that are left out: at work, or failed in this command.
        """
        anchors = [a for text in self.texts for a in self.queue.anchors(text)] if self.piece.anchor else []
        found = [
            experiment
            for experiment in [*anchors, *self.queue.experiments]
            if experiment.text in self.texts
            and experiment.waits_for is None
            and experiment.name not in without
            and not self._is_done(experiment)
            and (self.piece.only in experiment.name or experiment in anchors)
            and self._has_its_start(experiment)
        ]
        return sorted(found, key=lambda experiment: experiment not in anchors and not self._has_begun(experiment))

    def prepare(self, experiment: Experiment) -> Prepared:
        """Lay the experiment's folder, and those of its section."""
        section, text = experiment.section, experiment.text
        if (text, section.name) not in self._stores:
            directory, folder = self._directory(text, section.name), self.texts[text]
            flags = {
                "train_data_path": [str(folder / "train")],
                "valid_data_path": [str(folder / "valid")],
                "data_cache_path": str(self.piece.work / "index" / text),
            }
            members = {member.name: member for member in self.queue.plan(section, text, directory, flags)}
            for each in self.queue.experiments:
                if each.start is not None and (each.section, each.text) == (section, text):
                    checkpoint = members[each.member.name].config.checkpoint
                    checkpoint.load, checkpoint.finetune = str(self._home(each.start) / CHECKPOINTS), True
            store = create(directory, self.queue.sweep(section, text, ready=True), list(members.values()))
            self._stores[text, section.name] = store, members
        store, members = self._stores[text, section.name]
        return Prepared(experiment, members[experiment.member.name], store)

    def is_start(self, experiment: Experiment) -> bool:
        """Whether others that are still to be run begin with this one's checkpoint."""
        return any(
            other.start == experiment and other.waits_for is None and not self._is_recorded(other)
            for other in self.queue.experiments
        )

    def _is_done(self, experiment: Experiment) -> bool:
        if (self.piece.work / DONE / f"{experiment.name}.json").exists():
            return True
        if experiment.section.name == self.queue.anchor or self.is_start(experiment):
            return False  # every piece has its own
        return self._is_recorded(experiment)

    def _is_recorded(self, experiment: Experiment) -> bool:
        places = self.queue.runs, self.piece.work / DONE
        return any((place / f"{experiment.name}.json").exists() for place in places)

    def _has_its_start(self, experiment: Experiment) -> bool:
        start = experiment.start
        return start is None or (self.piece.work / DONE / f"{start.name}.json").exists()

    def _has_begun(self, experiment: Experiment) -> bool:
        return (self._home(experiment) / STATUS_FILE).exists()

    def _home(self, experiment: Experiment) -> Path:
        return self._directory(experiment.text, experiment.section.name) / "members" / experiment.member.name

    def _directory(self, text: str, section: str) -> Path:
        return self.piece.work / RUNS / f"{text}-{section}"
