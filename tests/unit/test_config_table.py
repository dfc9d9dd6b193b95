"""Every option held to a table written by hand: its default, its values, and what a resume and an export make of it.

A field's annotation decides all of that, so a slip in one would change what a run may do without any other test seeing
it. Who changes an annotation on purpose changes its row here too.
"""

from __future__ import annotations

import math
import shlex
import typing
from typing import Any

import pytest
import yaml

from phd_megatron.config.catalog import PASSTHROUGH, fields, role
from phd_megatron.config.facts import GRADIENT_BUFFERS, OPTIMIZER_STATES, PIPELINE_CUT, SCHEDULE
from phd_megatron.config.load import load_run_config
from phd_megatron.config.resume import check_resume, for_reading, inherited, schedule_of
from phd_megatron.config.schema import RunConfig
from phd_megatron.config.serialize import assign, from_dict, lookup, to_dict
from phd_megatron.config.unsupported import is_refused_by_name
from phd_megatron.config.validate import problems
from phd_megatron.config.values import simplify
from phd_megatron.errors import UserError
from phd_megatron.model.transformer_config import transformer_field_types

# Kinds of fields. What follows from each:
#           a resume takes it over | changed on resume | changed with finetune | an export says it
# shape     yes                    | refused           | refused               | yes
# form      yes                    | refused           | told                  | yes
# free      yes                    | told              | told                  | no
# place     no, and that is told   | not looked at     | not looked at         | no
# start     no                     | not looked at     | not looked at         | no
GROUPS = {"cut": PIPELINE_CUT, "schedule": SCHEDULE, "states": OPTIMIZER_STATES, "buffers": GRADIENT_BUFFERS}
INHERITED, EXPORTED = {"shape", "form", "free"}, {"shape", "form"}
ON_RESUME = {"shape": "refused", "form": "refused", "free": "told", "place": "silent", "start": "silent"}
ON_FINETUNE = {"shape": "refused", "form": "told", "free": "told", "place": "silent", "start": "silent"}

