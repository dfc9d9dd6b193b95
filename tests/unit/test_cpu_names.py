"""The names of torch that Megatron gets on CPU: each answers by itself, and each is one that Megatron says.

That a run needs each redirect as a whole is in distributed/test_cpu_backend.py.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from phd_megatron.runtime import redirects
from phd_megatron.runtime.cpu_backend.torch_names import CPU, FACTORIES, make_torch
from phd_megatron.runtime.mcore_versions import installed
from phd_megatron.runtime.redirects import MegatronChanged, Redirect, _Watcher, replace_literals

#: of torch.cuda, by hand: what a run on CPU must not ask a device for, where there is one
CUDA_NAMES = {
    *("current_device", "device_count", "is_available", "synchronize", "empty_cache", "Stream", "Event", "stream"),
    *("current_stream", "default_stream", "manual_seed", "get_rng_state", "set_rng_state", "nvtx"),
}
#: that 0.17 and later say only in parts that no run on CPU reaches
UNTIL_0_16 = {"default_stream"}
#: parts of Megatron that no run on CPU reaches
ELSEWHERE = re.compile(r"^(inference|export|resharding|ssm|distributed/fsdp|transformer/cuda_graphs|full_cuda_graph)")


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Megatron's torch on a machine whose device must be left alone, although the run is on CPU."""

    def touched(*_: object, **__: object) -> None:
        raise AssertionError("the device was asked")

    for name in CUDA_NAMES:
        monkeypatch.setattr(torch.cuda, name, touched)
    yield make_torch()


def test_names_of_the_device_are_answered_by_the_host(names) -> None:  # type: ignore[no-untyped-def]
    cuda = names.cuda
    assert {name for name in vars(cuda) if not name.startswith("__")} == CUDA_NAMES
    assert cuda.current_device() == torch.device("cpu") == CPU
    assert cuda.device_count() == 0 and cuda.is_available() is False
    assert cuda.synchronize() is None and cuda.empty_cache() is None
    stream = cuda.Stream(device="cuda")
    assert stream == cuda.current_stream() == cuda.default_stream() and stream != 1
    event = stream.record_event()
    with cuda.stream(stream):
        stream.wait_stream(cuda.current_stream())
        stream.wait_event(event)
    mine = cuda.Event(enable_timing=True)
    assert stream.record_event(mine) is mine and mine.query() is True and event.query() is True
    mine.record(stream)
    mine.wait(stream)
    mine.synchronize()
    stream.synchronize()
    assert cuda.nvtx.range_push("a layer") is None and cuda.nvtx.range_pop() is None


def test_the_devices_generator_is_the_hosts(names) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(11)
    expected = torch.rand(3)
    names.cuda.manual_seed(11)
    state = names.cuda.get_rng_state()
    assert torch.equal(torch.rand(3), expected)
    torch.rand(5)
    names.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(names.cuda.get_rng_state("cuda"), torch.get_rng_state())


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 0)])
def test_tensors_for_the_device_are_made_on_the_host(names, device: object) -> None:  # type: ignore[no-untyped-def]
    like = torch.tensor([7.0, 8.0])
    made = {
        "tensor": names.tensor([1, 2], device=device, pin_memory=True),
        "empty": names.empty(2, dtype=torch.int64, device=device, pin_memory=True),
        "zeros": names.zeros(2, device=device, pin_memory=True),
        "ones": names.ones(2, device=device, pin_memory=True),
        "arange": names.arange(2, device=device),
        "empty_like": names.empty_like(like, device=device),
    }
    assert set(made) == set(FACTORIES)
    for name, tensor in made.items():
        assert tensor.device == torch.device("cpu") and tensor.shape == (2,) and not tensor.is_pinned(), name
    values = {name: made[name].tolist() for name in ("tensor", "zeros", "ones", "arange")}
    assert values == {"tensor": [1, 2], "zeros": [0.0, 0.0], "ones": [1.0, 1.0], "arange": [0, 1]}
    assert made["tensor"].dtype == torch.int64 and made["empty"].dtype == torch.int64
    assert names.zeros(1, device="meta").device == torch.device("meta"), "any other device is as asked"


