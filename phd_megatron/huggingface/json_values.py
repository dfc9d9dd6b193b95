"""What a JSON file holds, as types."""

from __future__ import annotations

from typing import TypeAlias

from phd_megatron.config.plain import Plain

JSON: TypeAlias = Plain
#: a file's mapping
Fields: TypeAlias = "dict[str, JSON]"