# name, default, kind, values. Intervals as in mathematics; "-": any of the type. Then: groups (cut: of one pipeline
# size; schedule; states: of one optimizer;
# buffers: of one engine), and after "needs" one of which must be set.
TABLE = """
num_layers                               null      shape [1,10000]
hidden_size                              null      shape [1,1048576]
ffn_hidden_size                          null      shape [1,1048576]
num_attention_heads                      null      shape [1,1048576]
num_query_groups                         null      shape [1,1048576]
kv_channels                              null      shape [1,1048576]
seq_length                               1024      form  [1,67108864]
max_position_embeddings                  null      form  [1,67108864]
normalization                            RMSNorm   shape RMSNorm|LayerNorm
layernorm_epsilon                        1.0e-5    shape [1e-30,1]
gated_linear_unit                        true      shape -
add_bias_linear                          false     shape -
add_qkv_bias                             false     shape -
hidden_dropout                           0.0       free  [0,0.99]
attention_dropout                        0.0       free  [0,0.99]
rotary_base                              10000.0   form  [1,1e18]
position_embedding_type                  rope      form  rope|yarn
use_rope_scaling                         false     form  -
rope_scaling_factor                      8.0       form  [1,1e6] needs use_rope_scaling
yarn_rotary_scaling_factor               null      form  [1,1e6] needs position_embedding_type
yarn_original_max_position_embeddings    null      form  [1,67108864] needs position_embedding_type
yarn_beta_fast                           32.0      form  (0,1e6] needs position_embedding_type
yarn_beta_slow                           1.0       form  (0,1e6] needs position_embedding_type
yarn_mscale                              1.0       form  [0,1e3] needs position_embedding_type
yarn_mscale_all_dim                      0.0       form  [0,1e3] needs position_embedding_type
yarn_correction_range_round_to_int       true      form  - needs position_embedding_type
rotary_percent                           1.0       shape (0,1]
untie_embeddings_and_output_weights      false     shape -
vocab_size                               null      shape [1,67108864]
make_vocab_size_divisible_by             128       shape [1,1048576]
phd_repeat                               1         form  [1,1024]
phd_window                               null      form  [1,67108864]
phd_chunk                                null      form  [1,67108864]
phd_copy_positions                       token     form  token|repeated|fraction
phd_copy_embedding                       none      shape none|vector
phd_last_layer_pruning                   true      free  -
norm_scheme                              pre       shape -
init                                     auto      free  auto|normal|depth_scaled|megatron|deepnorm
init_method_std                          null      free  [1e-10,1000]
head_init_method_std                     null      free  [1e-10,1000]
phd_attention_backend                    auto      free  auto|reference|sdpa|flex|triton|sdpa_triton
moe_experts_backend                      auto      free  auto|grouped_mm|te|sequential
transformer_impl                         auto      free  auto|local|transformer_engine
tensor_model_parallel_size               1         free  [1,1048576]
pipeline_model_parallel_size             1         free  [1,1048576]
virtual_pipeline_model_parallel_size     null      free  [1,1048576] cut
num_layers_per_virtual_pipeline_stage    null      free  [1,10000] cut
num_layers_in_first_pipeline_stage       null      free  [1,10000] cut
num_layers_in_last_pipeline_stage        null      free  [1,10000] cut
pipeline_model_parallel_layout           null      free  - cut
account_for_embedding_in_pipeline_split  false     free  - cut
account_for_loss_in_pipeline_split       false     free  - cut
microbatch_group_size_per_vp_stage       null      free  [1,1048576] cut
overlap_p2p_comm                         null      free  - cut
overlap_p2p_comm_warmup_flush            false     free  - cut
context_parallel_size                    1         free  [1,1048576]
cp_comm_type                             all_gather free all_gather|p2p
expert_model_parallel_size               1         free  [1,1048576]
expert_tensor_parallel_size              null      free  [1,1048576]
sequence_parallel                        false     free  -
use_distributed_optimizer                null      free  - states
overlap_grad_reduce                      false     free  - buffers
overlap_param_gather                     false     free  - buffers
ddp_bucket_size                          null      free  [1,1000000000000] buffers
deepspeed                                false     free  - states
deepspeed_config                         null      free  - states needs deepspeed
device                                   auto      start auto|cpu|cuda
distributed_timeout_minutes              10.0      free  (0,10000000]
data_path                                []        free  -
split                                    "969,30,1" free -
train_data_path                          null      free  -
valid_data_path                          null      free  -
test_data_path                           null      free  -
tokenizer                                null      free  -
data_cache_path                          null      place -
data_horizon_samples                     null      free  [1,1000000000000]
num_workers                              0         free  [0,1024]
reset_position_ids                       false     free  -
reset_attention_mask                     false     free  -
packing                                  none      free  none|best_fit
eod_mask_loss                            false     free  -
allow_changed_data                       false     start -
micro_batch_size                         1         free  [1,1048576]
global_batch_size                        null      free  [1,16777216]
rampup_batch_size                        null      free  [1,1000000000000]
train_iters                              null      free  [1,1000000000]
train_samples                            null      free  [1,1000000000000]
eval_interval                            null      free  [1,1000000000]
evals_per_run                            null      free  [1,1000000000]
eval_iters                               100       free  [0,1000000000]
exit_interval                            null      start [1,1000000000]
exit_duration_in_mins                    null      start (0,10000000]
seed                                     1234      free  [0,4000000000]
bf16                                     false     free  -
fp16                                     false     free  -
loss_scale                               null      free  (0,inf) needs fp16
initial_loss_scale                       null      free  (0,inf) needs fp16
min_loss_scale                           null      free  (0,inf) needs fp16
loss_scale_window                        1000      free  [1,1000000000] needs fp16
hysteresis                               2         free  [1,1000000000] needs fp16
accumulate_allreduce_grads_in_fp32       true      free  -
optimizer                                adam      free  adam|muon
lr                                       0.0003    free  (0,inf) schedule
min_lr                                   0.0       free  [0,inf) schedule
lr_decay_style                           cosine    free  constant|linear|cosine|inverse-square-root|WSD schedule
lr_decay_iters                           null      free  [1,1000000000] schedule
lr_decay_samples                         null      free  [1,1000000000000] schedule
lr_warmup_iters                          0         free  [0,1000000000] schedule
lr_warmup_samples                        0         free  [0,1000000000000] schedule
lr_warmup_tokens                         0         free  [0,100000000000000000] schedule
lr_warmup_fraction                       null      free  [0,1] schedule
lr_wsd_decay_style                       exponential free exponential|linear|cosine|minus_sqrt schedule
lr_wsd_decay_iters                       null      free  [1,1000000000] schedule
lr_wsd_decay_samples                     null      free  [1,1000000000000] schedule
lr_warmup_init                           0.0       free  [0,inf) schedule
decoupled_lr                             null      free  (0,inf) schedule
decoupled_min_lr                         null      free  [0,inf) schedule needs decoupled_lr
weight_decay                             0.1       free  [0,inf) schedule
start_weight_decay                       null      free  [0,inf) schedule
end_weight_decay                         null      free  [0,inf) schedule
weight_decay_incr_style                  constant  free  constant|linear|cosine schedule
decay_norms                              false     free  -
decay_embeddings                         true      free  -
adam_beta1                               0.9       free  [0,1)
adam_beta2                               0.95      free  [0,1)
adam_eps                                 1.0e-8    free  [1e-30,1]
clip_grad                                1.0       free  [0,inf)
grad_norm_skip_threshold                 null      free  (0,inf)
muon_momentum                            0.95      free  [0,1) needs optimizer
muon_nesterov                            false     free  - needs optimizer
muon_split_qkv                           true      free  - needs optimizer
muon_scale_mode                          spectral  free  spectral|unit_rms_norm|shape_scaling needs optimizer
muon_extra_scale_factor                  1.0       free  (0,inf) needs optimizer
muon_num_ns_steps                        5         free  [1,99] needs optimizer
muon_coefficient_type                    quintic free simple|quintic|polar_express|cans|aol|deepseekv4 needs optimizer
muon_fp32_matmul_prec                    medium    free  medium|high|highest needs optimizer
muon_tp_mode                             duplicated free duplicated|distributed|blockwise needs optimizer
save                                     null      place -
load                                     null      start -
save_interval                            null      free  [1,1000000000] needs save
keep_last                                null      place [1,1000000000]
async_save                               false     free  - needs save_interval
verify_checkpoint                        true      start -
exit_on_missing_checkpoint               false     start - needs load
rewind                                   false     start - needs load
finetune                                 false     start - needs load
no_load_optim                            false     start - needs load
no_load_rng                              false     start - needs load
use_checkpoint_opt_param_scheduler       false     start - needs load
log_interval                             10        free  [1,1000000000]
metrics_file                             null      place -
tensorboard_dir                          null      place -
wandb_project                            null      place -
wandb_exp_name                           null      place - needs wandb_project
peak_tflops                              null      free  (0,inf)
progress                                 auto      start auto|on|off
log_layer_statistics                     0         free  [0,1000000000] needs metrics_file tensorboard_dir wandb_project
dump_gradients_dir                       null      place -
dump_gradients_iterations                [1]       start [1,1000000000]
profile                                  false     start -
profile_step_start                       10        start [0,1000000000]
profile_step_end                         12        start [1,1000000000]
profile_ranks                            [0]       start [0,1048576)
profile_dir                              null      place -
"""

