"""Our tables against the installed Megatron-Core: every ``TransformerConfig`` field has been decided on."""

from __future__ import annotations

import shlex
from fnmatch import fnmatchcase

import pytest

from phd_megatron.config.aliases import ALIASES, Rename, Set
from phd_megatron.config.catalog import fields
from phd_megatron.config.load import load_run_config
from phd_megatron.config.transformer_fields import ROLES
from phd_megatron.config.unsupported import UNSUPPORTED
from phd_megatron.config.values import decode, simplify

pytest.importorskip("megatron.core")

from phd_megatron.model.transformer_config import transformer_field_types
from phd_megatron.runtime.mcore_versions import FIELDS_SINCE, FIELDS_UNTIL, absent_fields

HONOURED = set(
    shlex.split("""
    num_microbatches_with_partial_activation_checkpoints gradient_accumulation_fusion
    async_tensor_model_parallel_allreduce cross_entropy_loss_fusion batch_p2p_comm batch_p2p_sync
    deallocate_pipeline_outputs attention_backend disable_bf16_reduced_precision_matmul bias_activation_fusion
    bias_dropout_fusion recompute_granularity clone_scatter_output_in_embedding disable_parameter_transpose_cache
    config_logger_dir num_moe_experts overlap_moe_expert_parallel_comm
    """)
)
"""Fields that Megatron-Core itself acts on in our models, whatever their value."""
FLAGS_OF_MEGATRON_USERS = shlex.split("""
--moe-router-topk --moe-ffn-hidden-size --moe-grouped-gemm --moe-token-dispatcher-type --moe-router-load-balancing-type
--moe-aux-loss-coeff --moe-z-loss-coeff --moe-shared-expert-intermediate-size --fp8-recipe --recompute-granularity
--attention-backend --cp-comm-type --pipeline-model-parallel-layout
""")


def test_every_field_is_owned_honoured_refused_or_an_object() -> None:
    undecided = []
    for name, annotation in transformer_field_types().items():
        refused = any(fnmatchcase(name, row.field) for row in UNSUPPORTED)
        decided = [name in fields() or refused, name in HONOURED, simplify(annotation) is None]
        if not any(decided):
            undecided.append(name)
        assert not (name in HONOURED and refused), name
    assert undecided == [], "decide: refuse it in config/unsupported.py, or list it as honoured"


def test_no_row_is_about_a_field_that_is_gone() -> None:
    """But for those that this version of Megatron-Core does not have, and another one does."""
    names, absent = {*fields(), *transformer_field_types()}, absent_fields()
    rows = {row.field for row in UNSUPPORTED}
    assert {row for row in rows if not any(fnmatchcase(name, row) for name in names)} == rows & absent
    targets = {alias.field for alias in ALIASES.values() if isinstance(alias, Rename | Set)}
    assert targets <= names
    assert HONOURED - names == HONOURED & absent
    assert {*FIELDS_SINCE, *FIELDS_UNTIL} <= rows | HONOURED | ROLES.keys()


def test_patterns_refuse_no_field_of_ours() -> None:
    patterns = [row.field for row in UNSUPPORTED if "*" in row.field and row.field != "moe_*"]  # without experts
    assert [name for name in fields() if any(fnmatchcase(name, pattern) for pattern in patterns)] == []


@pytest.mark.parametrize("flag", FLAGS_OF_MEGATRON_USERS)
def test_flags_of_megatron_users_are_known(flag: str) -> None:
    assert flag[2:].replace("-", "_") in transformer_field_types()


def test_enum_fields_round_trip() -> None:
    types = transformer_field_types()
    loaded = load_run_config(["--attention-backend", "flash"], transformer_fields=types)
    assert loaded.config.model.transformer == {"attention_backend": "flash"}
    assert decode(loaded.config.model.transformer, types)["attention_backend"].name == "flash"
