"""What people do with a model from the Hub: long generation, sampling, training, compiling, placing it on devices."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch

from phd_megatron.norm.schemes import NORM_SCHEMES

CHUNK, NEW = 8, 200
KINDS = {"PHD": (1, None), "SWA": (5, None), "CSWA": (5, CHUNK)}
CASES = [
    (scheme, kind, repeat)
    for scheme in NORM_SCHEMES
    for repeat in (1, 2, 3, 5)
    for kind in (KINDS if repeat > 1 else ["PHD"])
]
#: a covering part for every day; `bash tests/run.sh --full` takes all
EVERY_DAY = {
    *[("pre", "CSWA", 2), ("pre_qk", "SWA", 3), ("post", "PHD", 2), ("hybrid", "CSWA", 5), ("hybrid_star", "CSWA", 3)],
    *[("hybrid_star", "SWA", 5), ("pre", "PHD", 1), ("hybrid_star", "PHD", 3)],
}
EXPERTS = {
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "mlp_only_layers": [0]},
    **{"scoring_func": "sigmoid", "use_expert_bias": True, "shared_expert_intermediate_size": 12},
}


def fields(scheme: str, kind: str, repeat: int) -> dict[str, object]:
    window, chunk = KINDS[kind]
    return {"norm_scheme": scheme, "phd_repeat": repeat, "phd_window": window, "phd_chunk": chunk}


@pytest.mark.parametrize(
    ("scheme", "kind", "repeat"),
    [pytest.param(*case, marks=() if case in EVERY_DAY else pytest.mark.full) for case in CASES],
)
@torch.no_grad()
def test_200_greedy_tokens_equal_recomputation(make_model, scheme, kind, repeat):
    """A batch of four left-padded prompts, of one token and of exactly one chunk among them, over many chunks."""
    greedy_equals_recomputation(make_model(**fields(scheme, kind, repeat), max_position_embeddings=512), NEW)


@torch.no_grad()
def test_greedy_tokens_with_experts(make_model):
    model = make_model(**fields("hybrid_star", "CSWA", 2), **EXPERTS)
    model.model.layers[1].mlp.gate.e_score_correction_bias.normal_()
    greedy_equals_recomputation(model, 60)


def greedy_equals_recomputation(model, new):
    lengths = (1, CHUNK, 13, 21)
    longest = max(lengths)
    prompts = torch.randint(61, (len(lengths), longest))
    mask = torch.tensor([[slot >= longest - length for slot in range(longest)] for length in lengths])
    found = model.generate(
        prompts, attention_mask=mask.long(), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert found.shape == (4, longest + new)
    for row, length in zip(found, lengths, strict=True):
        sequence = row[longest - length :]
        logits = model(sequence[None, :-1], use_cache=False).logits[0]
        assert torch.equal(logits[length - 1 :].argmax(-1), sequence[length:])
        best = logits[length - 1 :].topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 1e-9, "no tie that rounding could turn"


@torch.no_grad()
def test_sampling_is_that_of_the_whole_sequence(make_model):
    model = make_model(**fields("hybrid_star", "CSWA", 2))
    tokens = torch.randint(61, (2, 11))
    options = {"max_new_tokens": 20, "do_sample": True, "eos_token_id": None, "pad_token_id": 0}
    draws = []
    for seed, cached in itertools.product((1, 2), (True, False)):
        torch.manual_seed(seed)
        draws.append(model.generate(tokens, use_cache=cached, temperature=0.8, top_k=20, top_p=0.9, **options))
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[2], draws[3])
    assert not torch.equal(draws[0], draws[2])


@torch.no_grad()
def test_what_generate_cannot_do_is_refused(make_model):
    model = make_model(**fields("hybrid_star", "CSWA", 2))
    tokens = torch.randint(61, (2, 9))
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    mask = (torch.arange(9) < torch.tensor([[9], [6]])).long()
    with pytest.raises(ValueError, match="padded on the right"):
        model.generate(tokens, attention_mask=mask, **options)
    with pytest.raises(ValueError, match="cropped"):
        model.generate(tokens[:1], prompt_lookup_num_tokens=3, **options)


def test_training_through_trainer(make_model, tmp_path):
    """A batch is learned by heart; rows are padded on the right and padding carries no loss."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = make_model(dtype=torch.float32, **fields("hybrid_star", "CSWA", 2), **EXPERTS).train()
    tokens = torch.randint(61, (8, 20))
    mask = (torch.arange(20) < torch.arange(13, 21)[:, None]).long()
    rows = [
        {"input_ids": ids, "attention_mask": m, "labels": ids.masked_fill(m == 0, -100)}
        for ids, m in zip(tokens, mask, strict=True)
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=8, learning_rate=1e-2, use_cpu=True,
        report_to="none", logging_steps=1, save_strategy="no", gradient_checkpointing=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12 and losses[-1] < 0.5 * losses[0]


@torch.no_grad()
def test_device_map(make_model, tmp_path):
    """``auto``, and layers whose weights lie on the disk and come and go by hooks."""
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    model = make_model(dtype=torch.float32, **fields("hybrid_star", "SWA", 2))
    model.save_pretrained(tmp_path / "model")
    tokens = torch.randint(61, (1, 9))
    expected = model(tokens).logits
    split = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.layers.0": "cpu"}
    split |= {"model.layers.1": "disk", "model.layers.2": "disk"}
    for number, device_map in enumerate(("auto", split)):
        placed = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model",
            trust_remote_code=True,
            device_map=device_map,
            offload_folder=str(tmp_path / f"{number}"),
        )
        torch.testing.assert_close(placed(tokens.to(placed.device)).logits.cpu(), expected)
        found = placed.generate(tokens.to(placed.device), max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert torch.equal(found.cpu(), model.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0))


def test_without_torchs_private_attention_operators(make_model, monkeypatch):
    """Forward and gradients come from plain matrix products then, and are the same."""
    model = make_model(**fields("hybrid_star", "CSWA", 3))
    causal = sys.modules[type(model).__module__.replace("modeling_phd", "causal")]
    tokens = torch.randint(61, (2, 37))

    def run():
        model.zero_grad()
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}

    kinds = (torch.device("cpu"), torch.float64, 8)
    assert causal.causal_kernel(*kinds)[0].name == "cpu flash"
    loss, grads = run()

    def gone(name):
        raise AttributeError(f"there is no {name} any more")

    monkeypatch.setattr(causal, "_aten", gone)
    causal._causal_kernel.cache_clear()
    try:
        assert causal.causal_kernel(*kinds)[0].name == "plain"
        again, others = run()
    finally:
        monkeypatch.undo()
        causal._causal_kernel.cache_clear()
    assert math.isclose(loss, again, rel_tol=1e-6)  # transformers takes the loss in float32
    for name, grad in grads.items():
        torch.testing.assert_close(others[name], grad, rtol=1e-6, atol=1e-9, msg=name)
