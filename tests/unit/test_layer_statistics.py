"""Statistics by layer: every formula against a direct float64 computation, on random tensors and in a tiny model."""

from __future__ import annotations

import json
import math

import pytest
import torch

from phd_megatron.config.resolve import resolve
from phd_megatron.config.schema import LoggingConfig, ModelConfig, ParallelConfig, RunConfig
from phd_megatron.errors import UserError
from phd_megatron.phd.kv_policy import KVPolicy
from phd_megatron.runtime.context import Runtime
from phd_megatron.training.metrics import Reporter, StepMetrics
from phd_megatron.training.observers.layer_statistics import STATISTICS, is_due

VOCAB, LENGTH, BATCH, LAYERS = 50, 150, 2, 3  # more tokens than sampled queries
RELATIVE = 1e-12  # float64


@pytest.fixture(scope="module")
def runtime():
    with Runtime.start(ParallelConfig(device="cpu"), verbose=False) as started:
        yield started


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_sampled_positions_are_spread_and_there_once():
    from phd_megatron.model.layer_statistics import sampled_positions

    assert sampled_positions(5).tolist() == [0, 1, 2, 3, 4]
    for length in (127, 128, 129, 1000, 4096):
        found = sampled_positions(length).tolist()
        assert len(found) == min(length, 128) == len(set(found))
        assert found == sorted(found) and found[0] >= 0 and found[-1] < length
    assert sampled_positions(256).tolist() == list(range(1, 256, 2))


def test_cosine_is_the_mean_over_pairs():
    from phd_megatron.model.layer_statistics import mean_cosine, residual_sums

    rows = tokens(7, BATCH, 5)
    squares, units = residual_sums(rows)
    torch.testing.assert_close(squares, sum(x**2 for x in rows.flatten()))
    for sequence, found in enumerate(mean_cosine(units, 7).tolist()):
        pairs = [
            float(torch.nn.functional.cosine_similarity(rows[i, sequence], rows[j, sequence], dim=0))
            for i in range(7)
            for j in range(7)
            if i != j
        ]
        assert found == pytest.approx(sum(pairs) / len(pairs), rel=RELATIVE)