# Fields of Megatron-Core's own configuration, below model.transformer. All others are "free".
TRANSFORMER = {
    "shape": shlex.split("""
        num_moe_experts moe_layer_freq moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_shared_expert_gate
        moe_router_topk moe_router_topk_scaling_factor moe_router_score_function moe_router_pre_softmax
        moe_router_enable_expert_bias moe_router_num_groups moe_router_group_topk softmax_type glu_linear_offset
    """),
    "place": ["config_logger_dir"],
}


class Row:
    def __init__(self, line: str) -> None:
        self.name, default, self.kind, self.values, *rest = line.split()
        self.default = yaml.safe_load(default)
        at = rest.index("needs") if "needs" in rest else len(rest)
        self.groups, self.needs = rest[:at], rest[at + 1 :]

    @property
    def is_list(self) -> bool:
        return isinstance(self.default, list) or self.name in ("rampup_batch_size", *BLENDS)

    def wrapped(self, value: Any) -> Any:
        return [value] if self.is_list else value

    def other(self) -> Any:
        """A value that may be and is not the default."""
        if isinstance(self.default, bool):
            return not self.default
        if self.name in ("overlap_p2p_comm", "use_distributed_optimizer"):
            return False
        if self.values == "-":
            return self.wrapped("other")
        if "|" in self.values:
            return next(word for word in self.values.split("|") if word != self.default)
        if self.name == "rampup_batch_size":
            return [3, 3, 3]
        return self.wrapped(0.5 if self.name in FRACTIONS else 3)


