"""Rows whose cure is part of another change, by title: what each waits for. To be emptied as those changes come in."""

from __future__ import annotations

PENDING: dict[str, str] = {}
