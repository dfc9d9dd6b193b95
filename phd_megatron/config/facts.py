"""What a field is. These markers stand beside a field's type in :mod:`phd_megatron.config.schema`, one role for each.

From the role follows whether a resume takes the field over from the checkpoint (:meth:`Role.is_inherited`), whether it
may change there (:mod:`phd_megatron.config.resume`) and whether an export has to know it. Ranges are pydantic's own
constraints (``annotated_types``), which :func:`ranges` reads.
"""

from __future__ import annotations

import enum
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt

from phd_megatron.config.plain import Annotation, Plain


class Role(enum.Enum):
    """What depends on a field's value."""

    SHAPE = "the model and its parameters: never changes"
    FORM = "the model, but none of its parameters: fine-tuning may change it"
    INITIAL = "the values that new parameters start from: nothing once a checkpoint is loaded"
    COMPUTING = "how a step is computed, not what"
    LAYOUT = "which rank does what"
    RECIPE = "what the model is trained on, how and for how long"
    REPORT = "what a run tells, and when"
    START = "one start alone: never inherited"
    PLACE = "what is written where, under which name, and what is deleted there: never inherited"

    @property
    def is_inherited(self) -> bool:
        """Whether a run that loads a checkpoint takes the value over from it."""
        return self not in (Role.START, Role.PLACE)

    @property
    def is_architecture(self) -> bool:
        """Whether an export has to say it."""
        return self in (Role.SHAPE, Role.FORM)


SHAPE, FORM, INITIAL, COMPUTING, LAYOUT, RECIPE, REPORT, START, PLACE = Role


@dataclass(frozen=True)
class Needs:
    """The field has no meaning unless one of these is set: refused where it is given, dropped where it is inherited.

    With ``value`` it has to be set to that.
    """

    names: tuple[str, ...]
    reason: str
    value: str | None

    def __init__(self, *names: str, reason: str, value: str | None = None) -> None:
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "reason", reason)
        object.__setattr__(self, "value", value)

    def are_met(self, values: Mapping[str, Any]) -> bool:
        """Whether one of them is set, by these values; what is not among them is not set."""
        if self.value is not None:
            return any(values.get(name) == self.value for name in self.names)
        return any(values.get(name) not in (None, False) for name in self.names)

    @property
    def cure(self) -> str:
        """What to set."""
        return f"set {' or '.join(self.names)}" + (f" to {self.value}" if self.value is not None else "")


class Belongs(enum.Enum):
    """Groups of fields that a resume takes over together or not at all."""

    SCHEDULE = "the learning-rate and weight-decay schedule"
    PIPELINE_CUT = "how the layers of one pipeline size are cut"
    OPTIMIZER_STATES = "how one optimizer's states are held"
    GRADIENT_BUFFERS = "how Megatron-Core's gradient buffers are reduced"


SCHEDULE, PIPELINE_CUT, OPTIMIZER_STATES, GRADIENT_BUFFERS = Belongs

Size = Annotated[int, Ge(1), Le(2**20)]  #: of one dimension, and of groups of ranks
Depth = Annotated[int, Ge(1), Le(10_000)]  #: layers
Copies = Annotated[int, Ge(1), Le(1024)]
Length = Annotated[int, Ge(1), Le(2**26)]  #: tokens of a sample, entries of a vocabulary
Rank = Annotated[int, Ge(0), Lt(2**20)]
Steps = Annotated[int, Ge(1), Le(10**9)]
Samples = Annotated[int, Ge(1), Le(10**12)]
Batch = Annotated[int, Ge(1), Le(2**24)]  #: samples of one step
StepsOrNone = Annotated[int, Ge(0), Le(10**9)]  #: 0 is none
SamplesOrNone = Annotated[int, Ge(0), Le(10**12)]
TokensOrNone = Annotated[int, Ge(0), Le(10**17)]
NewtonSchulzSteps = Annotated[int, Ge(1), Le(99)]
Seed = Annotated[int, Ge(0), Le(4 * 10**9)]  #: generators take 32 bits, and each rank adds its number
Positive = Annotated[float, Gt(0)]
Deviation = Annotated[float, Ge(1e-10), Le(1e3)]  #: of initial weights; less is none of them, more none that computes
Epsilon = Annotated[float, Ge(1e-30), Le(1)]  #: float32 holds it
Dropout = Annotated[float, Ge(0), Le(0.99)]
NotNegative = Annotated[float, Ge(0)]
Stretch = Annotated[float, Ge(1), Le(1e6)]  #: of RoPE's waves
Turns = Annotated[float, Gt(0), Le(1e6)]  #: of a wave in the old context
Growth = Annotated[float, Ge(0), Le(1e3)]
BelowOne = Annotated[float, Ge(0), Lt(1)]
Share = Annotated[float, Ge(0), Le(1)]
Minutes = Annotated[float, Gt(0), Le(10**7)]

Bound = Ge | Gt | Le | Lt


def role_of(annotation: Annotation) -> Role:
    """The one role of an annotation.

    Raises:
        TypeError: if there is none or more than one.
    """
    roles = [fact for fact in _facts(annotation) if isinstance(fact, Role)]
    if len(roles) != 1:
        raise TypeError(f"{annotation} has {len(roles)} roles; a field has one")
    return roles[0]


def needs_of(annotation: Annotation) -> Needs | None:
    """What else has to be set, if anything."""
    return next((fact for fact in _facts(annotation) if isinstance(fact, Needs)), None)


def groups_of(annotation: Annotation) -> frozenset[Belongs]:
    """The groups that the field is in."""
    return frozenset(fact for fact in _facts(annotation) if isinstance(fact, Belongs))


def _facts(annotation: Annotation) -> tuple[Annotation, ...]:
    return typing.get_args(annotation)[1:] if typing.get_origin(annotation) is Annotated else ()


def bounds_of(annotation: Annotation) -> tuple[Bound, ...]:
    """The limits of a value, or of each item of a list."""
    return tuple(_bounds(annotation))


def _bounds(annotation: Annotation) -> Iterator[Bound]:
    yield from (fact for fact in _facts(annotation) if isinstance(fact, Ge | Gt | Le | Lt))
    for inner in typing.get_args(annotation)[: 1 if typing.get_origin(annotation) is Annotated else None]:
        yield from _bounds(inner)


def violates(value: Plain, bounds: tuple[Bound, ...]) -> str | None:
    """What the value, or each item of a list, should be, if it is not."""
    items = value if isinstance(value, list | tuple) else [value]
    numbers = [item for item in items if isinstance(item, int | float)]
    if all(_fits(item, bound) for item in numbers for bound in bounds):
        return None
    return range_words(bounds)


def range_words(bounds: tuple[Bound, ...]) -> str:
    """The range in words, such as ``at least 1 and at most 8``."""
    return " and ".join(_words(bound) for bound in bounds)


def _fits(value: Any, bound: Bound) -> bool:
    match bound:
        case Ge(ge=limit):
            return value >= limit
        case Gt(gt=limit):
            return value > limit
        case Le(le=limit):
            return value <= limit
        case Lt(lt=limit):
            return value < limit


def _words(bound: Bound) -> str:
    match bound:
        case Ge(ge=limit):
            return f"at least {limit}"
        case Gt(gt=limit):
            return f"above {limit}"
        case Le(le=limit):
            return f"at most {limit}"
        case Lt(lt=limit):
            return f"below {limit}"