BLENDS = ("train_data_path", "valid_data_path", "test_data_path")
FRACTIONS = shlex.split(
    "hidden_dropout attention_dropout rotary_percent lr_warmup_fraction adam_beta1 adam_beta2 lr min_lr "
    "layernorm_epsilon adam_eps muon_momentum"
)
ROWS = [Row(line) for line in TABLE.strip().splitlines()]
BY_NAME = {row.name: row for row in ROWS}
rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def test_the_table_has_every_option_with_its_default() -> None:
    assert list(BY_NAME) == list(fields())
    found = RunConfig()
    for row in ROWS:
        assert lookup(found, row.name) == row.default and type(lookup(found, row.name)) is type(row.default), row.name
    assert from_dict({}) == found
    assert getattr(found.model, PASSTHROUGH) == {}


def _refused(name: str, value: Any) -> list[str]:
    config = RunConfig()
    assign(config, name, value)
    return [each for each in problems(config) if each.startswith(f"{name}=") and "is out of range; use a value" in each]


@rows
def test_its_values(row: Row) -> None:
    """The ends of an interval are in or out as the table says, and what lies beyond them is refused, once."""
    if "|" in row.values:
        assert "|".join(typing.get_args(fields()[row.name].annotation)) == row.values
        return
    if row.values == "-":
        assert not fields()[row.name].bounds
        return
    ends = row.values[1:-1].split(",")
    is_float = (row.values[0], row.values[-1]) != ("[", "]") or any(c in row.values for c in ".e")
    is_float = is_float or row.name == "lr_warmup_fraction"
    low, high = (float(end) if is_float else int(end) for end in ends)
    whole = not is_float or row.name == "profile_ranks"
    below, above = (low - 1, high + 1) if whole else (math.nextafter(low, -1), math.nextafter(high, math.inf))
    inside_low, inside_high = (low + 1, high - 1) if whole else (math.nextafter(low, math.inf), math.nextafter(high, 0))
    taken, refused = [], [below]
    (taken if row.values[0] == "[" else refused).append(low)
    taken.append(inside_low)
    if high < math.inf:
        taken.append(inside_high)
        (taken if row.values[-1] == "]" else refused).append(high)
        refused.append(above)
    else:
        taken.append(1e300)
    assert [value for value in taken if _refused(row.name, row.wrapped(value))] == []
    assert [value for value in refused if len(_refused(row.name, row.wrapped(value))) != 1] == []


@rows
def test_what_a_resume_takes_over(row: Row) -> None:
    """A place, an identity and what one start was told are said anew each time, and what needs those goes with them."""
    saved = RunConfig()
    assign(saved, row.name, row.other())
    for need in row.needs:
        assign(saved, need, BY_NAME[need].other())
    if row.name == "async_save":
        saved.checkpoint.save = "A"
    loaded = load_run_config(["--load", "ckpt"], transformer_fields={}, saved=to_dict(saved))
    config, told = loaded.config, [note for note in loaded.notes if f"{row.name}={row.other()!r}" in note]
    assert [note.startswith("not taken over from ckpt: ") for note in told] == [True] * (row.kind == "place")
    kept = {"fp16", "decoupled_lr", "optimizer", "deepspeed", "use_rope_scaling", "position_embedding_type"}
    lost = bool(row.needs) and not kept & {*row.needs}
    expected = row.other() if row.kind in INHERITED and not lost else row.default
    assert lookup(config, row.name) == ("ckpt" if row.name == "load" else expected)
    # A command that only reads the checkpoint takes no more.
    assert lookup(for_reading(saved), row.name) == expected
    assert lookup(saved, row.name) == row.other(), "what was read stays as it is"


def _outcome(name: str, before: Any, after: Any, finetune: bool) -> str:
    saved, new = RunConfig(), RunConfig()
    new.checkpoint.finetune = finetune
    assign(saved, name, before)
    assign(new, name, after)
    try:
        notes = check_resume(saved, new)
    except UserError as error:
        assert f"{name}={after!r}" in str(error) and "architecture cannot change" in str(error)
        assert ("add --finetune" in str(error)) == (ON_FINETUNE[BY_NAME[name].kind] == "told" and not finetune)
        return "refused"
    assert len(notes) <= 1 and all(f"{name}: {before!r} -> {after!r}" in note for note in notes)
    return "told" if notes else "silent"


