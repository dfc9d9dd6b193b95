"""PHD attention: every backend against the definition, forward and gradients."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from torch import Tensor

import phd_megatron.kernels.phd_attention as front_door
from phd_megatron.config import schema
from phd_megatron.errors import UserError
from phd_megatron.huggingface.bundle_files import bundle_files
from phd_megatron.kernels.phd_attention import BACKENDS, COMM_TYPES, causal, choose_backend, phd_attention, sdpa
from phd_megatron.kernels.phd_attention.flex import flex_attention
from phd_megatron.kernels.phd_attention.reference import reference_attention
from phd_megatron.phd.kv_policy import KVPolicy

REPEATS = (1, 2, 3, 5)
VARIANTS = ((1, None), (16, None), (16, 32), (4, 8), (3, 7), (64, 32), (200, None))
LENGTHS = (1, 7, 33, 96)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
GROUPS, BATCH, WIDTH = 2, 2, 8
EXACT = ("reference", "sdpa")  # those that run on every device and in float64


def make(
    policy: KVPolicy,
    length: int,
    *,
    ratio: int = 2,
    dtype: torch.dtype = torch.float64,
    query_copies: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value and an incoming gradient, the same numbers on every call."""
    generator = torch.Generator().manual_seed(1234)
    copies = query_copies or policy.repeat

    def draw(count: int, heads: int) -> Tensor:
        shape = (count, length, BATCH, heads, WIDTH)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    query, grad = draw(copies, GROUPS * ratio), draw(copies, GROUPS * ratio)
    return query, draw(policy.repeat, GROUPS), draw(policy.repeat, GROUPS), grad


def run(
    attend: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor, policy: KVPolicy
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves, policy)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def reference(inputs: tuple[Tensor, ...], grad: Tensor, policy: KVPolicy) -> tuple[Tensor, ...]:
    return run(BACKENDS["reference"], tuple(x.double() for x in inputs), grad.double(), policy)


def relative(found: Tensor, expected: Tensor, floor: float) -> float:
    return float((found.double() - expected).norm()) / max(float(expected.norm()), floor)


def assert_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], grad: Tensor, tolerance: float) -> None:
    floor = 1e-3 * float(grad.double().norm())
    for name, a, b in zip(("output", "query", "key", "value"), found, expected, strict=True):
        assert a.shape == b.shape
        assert relative(a, b, floor) <= tolerance, f"{name} is off by {relative(a, b, floor):.1e}"


def variant_name(variant: tuple[int, int | None]) -> str:
    return f"W{variant[0]}-C{variant[1]}"


# ------------------------------------------------------------------ the definition


