"""``phd-megatron bench documents``: attention over a sample whose documents are kept apart, against one document.

Lengths are drawn as if each token ended its document by the same chance. Beside each time stands its share of the time
without documents, and the share of visible pairs, which is what the work shrinks to. Results are compared with the
definition in float64 before anything is timed.
"""

from __future__ import annotations

import argparse
import itertools
from typing import TYPE_CHECKING

from phd_megatron.bench.arguments import policies_of
from phd_megatron.bench.place import Place, choose_place
from phd_megatron.bench.results import Report, Result, Row
from phd_megatron.bench.timing import BOTH, FORWARD, Contender, differentiable, measure, median_ratio, relative_error
from phd_megatron.console.tables import milliseconds, print_table
from phd_megatron.console.terminal import show

if TYPE_CHECKING:
    import torch

    from phd_megatron.phd.kv_policy import KVPolicy

_CHECKED = 256  # tokens


def run(args: argparse.Namespace) -> int:
    """Check, time, print. 1 if a check fails, or a time is above ``--fail-above`` shares of pairs."""
    place = choose_place(args)
    report = Report(args, place, "mean_document_length", "over_one")
    is_slow = False
    for policy, mean in itertools.product(policies_of(args), args.mean_document_length):
        worst = _error(args, place, policy, min(mean, _CHECKED // 4))
        show(f"{policy.name} with documents of mean {mean} against the definition: worst relative error {worst:.1e}")
        if worst > place.tolerance:
            show(f"error: more than the {place.tolerance:g} allowed, so it is not timed")
            return 1
        result = _result(args, place, policy, mean)
        report.add(result)
        _print(args, place, policy, result)
        apart = result.rows[-1].numbers
        is_slow |= args.fail_above is not None and apart["over_one"] > args.fail_above * apart["share_of_pairs"]
    if is_slow:
        show(f"error: documents take more than {args.fail_above:g} times their share of pairs")
    return int(is_slow)


def _starts(length: int, batch: int, mean: int) -> torch.Tensor:
    """``[batch, length]`` of documents that end with each token by the chance ``1 / mean``."""
    import torch

    from phd_megatron.phd.documents import starts_of_first

    return starts_of_first(torch.rand(batch, length, generator=torch.Generator().manual_seed(1)) < 1 / mean)


def _draw(args: argparse.Namespace, place: Place, policy: KVPolicy, length: int) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output."""
    import torch

    generator = torch.Generator().manual_seed(0)
    heads = (args.heads, args.kv_heads, args.kv_heads, args.heads)
    return [place.draw(generator, policy.repeat, length, args.batch, count, args.head_dim) for count in heads]


def _error(args: argparse.Namespace, place: Place, policy: KVPolicy, mean: int) -> float:
    import torch

    from phd_megatron.kernels.phd_attention import phd_attention

    given, starts = _draw(args, place, policy, _CHECKED), _starts(_CHECKED, args.batch, mean)
    found = []
    for backend, dtype in ((args.backend, place.dtype), ("reference", torch.float64)):
        query, key, value, grad = (x.to(dtype).requires_grad_() for x in given)
        out = phd_attention(query, key, value, policy, backend=backend, starts=starts)
        found.append([out.detach(), *torch.autograd.grad(out, [query, key, value], grad)])
    return relative_error(found[0], found[1])


def _result(args: argparse.Namespace, place: Place, policy: KVPolicy, mean: int) -> Result:
    import torch

    from phd_megatron.kernels.phd_attention import phd_attention
    from phd_megatron.phd.documents import document_lengths

    length = args.seq_length
    query, key, value, grad = (x.requires_grad_() for x in _draw(args, place, policy, length))
    members = {
        "as one document": None,
        "one, kept apart": torch.zeros(args.batch, length, dtype=torch.long),
        "kept apart": _starts(length, args.batch, mean),
    }

    def contender(name: str, starts: torch.Tensor | None) -> Contender:
        def attend() -> torch.Tensor:
            return phd_attention(query, key, value, policy, backend=args.backend, starts=starts)

        return differentiable(name, attend, [query, key, value], grad)

    contenders = [contender(name, starts) for name, starts in members.items()]
    measure(contenders, args.rounds, place.device)
    whole = args.batch * sum(policy.pairs(length))
    rows = []
    for made, starts in zip(contenders, members.values(), strict=True):
        lengths = [[length]] * args.batch if starts is None else [document_lengths(sample) for sample in starts]
        rows.append(
            Row(
                made.name,
                {
                    "documents": sum(map(len, lengths)),
                    "share_of_pairs": sum(sum(policy.document_pairs(sample)) for sample in lengths) / whole,
                    "forward_milliseconds": made.median(FORWARD),
                    "forward_over_one": median_ratio(made.times[FORWARD], contenders[0].times[FORWARD]),
                    "milliseconds": made.median(BOTH),
                    "over_one": median_ratio(made.times[BOTH], contenders[0].times[BOTH]),
                },
            )
        )
    shape: dict[str, str | int | float] = {"policy": policy.name, "seq_length": length, "batch": args.batch}
    shape |= {"heads": args.heads, "kv_heads": args.kv_heads, "head_dim": args.head_dim}
    return Result({**shape, "backend": args.backend, "mean_document_length": mean}, rows)


def _print(args: argparse.Namespace, place: Place, policy: KVPolicy, result: Result) -> None:
    title = f"{policy.name}, {place.dtype_name} on {place.device}, s={args.seq_length} b={args.batch} "
    title += f"heads={args.heads}/{args.kv_heads} d={args.head_dim}, medians of {args.rounds} interleaved rounds"
    lines = [
        [
            row.name,
            f"{row.numbers['documents']:.0f}",
            f"{row.numbers['share_of_pairs']:.3f}",
            milliseconds(row.numbers["forward_milliseconds"]),
            f"{row.numbers['forward_over_one']:.3f}",
            milliseconds(row.numbers["milliseconds"]),
            f"{row.numbers['over_one']:.3f}",
        ]
        for row in result.rows
    ]
    columns = ["documents", "number", "share of pairs", "forward ms", "over one", "+ backward ms", "over one"]
    print_table(title, columns, lines)
