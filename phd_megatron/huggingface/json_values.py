"""What a JSON file holds, as types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
#: a file's mapping
Fields: TypeAlias = "dict[str, JSON]"
