"""What one rank does in a part of its run, counted operator by operator: transfers, products, memory.

Counted is what torch's dispatcher sees, so nothing of Megatron-Core or of torch.distributed is replaced, and a run over
real tensors is counted by the same lines as one over fake ones.

Conventions: a multiply-add is two operations. Fused attention counts the pairs that it looks at (causal ones halved),
and its backward five products for the forward's two. Bytes of a transfer are those of the whole tensor: what an
all-gather gives, what a reduce-scatter and an all-to-all get, what an all-reduce, a broadcast or a message holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from phd_megatron.planning.live import LiveBytes
from phd_megatron.runtime.dry import cannot_follow

Arguments: TypeAlias = Sequence[Any]


class Transfer(NamedTuple):
    """One kind of transfer over one group.

    ``peer`` is the other rank's number in the group for a message of two ranks, else None.
    """

    kind: str
    group: str  #: torch.distributed's name of it
    peer: int | None = None


class Product(NamedTuple):
    """``batch`` matrix products ``[m, k] @ [k, n]``; of ``attention`` a fused one, with ``m`` queries, ``n`` keys."""

    what: str  #: gemm, attention, attention backward
    batch: int
    m: int
    k: int
    n: int
    causal: bool = False

    @property
    def flops(self) -> int:
        """Operations of one such call."""
        pairs = self.m * self.n
        if self.what == "gemm":
            return 2 * self.batch * pairs * self.k
        if self.causal:
            pairs = self.m * (self.m + 1) // 2
        return 2 * self.batch * pairs * self.k * (2 if self.what == "attention" else 5)


@dataclass
class Counts:
    """Of one part of a run.

    Attributes:
        calls, bytes: of each kind of transfer.
        products: calls of each shape.
        order: transfers and products in their order, where it is asked for.
    """

    calls: Counter[Transfer] = field(default_factory=Counter)
    bytes: Counter[Transfer] = field(default_factory=Counter)
    products: Counter[Product] = field(default_factory=Counter)
    order: list[tuple[Transfer, int] | Product] | None = None

    @property
    def flops(self) -> int:
        """Operations of all products."""
        return sum(product.flops * calls for product, calls in self.products.items())


#: operators of torch.distributed, and which of their arguments is the tensor whose bytes count
_TRANSFERS = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "reduce_": ("reduce", 0),
    "broadcast_": ("broadcast", 0),
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "alltoall_": ("all_to_all", 1),
    "alltoall_base_": ("all_to_all", 1),
    "gather_": ("gather", 1),
    "scatter_": ("scatter", 1),
    "send": ("send", 0),
    "recv_": ("recv", 0),
}
_COALESCED = "coalesced_"
_PEERS = {"send": "dst", "recv_": "src"}


class Trace(TorchDispatchMode):
    """Counts while it is entered.

    Args:
        order: keep the order of what is counted too.

    Attributes:
        live: memory.
        counts: of the present part, see :meth:`part`.
    """

    def __init__(self, order: bool = False) -> None:
        super().__init__()
        self.live, self.counts = LiveBytes(), Counts()
        self._order = order

    @contextmanager
    def part(self) -> Iterator[Counts]:
        """Count what happens inside on its own."""
        before, self.counts = self.counts, Counts(order=[] if self._order else None)
        self.live.restart()
        yield self.counts
        self.counts = before

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Arguments = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # type: ignore[attr-defined]  # where a tensor lies: asked thousands of times
            return out
        packet = func._overloadpacket  # type: ignore[attr-defined]
        if func.namespace == "c10d":  # type: ignore[attr-defined]
            self._transfer(packet.__name__, func, args)
            return self.sent(packet.__name__, out)
        if (shape := _PRODUCTS.get(packet)) is not None:
            self._product(shape(args))
        # What backward makes is told from what it was given, recomputed activations included.
        kind = "backward" if self.live.kind == "activations" and torch._C._current_graph_task_id() != -1 else None
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self.live.see(tensor, kind)
        return out

    def sent(self, name: str, out: Any) -> Any:
        """What the caller of an operator of torch.distributed gets; for tests that wait for it."""
        return out

    def _transfer(self, name: str, func: Any, args: Arguments) -> None:
        if name == "barrier":
            return
        if name not in _TRANSFERS:
            raise cannot_follow(f"torch.distributed does {name}, whose bytes are not counted")
        names = [argument.name for argument in func._schema.arguments]
        group = dist.ProcessGroup.unbox(args[names.index("process_group")]).group_name
        kind, place = _TRANSFERS[name]
        peer = int(args[names.index(_PEERS[name])]) if name in _PEERS else None
        transfer = Transfer(kind, group, peer)
        tensors = [tensor for tensor in tree_iter(args[place]) if isinstance(tensor, torch.Tensor)]
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
        for size in sizes if name.endswith(_COALESCED) else [sum(sizes)]:
            self.counts.calls[transfer] += 1
            self.counts.bytes[transfer] += size
            if self.counts.order is not None:
                self.counts.order.append((transfer, size))

    def _product(self, product: Product) -> None:
        self.counts.products[product] += 1
        if self.counts.order is not None:
            self.counts.order.append(product)


def _of(first: int) -> Callable[[Arguments], Product]:
    """Of two tensors, ``[..., m, k]`` and ``[..., k, n]``, from an argument's place on."""

    def shape(args: Arguments) -> Product:
        one, other = args[first], args[first + 1]
        batch = one.size(0) if one.dim() == 3 else 1
        return Product("gemm", batch, one.size(-2), one.size(-1), other.size(-1))

    return shape


def _grouped(args: Arguments) -> Product:
    """Of ``grouped_mm``: rows of all groups, or for the gradient of the weights, columns of all groups."""
    one, other = args[0], args[1]
    return Product("gemm", 1, one.size(-2), one.size(-1), other.size(-1))


def _attention(args: Arguments) -> Product:
    query, key, causal = args[0], args[1], bool(args[4])
    return Product("attention", query.size(0) * query.size(1), query.size(2), query.size(3), key.size(2), causal)


def _attention_backward(args: Arguments) -> Product:
    query, key, causal = args[1], args[2], bool(args[7])
    batch = query.size(0) * query.size(1)
    return Product("attention backward", batch, query.size(2), query.size(3), key.size(2), causal)


def _table() -> dict[Any, Callable[[Arguments], Product]]:
    """Of the operators that this version of torch has."""
    known = {"mm": _of(0), "bmm": _of(0), "_grouped_mm": _grouped}
    known |= dict.fromkeys(("addmm", "addmm_", "baddbmm", "baddbmm_"), _of(1))  # with _ into a buffer of gradients
    cpu = "_scaled_dot_product_flash_attention_for_cpu"
    known |= {cpu: _attention, f"{cpu}_backward": _attention_backward}
    return {getattr(torch.ops.aten, name): shape for name, shape in known.items() if hasattr(torch.ops.aten, name)}


_PRODUCTS = _table()
