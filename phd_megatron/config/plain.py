"""The types of what is only known when it is read: values of YAML and JSON, and annotations of fields."""

from __future__ import annotations

import datetime
import types
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeAlias

Plain: TypeAlias = (
    "str | int | float | bool | datetime.date | Sequence[Plain] | Mapping[str, Plain] | None"  # dates are YAML's alone
)
"""What YAML and JSON can hold."""

Json: TypeAlias = dict[str, Any]
"""An object of a JSON file that was just read: each key is looked at where it is used."""

Values: TypeAlias = Mapping[str, Plain]
"""Field name -> value."""

Annotation: TypeAlias = type | types.UnionType | Hashable
"""A type as :mod:`typing` writes it, such as ``int | None``; Python 3.10 has no better name for all of them."""

Annotations: TypeAlias = Mapping[str, Annotation]
"""Field name -> its type."""
