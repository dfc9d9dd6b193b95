"""Small configurations, and what becomes of them; shared by tests of what is derived, refused and taken."""

from __future__ import annotations

from typing import Any

import pytest

from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import RunConfig
from phd_megatron.config.serialize import assign
from phd_megatron.errors import UserError


def make(**values: Any) -> RunConfig:
    config = RunConfig()
    for name, value in {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, **values}.items():
        assign(config, name, value)
    return config


def resolved(**values: Any) -> RunConfig:
    config = make(**values)
    resolve(config)
    return config


def refusal(**values: Any) -> str:
    with pytest.raises(UserError) as caught:
        resolve(make(**values))
    return str(caught.value)