@pytest.mark.parametrize("split", [None, 3, 8])
def test_entropy_of_a_union_of_keys(runtime, split):
    """Also from parts, as context-parallel ranks have them, and for scores that float32 could not exponentiate."""
    from phd_megatron.model.layer_statistics import attention_moments

    no_kinds = torch.ones(0, 6, 11, dtype=torch.bool)
    query, key = 30 * tokens(6, BATCH, 4, 8), tokens(11, BATCH, 2, 8, seed=1)
    visible = torch.ones(6, 11, dtype=torch.bool).tril(5)
    visible[0] = False
    visible[0, 2] = True  # one key: no entropy; and none at all in the second part
    scores = torch.einsum("qbgrd,kbgd->bgrqk", query.unflatten(2, (2, 2)), key) * 0.3
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1).flatten(1, 2)
    expected = torch.special.entr(weights).sum(-1)
    parts = [slice(0, split), slice(split, 11)] if split else [slice(0, 11)]
    moments = [attention_moments(query, key[part], visible[:, part], no_kinds[..., part], 0.3) for part in parts]
    top = torch.stack([log_sum for log_sum, _ in moments]).amax(0)
    shares = [(log_sum - top).exp() for log_sum, _ in moments]
    total = sum(shares)
    mean = sum(share * mean for share, (_, mean) in zip(shares, moments, strict=True)) / total
    torch.testing.assert_close(total.log() + top - mean, expected, rtol=RELATIVE, atol=1e-11)
    assert float(expected[..., 0].abs().max()) == 0.0
    if split is None:
        float32 = attention_moments(query.float(), key.float(), visible, no_kinds, 0.3)
        torch.testing.assert_close(float32[0] - float32[1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", [KVPolicy(2, 1), KVPolicy(3, 4, 6), KVPolicy(2, 3)], ids=lambda policy: policy.name)
def test_shares_of_attention_are_sums_of_dense_weights(policy):
    """A loop over the definition, one query and one key at a time."""
    from phd_megatron.model.layer_statistics import ATTENDED, attention_moments, key_kinds

    length, copies = 14, policy.repeat
    query, key = tokens(length, BATCH, 2, 4), tokens(copies * length, BATCH, 2, 4, seed=1)
    positions, key_copies = torch.arange(length).repeat(copies), torch.arange(1, copies + 1).repeat_interleave(length)
    visible = policy.visible(torch.arange(length)[:, None], torch.tensor(copies), positions, key_copies)
    kinds = key_kinds(torch.arange(length)[:, None], positions, key_copies)
    _, _, *found = attention_moments(query, key, visible, kinds, 0.5)
    expected = dict.fromkeys(ATTENDED, 0.0)
    for n in range(length):
        one_query = torch.tensor(n), torch.tensor(copies)
        seen = [
            (m, copy, key[(copy - 1) * length + m])
            for copy in range(1, copies + 1)
            for m in range(length)
            if policy.visible(*one_query, torch.tensor(m), torch.tensor(copy))
        ]
        scores = torch.stack([(query[n] * row).sum(-1) * 0.5 for *_, row in seen])  # [keys, b, heads]
        for (m, copy, _), weight in zip(seen, scores.softmax(0), strict=True):
            kind = "originals" if copy == 1 else "own" if m == n else "window"
            expected[f"attention_on_{kind}"] += float(weight.mean()) / length
    values = {name: float(share.mean()) for name, share in zip(ATTENDED, found, strict=True)}
    assert values == pytest.approx(expected, rel=1e-10)
    assert sum(values.values()) == pytest.approx(1)
    assert (values["attention_on_window"] == 0) == (policy.window == 1)


def build(**model):
    from phd_megatron.model.build import build_model

    values = {
        **{"num_layers": LAYERS, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4},
        **{"num_query_groups": 2, "seq_length": LENGTH, "make_vocab_size_divisible_by": 16},
        **{"phd_window": 5, "phd_chunk": 8, "norm_scheme": "hybrid_star"},
    }
    run = RunConfig(model=ModelConfig(**{**values, **model}))
    run.training.train_iters = 1
    resolve(run)
    return build_model(run, VOCAB, torch.device("cpu"))[0]


def documents() -> torch.Tensor:
    """Where documents begin in each sample: several, one of a single token among them; and one."""
    starts = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    for begin in (5, 6, LENGTH - 9):
        starts[0, begin:] = begin
    return starts


def batch(seed: int = 0, starts=None):
    drawn = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(LENGTH).expand(BATCH, -1)
    return {"input_ids": drawn[:, :-1], "position_ids": positions, "attention_mask": starts, "labels": drawn[:, 1:]}


def by_hand(model, policy: KVPolicy, starts=None) -> dict[str, list[float]]:
    """Run the model once more and compute everything from what its modules take and give."""
    from phd_megatron.model.attention import PHDCoreAttention
    from phd_megatron.model.layer_statistics import sampled_positions

    outputs, inputs = [], []
    hooks = [layer.register_forward_hook(lambda _, __, out: outputs.append(out[0])) for layer in model.decoder.layers]
    cores = [module for module in model.modules() if isinstance(module, PHDCoreAttention)]
    hooks += [core.register_forward_pre_hook(lambda _, args: inputs.append(args[:2])) for core in cores]
    with torch.no_grad():
        model(**batch(starts=starts))
    for hook in hooks:
        hook.remove()
    copies = policy.repeat
    found: dict[str, list[float]] = {name: [] for name in STATISTICS[1 : 5 if copies == 1 else None]}
    mask = policy.mask(LENGTH, starts=torch.zeros(BATCH, LENGTH, dtype=torch.long) if starts is None else starts)
    mask = mask[:, (copies - 1) * LENGTH :][:, sampled_positions(LENGTH)]  # [b, n, K*s]
    for number, (rows, (query, key)) in enumerate(zip(outputs, inputs, strict=True), 1):
        assert len(rows) == LENGTH * (1 if number == LAYERS else copies)
        last = rows[-LENGTH:].double()
        found["residual_rms"].append(float(last.square().mean().sqrt()))
        unit = last / last.norm(dim=-1, keepdim=True)
        cosine = torch.einsum("ibh,jbh->bij", unit, unit)
        found["cosine_similarity"].append(float(cosine[:, ~torch.eye(LENGTH, dtype=torch.bool)].mean()))
        sampled = query[-LENGTH:][sampled_positions(LENGTH)].unflatten(2, (2, 2)).double()
        scores = torch.einsum("qbgrd,kbgd->bgrqk", sampled, key.double()) / math.sqrt(8)
        weights = scores.masked_fill(~mask[:, None, None], -math.inf).softmax(-1)
        entropy = torch.special.entr(weights).sum(-1)
        found["attention_entropy"].append(float(entropy.mean()))
        several = mask.sum(-1) > 1
        share = entropy.movedim(3, 1)[several] / mask.sum(-1)[several].double().log()[:, None, None]
        found["attention_entropy_share"].append(float(share.mean()))
        if copies > 1 and number < LAYERS:
            found["copy_cosine"].append(float(torch.cosine_similarity(rows[:LENGTH], rows[-LENGTH:], dim=-1).mean()))
        if copies > 1:
            on_originals, own = weights[..., :LENGTH].sum(-1).mean(), sampled_positions(LENGTH)
            parts = [weights[..., torch.arange(len(own)), copy * LENGTH + own] for copy in range(1, copies)]
            on_own = sum(parts).mean()
            found["attention_on_originals"].append(float(on_originals))
            found["attention_on_own"].append(float(on_own))
            found["attention_on_window"].append(float(1 - on_originals - on_own))
    return found


@pytest.mark.parametrize("repeat", [1, 3])
@pytest.mark.parametrize("pruned", [True, False])
@pytest.mark.parametrize("starts", [None, documents()], ids=["together", "apart"])
def test_recorder_sees_what_a_direct_computation_gives(runtime, repeat, pruned, starts):
    """The first micro-batch counts, whatever comes after it, and the values do not change the model's."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from phd_megatron.model.layer_statistics import LayerRecorder

    model = build(phd_repeat=repeat, phd_last_layer_pruning=pruned).double()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    recorder = LayerRecorder([model], groups, LENGTH)
    before = torch.get_rng_state()
    with recorder.watching():
        watched = model(**batch(starts=starts))
        model(**batch(seed=1, starts=starts))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model(**batch(starts=starts)), watched)
    assert not [module for module in model.modules() if module._forward_pre_hooks]
    found = recorder.activations()
    expected = by_hand(model, model.config.kv_policy, starts)
    for number, values in found.items():
        dropped = {"copy_cosine"} if number == LAYERS else set()  # only the last copy leaves the last layer
        assert values.keys() == expected.keys() - dropped
    for name, wanted in expected.items():
        values = [float(found[number][name]) for number in range(1, len(wanted) + 1)]
        assert values == pytest.approx(wanted, rel=1e-9), name
    assert all(0 < share < 1 for share in expected["attention_entropy_share"])


def test_when_they_are_due():
    assert [step for step in range(1, 9) if is_due(3, step)] == [1, 3, 6]
    assert not any(is_due(0, step) for step in range(1, 9))


@pytest.mark.parametrize(("value", "message"), [(-1, "at least 0"), (5, "without a place to write them")])
def test_bad_values_are_refused(value, message):
    run = RunConfig(model=ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4))
    run.training.train_iters = 1
    run.logging.log_layer_statistics = value
    with pytest.raises(UserError, match=message):
        resolve(run)
    run.logging.log_layer_statistics, run.logging.metrics_file = 5, "metrics.jsonl"
    resolve(run)


def test_every_logger_gets_them(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = LoggingConfig(metrics_file=str(tmp_path / "metrics.jsonl"), tensorboard_dir=str(tmp_path / "events"))
    reporter = Reporter(options, True, 2, {}, None)
    router = {"router_entropy": {1: 1.5}, "tokens_per_expert": {1: [3, 4]}}
    tables_of_step = {"residual_rms": {1: 0.5, 2: 0.25}, "copy_cosine": {1: 0.75}}  # not there for the last layer
    for tables in (tables_of_step, {}):
        numbers = dict.fromkeys(("consumed_flops", "lm_loss", "grad_norm", "learning_rate", "iteration_seconds"), 1.0)
        numbers |= dict.fromkeys(("tokens_per_second", "processed_tokens_per_second", "tflops_per_gpu", "mfu"), 1.0)
        counts = dict.fromkeys(("consumed_samples", "consumed_tokens", "global_batch_size", "skipped_iterations"), 1)
        step = 1 if tables else 2
        observed = {**({"layer_statistics": tables} if tables else {}), **router}
        reporter.report(StepMetrics(iteration=step, **numbers, **counts, observed=observed))
    reporter.close()
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["layer_statistics"] == {"residual_rms": {"1": 0.5, "2": 0.25}, "copy_cosine": {"1": 0.75}}
    assert "layer_statistics" not in second
    events = accumulator.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [event.value for event in events.Scalars("layer_statistics/residual_rms/2")] == [0.25]
    assert [name for name in events.Tags()["scalars"] if "copy_cosine" in name] == ["layer_statistics/copy_cosine/1"]
    assert [event.value for event in events.Scalars("router_entropy/1")] == [1.5, 1.5]
    assert not [name for name in events.Tags()["scalars"] if "tokens_per_expert" in name]