def test_reference_equals_a_triple_loop_over_equation_2() -> None:
    repeat, length, heads, groups, width, window, chunk = 3, 7, 4, 2, 3, 2, 3
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(repeat, length, 1, heads, width, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, repeat, length, 1, groups, width, generator=generator, dtype=torch.float64)
    got = BACKENDS["reference"](query, key, value, KVPolicy(repeat, window, chunk))
    for head in range(heads):
        group = head // 2
        for n in range(length):
            for j in range(1, repeat + 1):
                weights, rows = [], []
                for m in range(length):
                    for i in range(1, repeat + 1):
                        if i == 1:
                            seen = m <= n
                        else:
                            inside = m // chunk == n // chunk and n - window < m <= n
                            seen = j > 1 and inside and (m < n or i <= j)
                        if seen:
                            dot = sum(
                                float(query[j - 1, n, 0, head, c] * key[i - 1, m, 0, group, c]) for c in range(width)
                            )
                            weights.append(math.exp(dot / math.sqrt(width)))
                            rows.append(value[i - 1, m, 0, group])
                expected = sum(w * row for w, row in zip(weights, rows, strict=True)) / sum(weights)
                torch.testing.assert_close(got[j - 1, n, 0, head], expected, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------ sdpa against the definition


@pytest.mark.parametrize("variant", VARIANTS, ids=variant_name)
@pytest.mark.parametrize("repeat", REPEATS)
def test_sdpa_equals_reference(repeat: int, variant: tuple[int, int | None]) -> None:
    policy = KVPolicy(repeat, *variant)
    for length in LENGTHS:
        for ratio in (1, 3, 4):
            *inputs, grad = make(policy, length, ratio=ratio)
            expected = reference(tuple(inputs), grad, policy)
            for dtype, tolerance in TOLERANCE.items():
                typed = tuple(x.to(dtype) for x in inputs)
                if dtype is not torch.float64:
                    expected = reference(typed, grad.to(dtype), policy)
                assert_close(run(BACKENDS["sdpa"], typed, grad.to(dtype), policy), expected, grad, tolerance)


@pytest.mark.parametrize(("window", "chunk"), [*VARIANTS, (5, 90), (40, 64), (33, 40), (2, 1)])
def test_pruned_queries_are_the_last_rows_of_the_full_result(window: int, chunk: int | None) -> None:
    policy = KVPolicy(4, window, chunk)
    for copies in (1, 2, 3):
        *inputs, grad = make(policy, 96, query_copies=copies)
        found = run(BACKENDS["sdpa"], tuple(inputs), grad, policy)
        assert_close(found, reference(tuple(inputs), grad, policy), grad, 1e-10)
        everything = torch.cat([torch.zeros_like(inputs[0])[:1].expand(4 - copies, -1, -1, -1, -1), inputs[0]])
        full = phd_attention(everything, inputs[1], inputs[2], policy, backend="sdpa")
        torch.testing.assert_close(found[0], full[-copies:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    for policy in (KVPolicy(1), KVPolicy(3, 16, 32), KVPolicy(2, 1), KVPolicy(2, 16)):
        query, key, value, grad = (x.to(dtype) for x in make(policy, 96, dtype=dtype))
        found = run(BACKENDS["sdpa"], (query, key, value), grad, policy)
        assert all(x.dtype is dtype for x in found)
        assert_close(found, reference((query, key, value), grad, policy), grad, 2e-2)


# ------------------------------------------------------------------ causality


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("variant", VARIANTS, ids=variant_name)
@pytest.mark.parametrize("repeat", (1, 2, 3))
def test_a_token_changes_nothing_before_it(backend: str, variant: tuple[int, int | None], repeat: int) -> None:
    policy, length = KVPolicy(repeat, *variant), 70
    query, key, value, _ = make(policy, length)
    before = phd_attention(query, key, value, policy, backend=backend)
    for token in (1, 31, 32, 64, length - 1):
        changed = [x.clone() for x in (query, key, value)]
        for x in changed:
            x[:, token] += 100.0
        after = phd_attention(*changed, policy, backend=backend)
        assert torch.equal(before[:, :token], after[:, :token])
        assert not torch.equal(before[:, token], after[:, token])


# ------------------------------------------------------------------ K = 1


def test_one_copy_is_causal_attention_and_repeats_bit_for_bit() -> None:
    policy = KVPolicy(1, 16, 32)
    query, key, value, grad = make(policy, 96, dtype=torch.float32)
    first, second = (run(phd_attention, (query, key, value), grad, policy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    q, k, v = (x[0].permute(1, 2, 0, 3) for x in (query, key, value))
    stock = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(first[0][0].permute(1, 2, 0, 3), stock)


def test_one_copy_costs_one_operator_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("part (b) ran for a vanilla model")

    for name in ("_merge", "fold_queries", "fold_keys", "local_plan", "local_forward", "local_backward"):
        monkeypatch.setattr(sdpa, name, forbidden)
    query, key, value, grad = make(KVPolicy(1), 33)
    run(phd_attention, (query, key, value), grad, KVPolicy(1))


# ------------------------------------------------------------------ memory layouts


def scattered(x: Tensor) -> Tensor:
    """The same numbers, head dimension with a stride of 2: the flash operator would read garbage."""
    wide = torch.full((*x.shape[:-1], 2 * x.size(-1)), float("nan"), dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def batch_first(x: Tensor) -> Tensor:
    return x.permute(2, 3, 0, 1, 4).contiguous().permute(2, 3, 0, 1, 4)


def column(x: Tensor) -> Tensor:
    """A slice of something wider, as query, key and value are of one fused projection."""
    return torch.cat([torch.full_like(x, float("nan")), x], -1)[..., x.size(-1) :]


def last_first(x: Tensor) -> Tensor:
    return x.transpose(-1, 0).contiguous().transpose(-1, 0)


@pytest.mark.parametrize("layout", [scattered, batch_first, column, last_first])
@pytest.mark.parametrize(
    "policy", [KVPolicy(1), KVPolicy(3, 1), KVPolicy(3, 4, 8), KVPolicy(2, 16)], ids=lambda p: p.name
)
def test_strides_do_not_matter(policy: KVPolicy, layout: Callable[[Tensor], Tensor]) -> None:
    for length in (1, 33):
        query, key, value, grad = make(policy, length)
        expected = reference((query, key, value), grad, policy)
        moved = tuple(layout(x) for x in (query, key, value))
        assert all(torch.equal(a, b) for a, b in zip(moved, (query, key, value), strict=True))
        assert_close(run(BACKENDS["sdpa"], moved, layout(grad), policy), expected, grad, 1e-10)


def test_expanded_gradient_and_single_head() -> None:
    policy = KVPolicy(2, 4, 8)
    query, key, value, _ = make(policy, 33, ratio=1)
    ones = torch.ones((), dtype=torch.float64).expand(query.shape)  # what .sum().backward() sends
    assert_close(
        run(BACKENDS["sdpa"], (query, key, value), ones, policy),
        reference((query, key, value), ones, policy),
        ones,
        1e-10,
    )


# ------------------------------------------------------------------ operators that are missing or wrong


@pytest.fixture
def fresh_choice():  # type: ignore[no-untyped-def]
    for cached in (causal._causal_kernel, front_door._choose):
        cached.cache_clear()
    yield
    for cached in (causal._causal_kernel, front_door._choose):
        cached.cache_clear()


@pytest.mark.parametrize("fault", ["missing forward", "missing backward", "wrong", "no groups"])
def test_plain_path_when_the_private_operators_are_not_there(
    fault: str, monkeypatch: pytest.MonkeyPatch, fresh_choice: None
) -> None:
    genuine = causal._aten

    def aten(name: str):  # type: ignore[no-untyped-def]
        if fault == "missing backward" and not name.endswith("_backward"):
            return genuine(name)
        if fault == "wrong" and not name.endswith("_backward"):
            return lambda q, k, v, *rest, scale: genuine(name)(q, k, v, *rest, scale=2 * scale)
        if fault == "no groups":
            raise RuntimeError("number of heads in query/key/value should match")
        return genuine(name + "_that_this_torch_lacks")

    monkeypatch.setattr(causal, "_aten", aten)
    assert causal.causal_kernel(torch.device("cpu"), torch.float64, WIDTH)[0] is causal.PLAIN
    assert "cpu flash not used" in choose_backend("cpu", torch.float64, WIDTH)[1]
    for policy in (KVPolicy(1), KVPolicy(3, 4, 8), KVPolicy(2, 1), KVPolicy(2, 16)):
        *inputs, grad = make(policy, 33, ratio=3)
        found = run(phd_attention, tuple(inputs), grad, policy)
        assert_close(found, reference(tuple(inputs), grad, policy), grad, 1e-10)


def test_operators_are_not_even_tried_outside_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(name: str) -> None:
        raise AssertionError(f"{name} was called")

    monkeypatch.setattr(causal, "_aten", forbidden)
    for kernel, dtype, width in (
        (causal.CUDNN, torch.float32, 64),
        (causal.CUDNN, torch.bfloat16, 256),
        (causal.CUDA_FLASH, torch.float16, 36),
        (causal.EFFICIENT, torch.float64, 64),
    ):
        problem = causal._probe(kernel, torch.device("cpu"), dtype, width)
        assert problem is not None and f"head dimension {width}" in problem


def test_plain_path_over_several_row_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal, "PLAIN_ROWS", 10)
    monkeypatch.setattr(sdpa, "causal_kernel", lambda *_: (causal.PLAIN, "test"))
    policy = KVPolicy(2, 4, 8)
    *inputs, grad = make(policy, 33)
    found = run(BACKENDS["sdpa"], tuple(inputs), grad, policy)
    assert_close(found, reference(tuple(inputs), grad, policy), grad, 1e-10)


def test_choosing_leaves_the_random_numbers_alone(fresh_choice: None) -> None:
    state = torch.get_rng_state()
    name, reason = choose_backend("cpu", torch.float32, WIDTH)
    assert name == "sdpa" and "cpu flash" in reason
    assert torch.equal(state, torch.get_rng_state())


# ------------------------------------------------------------------ derivatives, refusals, the table


@pytest.mark.parametrize("policy", [KVPolicy(2, 1), KVPolicy(3, 3, 4), KVPolicy(2, 3)], ids=lambda p: p.name)
def test_gradcheck(policy: KVPolicy) -> None:
    generator = torch.Generator().manual_seed(5)
    shapes = ((policy.repeat, 5, 1, 2, 3), (policy.repeat, 5, 1, 1, 3), (policy.repeat, 5, 1, 1, 3))
    leaves = [torch.randn(x, generator=generator, dtype=torch.float64).requires_grad_() for x in shapes]
    assert torch.autograd.gradcheck(lambda q, k, v: phd_attention(q, k, v, policy, scale=0.7, backend="sdpa"), leaves)


@pytest.mark.parametrize("backend", EXACT)
def test_scale_and_partial_gradients(backend: str) -> None:
    policy = KVPolicy(2, 4, 8)
    query, key, value, _ = make(policy, 9)
    out = phd_attention(query, key.requires_grad_(), value, policy, scale=0.0, backend=backend)
    # With scale 0 the last query averages all keys it sees: 9 originals and the one hidden key of its chunk.
    expected = (value[0, :9].sum(0) + value[1, 8]) / 10
    torch.testing.assert_close(out[1, 8], expected.repeat_interleave(2, 1), rtol=1e-12, atol=1e-12)
    out.sum().backward()
    assert key.grad is not None and query.grad is None


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("policy", [KVPolicy(1), KVPolicy(2, 1), KVPolicy(3, 4, 8)], ids=lambda p: p.name)
def test_a_scale_is_a_factor_on_the_query(policy: KVPolicy, dtype: torch.dtype, backend: str) -> None:
    """``scale`` and the default ``d ** -0.5`` with a query longer by as much: the same values and gradients."""
    query, key, value, grad = make(policy, 37, dtype=dtype)
    factor = 0.31 * WIDTH**0.5
    found = run(
        lambda q, k, v, p: phd_attention(q, k, v, p, scale=0.31, backend=backend), (query, key, value), grad, policy
    )
    expected = run(
        lambda q, k, v, p: phd_attention(q * factor, k, v, p, backend="reference"), (query, key, value), grad, policy
    )
    for one, two in zip(found, expected, strict=True):
        assert (one - two).norm() <= TOLERANCE[dtype] * two.norm()


def test_large_scores_do_not_overflow() -> None:
    for policy in (KVPolicy(2, 1), KVPolicy(3, 4, 8)):
        *inputs, grad = make(policy, 33)
        inputs[0] = inputs[0] * 1e3
        found = run(phd_attention, tuple(inputs), grad, policy)
        assert all(bool(x.isfinite().all()) for x in found)
        assert_close(found, reference(tuple(inputs), grad, policy), grad, 1e-9)


def test_refusals() -> None:
    policy = KVPolicy(2, 4, 8)
    query, key, value, _ = make(policy, 9)
    with pytest.raises(UserError, match=r"'flash'.*auto, reference, sdpa, flex, triton, sdpa_triton"):
        phd_attention(query, key, value, policy, backend="flash")
    for bad, message in (
        ((query[0], key, value), "split the copies"),
        ((query, key[:1], value[:1]), "2 copies"),
        ((query[:, :8], key, value), "must agree"),
        ((query[:, :, :, :3], key, value), "multiple"),
        ((query.float(), key, value), "cast"),
        ((query[:, :0], key[:, :0], value[:, :0]), "nothing to attend"),
        ((scattered(query), key, value), r"strides 2, 1, 1.*contiguous"),
        ((query, key, last_first(value)), "dense rows"),
    ):
        for backend in BACKENDS:  # the front door refuses before it asks whether the backend can run
            with pytest.raises(ValueError, match=message):
                phd_attention(*bad, policy, backend=backend)
    for backend, message in (("flex", "no backward on cpu"), ("triton", "not in float64")):
        with pytest.raises(UserError, match=rf"'{backend}' cannot run here: .*{message}"):
            phd_attention(query, key, value, policy, backend=backend)
    with pytest.raises(ValueError, match="query_copies=1"):
        phd_attention(query, key, value, policy, query_copies=1)


def test_the_schema_offers_every_backend_and_every_exchange() -> None:
    assert get_args(schema.Backend) == ("auto", *BACKENDS)
    assert get_args(get_type_hints(schema.ParallelConfig)["cp_comm_type"]) == COMM_TYPES


@pytest.mark.parametrize("name", BACKENDS)
def test_a_row_names_files_of_its_backend_and_says_what_they_do(name: str) -> None:
    row, folder = BACKENDS[name], Path(front_door.__file__).parent
    named = {name: row.attend, f"{name}_context_parallel": row.context_parallel}
    for module, path in named.items():
        source = folder / f"{module}.py"
        assert source.exists() == (path is not None)
        if path is not None:
            assert path.startswith(f"{module}:") and f"\ndef {path.partition(':')[2]}(" in source.read_text("utf-8")
    text = (folder / f"{name}.py").read_text("utf-8")
    assert row.vendor_kernel == ("causal_kernel(" in text)
    assert row.dense_mask == ("policy.mask(" in text)
    assert all(f"{option}: bool" in text for options in row.variants for option in options)
    assert row.triton == row.fused_norms == (name in ("triton", "sdpa_triton"))


def test_the_choice_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    front_door._choose.cache_clear()
    query, key, value, _ = make(KVPolicy(2, 4, 8), 9, dtype=torch.float32)
    with caplog.at_level("INFO"):
        for _ in range(3):
            phd_attention(query, key, value, KVPolicy(2, 4, 8))
    said = [record.getMessage() for record in caplog.records if "PHD attention" in record.getMessage()]
    reason = choose_backend("cpu", torch.float32, WIDTH)[1]
    assert said == [f"PHD attention on cpu in torch.float32, head dimension {WIDTH}: sdpa, {reason}"]


@pytest.mark.parametrize("token_major", [False, True])
@pytest.mark.parametrize("variant", [(1, None), (4, 8), (16, None)], ids=variant_name)
def test_flex_mask_is_the_policy(variant: tuple[int, int | None], token_major: bool) -> None:
    policy, length = KVPolicy(3, *variant), 21
    for copies in (3, 1):
        query, key, value, _ = make(policy, length, query_copies=copies, dtype=torch.float32)
        expected = reference_attention(query.double(), key.double(), value.double(), policy)
        found = flex_attention(query, key, value, policy, token_major=token_major)  # eager; the product compiles it
        assert found.shape == query.shape
        assert relative(found, expected, 1.0) <= 1e-5


def test_parts_work_as_flat_files_without_the_package(tmp_path: Path) -> None:
    """They ship next to kv_policy.py inside an exported model."""
    exported = tmp_path / "exported"
    exported.mkdir()
    for name, source in bundle_files().items():
        if not name.endswith("_phd.py"):
            shutil.copy(source, exported / name)
    program = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import torch
from exported.kv_policy import KVPolicy
from exported.reference import reference_attention
from exported.sdpa import sdpa_attention
q, k, v = torch.randn(3, 2, 9, 1, 2, 4, dtype=torch.float64)
p = KVPolicy(2, 3, 4)
assert torch.allclose(sdpa_attention(q, k, v, p), reference_attention(q, k, v, p), rtol=1e-12)
assert not [name for name in sys.modules if name.startswith(("phd_megatron", "megatron", "transformers"))]
"""
    result = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