@rows
def test_what_may_change_on_resume(row: Row) -> None:
    other = row.other()
    if row.name in ("phd_copy_embedding", "finetune", "optimizer"):
        # Vectors start at 0, so finetune may add them; another optimizer has other states: each has its own test.
        kinds = {"phd_copy_embedding": "shape", "finetune": "start", "optimizer": "free"}
        assert row.kind == kinds[row.name]
        return
    assert _outcome(row.name, row.default, other, False) == ON_RESUME[row.kind]
    assert _outcome(row.name, row.default, other, True) == ON_FINETUNE[row.kind]
    if row.name != "vocab_size":  # null is then a vocabulary still to be read
        assert _outcome(row.name, other, row.default, False) == ON_RESUME[row.kind]
    assert _outcome(row.name, other, other, False) == "silent"


@rows
def test_what_an_export_says_what_is_needed_and_what_goes_together(row: Row) -> None:
    info = fields()[row.name]
    assert info.role.is_architecture == (row.kind in EXPORTED)
    assert list(info.needs.names if info.needs else ()) == row.needs
    assert info.groups == {GROUPS[group] for group in row.groups}
    if row.needs:
        config = RunConfig()
        assign(config, row.name, row.other())
        alone = [each for each in problems(config) if each.startswith(f"{row.name}=") and " without " in each]
        value = {"optimizer": " to muon", "position_embedding_type": " to yarn"}.get(row.needs[0], "")
        assert len(alone) == 1 and f"set {' or '.join(row.needs)}{value}, or leave it out" in alone[0]
        for need in row.needs:
            assign(config, need, BY_NAME[need].other())
            assert not [each for each in problems(config) if each.startswith(f"{row.name}=") and " without " in each]
            assign(config, need, BY_NAME[need].default)


def test_what_goes_together() -> None:
    """Another pipeline size takes no cut from the checkpoint; its schedule is taken whole when that is asked for."""
    saved = {
        row.name: row.other() for row in ROWS if row.kind in INHERITED and row.name not in ("fp16", "train_samples")
    }
    saved["pipeline_model_parallel_size"] = 2
    given = {"pipeline_model_parallel_size": 4}
    cut = {row.name for row in ROWS if "cut" in row.groups}
    assert saved.keys() - inherited(saved, given).keys() == cut
    assert inherited(saved, {}).keys() == inherited(saved, {"pipeline_model_parallel_size": 2}).keys() == saved.keys()
    asked = {"use_checkpoint_opt_param_scheduler": True}
    assert schedule_of(saved, asked) == {row.name: saved[row.name] for row in ROWS if "schedule" in row.groups}
    assert schedule_of(saved, {}) == {}


def test_a_decay_as_long_as_the_run_is_written_down_with_the_schedule() -> None:
    asked = {"use_checkpoint_opt_param_scheduler": True}
    assert schedule_of({"train_iters": 50, "lr": 0.1}, asked) == {"lr": 0.1, "lr_decay_iters": 50}
    assert schedule_of({"train_samples": 70, "lr": 0.1}, asked) == {"lr": 0.1, "lr_decay_samples": 70}
    kept = {"train_iters": 50, "lr_decay_iters": 20}
    assert schedule_of(kept, asked) == {"lr_decay_iters": 20}
    by_samples = {"train_iters": 50, "lr_decay_samples": 20}
    assert schedule_of(by_samples, asked) == {"lr_decay_samples": 20}


def test_fields_of_megatrons_configuration() -> None:
    """Each as its kind says; one that nobody has classified is taken for architecture."""
    usable = [
        name
        for name, annotation in transformer_field_types().items()
        if name not in fields() and simplify(annotation) is not None and not is_refused_by_name(name)
    ]
    kinds = {name: kind for kind, names in TRANSFORMER.items() for name in names}
    assert kinds.keys() <= {*usable} and len(usable) - len(kinds) > 60
    for name in [*usable, "a_field_of_a_later_release"]:
        kind = kinds.get(name, "free" if name in usable else "shape")
        assert role(name).is_inherited == (kind in INHERITED), name
        assert role(name).is_architecture == (kind in EXPORTED), name
        saved, new = RunConfig(), RunConfig()
        saved.model.transformer, new.model.transformer = {name: 2}, {name: 4}
        assert from_dict(to_dict(saved)).model.transformer == {name: 2}
        assert for_reading(saved).model.transformer == ({name: 2} if kind in INHERITED else {}), name
        for finetune in (False, True):  # an architecture of Megatron's is never a form alone
            new.checkpoint.finetune = finetune
            if kind == "shape":
                with pytest.raises(UserError, match=f"{name}=4: .* has {name}=2, and architecture cannot change"):
                    check_resume(saved, new)
            else:
                assert len(check_resume(saved, new)) == (kind == "free"), name
