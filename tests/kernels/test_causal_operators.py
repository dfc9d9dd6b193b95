"""Vendors' operators for attention over originals: packages called as they promise, refusals, one that is forced."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from phd_megatron.kernels.phd_attention import causal


@pytest.fixture(autouse=True)
def fresh_choice() -> Iterator[None]:
    causal._causal_kernel.cache_clear()
    yield
    causal._causal_kernel.cache_clear()


class Package:
    """What the flash-attn packages promise: ``[b, s, heads, d]`` in and out.

    2 and 3 write gradients where they are told; 4 returns them, and has names of its own.
    """

    def __init__(self, version: int) -> None:
        self.version, self.calls = version, 0

    def _flash_attn_forward(self, *inputs, softmax_scale, **options):  # type: ignore[no-untyped-def]
        self.calls += 1
        out, lse, _ = causal._plain_forward(*(x.transpose(1, 2) for x in inputs), softmax_scale, options["causal"])
        return out.transpose(1, 2), lse, None, "state" if self.version == 2 else None

    def _flash_attn_backward(self, grad, q, k, v, out, lse, *rest, softmax_scale, **options):  # type: ignore[no-untyped-def]
        self.calls += 1
        targets = rest if self.version == 2 else [options[name] for name in ("dq", "dk", "dv")]
        masked = options["causal" if self.version == 2 else "is_causal"]
        assert not options["deterministic"] and (self.version > 2 or options["rng_state"] == "state")
        grad, *inputs = (x.transpose(1, 2) for x in (grad, q, k, v, out))
        found = causal._plain_backward(grad, causal.Call(*inputs, lse, (), softmax_scale, masked))
        for target, value in zip(targets, found, strict=True):
            target.copy_(value.transpose(1, 2))

    def _flash_attn_fwd(self, *inputs, softmax_scale, causal, return_lse):  # type: ignore[no-untyped-def]
        assert return_lse
        return (*self._flash_attn_forward(*inputs, softmax_scale=softmax_scale, causal=causal)[:2], None, None, None)

    def _flash_attn_bwd(self, q, k, v, out, grad, lse, softmax_scale, causal, deterministic):  # type: ignore[no-untyped-def]
        gradients = {f"d{name}": torch.empty_like(x) for name, x in zip("qkv", (q, k, v), strict=True)}
        options = {"is_causal": causal, "deterministic": deterministic, **gradients}
        self._flash_attn_backward(grad, q, k, v, out, lse, softmax_scale=softmax_scale, **options)
        return tuple(gradients.values())


@pytest.mark.parametrize(
    ("version", "module"),
    [(2, "flash_attn.flash_attn_interface"), (3, "flash_attn_interface"), (4, "flash_attn.cute.interface")],
)
def test_flash_attn_packages_are_called_as_they_promise(
    version: int, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layouts and arguments alone: the packages themselves need a GPU."""
    package, kernel = Package(version), {2: causal.PACKAGE_2, 3: causal.PACKAGE_3, 4: causal.PACKAGE_4}[version]
    missing = causal._probe(kernel, torch.device("cpu"), torch.bfloat16, 16)
    assert missing is not None and "is not installed" in missing
    monkeypatch.setattr(causal, "_package", {module: package}.__getitem__)
    for masked in (True, False):
        assert causal._probe(kernel, torch.device("cpu"), torch.bfloat16, 16, masked) is None
    assert package.calls == 4


def test_an_operator_that_fails_in_its_own_way_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages that compile raise what they define themselves."""

    class CompilerError(Exception):
        pass

    def refuse(name: str):  # type: ignore[no-untyped-def]
        raise CompilerError("no such instruction\non this machine")

    monkeypatch.setattr(causal, "_package", refuse)
    monkeypatch.setitem(causal._PREFERRED, "cpu", (causal.PACKAGE_4, causal.CPU_FLASH))
    kernel, why = causal.causal_kernel(torch.device("cpu"), torch.bfloat16, 16)
    assert kernel is causal.CPU_FLASH, why
    assert causal.operator_problem("flash-attn 4", torch.device("cpu"), torch.bfloat16, 16) == (
        "cannot be used here: no such instruction"
    )


def test_a_forced_operator_is_used_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    causal._causal_kernel.cache_clear()
    monkeypatch.setenv("PHD_CAUSAL_KERNEL", "cpu flash")
    assert causal.causal_kernel(torch.device("cpu"), torch.float32, 16)[0].name == "cpu flash"
    causal._causal_kernel.cache_clear()
    monkeypatch.setenv("PHD_CAUSAL_KERNEL", "flash-attn 3")
    with pytest.raises(ValueError, match=r"flash-attn 3 is no operator for cpu.*use one of cpu flash"):
        causal.causal_kernel(torch.device("cpu"), torch.float32, 16)
    monkeypatch.setitem(causal._PREFERRED, "cpu", (causal.PACKAGE_3,))
    with pytest.raises(ValueError, match="cannot be used here: flash_attn_interface is not installed"):
        causal.causal_kernel(torch.device("cpu"), torch.bfloat16, 16)
