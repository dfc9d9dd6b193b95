"""A world of many ranks in one process that holds nothing, so that the code of one of them can be watched.

Tensors are those of torch's FakeTensorMode, which have a shape and no values, and the process groups are those of
torch's fake backend, which send nothing. What is still asked for is answered here, in one place:

- a transfer is done at once; where the tensors have values, every rank has the same ones;
- a floating-point number that the host reads is 0, which is no overflow and no gradient to be clipped;
- an integer that it reads is refused, since sizes could follow from it;
- tensors that do have values are computed with as ever.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from phd_megatron.errors import UserError
from phd_megatron.runtime.redirects import replaced

T = TypeVar("T")


class _Answers(TorchDispatchMode):
    """What FakeTensorMode cannot know."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        if func.namespace == "c10d":
            return _transferred(func, args)
        tensors = [item for item in tree_iter((args, kwargs)) if isinstance(item, Tensor)]
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return _read(args[0])
        if func is torch.ops.aten.masked_select.default and not isinstance(args[1], FakeTensor):
            with unset_fake_temporarily():
                count = int(args[1].sum())
            return args[0].new_empty(count)
        return func(*args, **kwargs)


def _read(tensor: FakeTensor) -> float | bool:
    constant = getattr(tensor, "constant", None)
    if constant is not None:
        with unset_fake_temporarily():
            return constant.item()
    if tensor.dtype.is_floating_point:
        return 0.0
    raise cannot_follow(f"the host reads a value of {tensor.dtype}, from which a size or a path may follow")


def cannot_follow(what: str) -> UserError:
    """The refusal of a run that does what nobody can say without values."""
    return UserError(
        f"a dry run cannot follow this configuration: {what}; leave out the options that do so, or let plan without "
        "--dry-run say what the run needs by formula"
    )


def _transferred(func: Any, args: Sequence[Any]) -> Any:
    """What an operator of torch.distributed returns when it is done."""
    from torch._C._distributed_c10d import FakeWork

    name = func._overloadpacket.__name__
    if name in ("_allgather_base_", "allgather_"):
        _fill(list(tree_iter(args[0])), list(tree_iter(args[1])))
    elif name not in ("broadcast_", "barrier"):
        known = [t for t in tree_iter(args) if isinstance(t, Tensor) and not isinstance(t, FakeTensor) and t.numel()]
        if known:
            raise cannot_follow(f"{name} of a tensor with values, which is not sent")
    returns = [FakeWork().boxed() if "Work" in str(each.type) else args[0] for each in func._schema.returns]
    return returns[0] if len(returns) == 1 else tuple(returns)


def _fill(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """Gather tensors with values: all ranks have the same."""
    if any(isinstance(tensor, FakeTensor) for tensor in (*outputs, *inputs)):
        return
    (given,) = inputs
    with unset_fake_temporarily():
        for output in outputs:
            output.copy_(given.repeat(output.numel() // given.numel(), *[1] * (given.dim() - 1)).view_as(output))


def with_values(function: Callable[..., T]) -> Callable[..., T]:
    """The function over tensors that have values, in a dry run too: it is small, and its result is looked at."""

    def run(*args: Any, **kwargs: Any) -> T:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return run


@contextlib.contextmanager
def dry_world(rank: int, size: int) -> Iterator[None]:
    """torch.distributed as one rank of so many sees it, for as long as this is entered.

    Only groups with this rank in them are made: a thousand ranks have thousands of others.

    Raises:
        UserError: a rank outside of the world.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if not 0 <= rank < size:
        raise UserError(f"--rank {rank} is not in a world of {size}; ranks count from 0 to {size - 1}")
    if dist.is_initialized():
        raise UserError("torch.distributed is initialised already; a dry run needs a process of its own")
    stock, reduce = dist.new_group, dist.all_reduce

    def new_group(ranks: Sequence[int] | None = None, *args: Any, **kwargs: Any) -> Any:
        if ranks is not None and rank not in ranks:
            return dist.GroupMember.NON_GROUP_MEMBER
        return stock(ranks, *args, **{**kwargs, "backend": "fake"})

    def all_gather_object(gathered: list[T], value: T, group: dist.ProcessGroup | None = None) -> None:
        gathered[:] = [value] * len(gathered)

    def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(tensor, FakeTensor) and op in (dist.ReduceOp.MAX, dist.ReduceOp.MIN):
            return None  # the same on every rank, as later Megatron-Cores ask once whether any has such norms
        return reduce(tensor, op, *args, **kwargs)

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        with replaced(dist, new_group=new_group, all_gather_object=all_gather_object, all_reduce=all_reduce):
            yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def dry_tensors() -> Iterator[None]:
    """Tensors that are made inside have no values, and what is asked of them is answered."""
    with warnings.catch_warnings():
        # An attention kernel asks whether rows are aligned: those of a tensor without memory are, as real ones.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        with FakeTensorMode(allow_non_fake_inputs=True), _Answers(), replaced(nn.Module, _apply=_apply):
            yield


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """In the place of ``Module._apply``, which exchanges a fake parameter for another object.

    Weak references to it, as the optimizer's and autograd's, forbid that. Over real tensors torch sets a parameter's
    data as this does.
    """
    for child in module.children() if recurse else ():
        _apply(child, change)
    for parameter in module._parameters.values():
        if parameter is not None:
            with torch.no_grad():
                parameter.data = change(parameter)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = change(buffer)
    return module