def test_a_name_that_torch_gets_later_is_found(names, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Submodules of torch are set when they are first imported."""
    monkeypatch.setattr(torch, "imported_later", 7, raising=False)
    assert names.imported_later == 7
    with pytest.raises(AttributeError):
        names.never_there  # noqa: B018


def test_torch_itself_is_as_it_was(names) -> None:  # type: ignore[no-untyped-def]
    assert names.zeros is not torch.zeros and names.cuda is not torch.cuda
    assert torch.zeros.__name__ == names.zeros.__name__ == "zeros"
    for name in ("nn", "float32", "matmul", "Tensor", "distributed", "full", "randn"):
        assert getattr(names, name) is getattr(torch, name)
    assert names.cuda.memory is torch.cuda.memory


@pytest.fixture(scope="module")
def megatron() -> dict[str, ast.Module]:
    found = importlib.util.find_spec("megatron.core")
    assert found is not None and found.submodule_search_locations
    root = Path(found.submodule_search_locations[0])
    texts = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in root.rglob("*.py")}
    return {name: ast.parse(text) for name, text in texts.items() if "cuda" in text and not ELSEWHERE.match(name)}


def test_megatron_says_every_name(megatron: dict[str, ast.Module]) -> None:
    """One that it does not say any more is dead weight, and goes."""
    said, factories = set(), set()
    for node in (node for tree in megatron.values() for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.cuda":
            said.add(node.attr)
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        words = {word.arg: ast.unparse(word.value) for word in node.keywords}
        device = words.get("device", "")
        if "pin_memory" in words or device == "'cuda'" or device == "self.permute_idx_device":  # of the dispatcher
            factories.add(node.func.attr)
    of_older = UNTIL_0_16 if (installed() or ()) >= (0, 17) else set()
    assert said >= CUDA_NAMES - of_older and not said & of_older
    assert factories >= set(FACTORIES)


# ---------------------------------------------------------------- how a module is changed


def answer(kind: str) -> tuple[str, tuple[str, tuple[str, ...]]]:
    return "torch.cuda.FloatTensor" if kind else "other", ("deep", ("torch.cuda.FloatTensor", "deeper"))


def test_literals_are_replaced_in_place_and_a_function_without_them_is_refused() -> None:
    copy = answer
    replace_literals(answer, {"torch.cuda.FloatTensor": "torch.FloatTensor"})
    assert copy("x") == ("torch.FloatTensor", ("deep", ("torch.FloatTensor", "deeper")))
    assert copy("")[0] == "other"
    with pytest.raises(MegatronChanged, match=r"answer holds none of the literals \['torch.cuda.FloatTensor'\]"):
        replace_literals(answer, {"torch.cuda.FloatTensor": "torch.FloatTensor"})


def test_a_redirect_changes_the_modules_that_it_names_and_fits() -> None:
    redirect = Redirect("some", ("megatron.core.jit", "megatron.core.dist*"), lambda module: module.absent, "a reason")
    named = ("megatron.core.jit", "megatron.core.distributed", "megatron.core", "megatron.core.jit.more")
    assert [redirect.concerns(name) for name in named] == [True, True, False, False]
    with pytest.raises(MegatronChanged, match=r"redirect 'some' does not fit megatron\.core\.jit: .*absent"):
        _Watcher.run(ModuleType("megatron.core.jit"), [redirect])
    _Watcher.run(ModuleType("megatron.core"), [redirect])


def test_a_redirect_is_applied_once_to_what_was_imported_before(monkeypatch: pytest.MonkeyPatch) -> None:
    applied: list[str] = []
    module = ModuleType("megatron.of_a_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(redirects, "_WATCHER", _Watcher())
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    row = Redirect("some", (module.__name__,), lambda module: applied.append(module.__name__), "a reason")
    for _ in range(2):
        redirects.activate([row])
        assert (applied, redirects.active()) == ([module.__name__], ("some",))


def test_what_optimizers_took_before_the_corrections_is_corrected_too() -> None:
    """In a process of its own: Megatron-Core is imported here already."""
    program = """
from megatron.core.optimizer import clip_grads, optimizer
from phd_megatron.runtime.context import install_backend
install_backend("cpu")
from megatron.core import utils
assert clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm
assert clip_grads.multi_tensor_scale_impl is optimizer.multi_tensor_scale_impl is utils.local_multi_tensor_scale
print(utils.local_multi_tensor_l2_norm.__name__, utils.local_multi_tensor_scale.__name__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["norm_of_all", "scale_all"]
