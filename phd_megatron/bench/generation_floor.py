"""The models of ``bench generate``, and what they cannot do without, as a table beside their times."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from phd_megatron.config.architecture import architecture_of
from phd_megatron.config.plain import Plain
from phd_megatron.config.schema import ModelConfig
from phd_megatron.console.tables import print_table
from phd_megatron.planning.generation import Work, pass_work


def model_of(variant: str, repeat: int, args: argparse.Namespace) -> ModelConfig:
    """A contender's model: ``cswa``, ``swa``, ``phd``, or with ``repeat`` 1 ``vanilla``."""
    windows = {"cswa": (args.window, args.chunk), "swa": (args.window, None)}
    window, chunk = windows.get(variant, (1, None))
    return ModelConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        max_position_embeddings=max(args.repeats) * (args.prompt + (args.rounds + 2) * args.steps),
        init_method_std=0.02,
        norm_scheme=args.norm_scheme,
        phd_repeat=repeat,
        phd_window=window,
        phd_chunk=chunk,
    )


def print_floors(
    contenders: Sequence[tuple[str, str, int]], args: argparse.Namespace, element: int
) -> list[dict[str, Plain]]:
    """Print operations and bytes; the first contender is what others are compared with.

    Args:
        contenders: name, variant and K of each.
        element: bytes of a number.

    Returns:
        The same numbers for each contender's record.
    """
    works = [_works(variant, repeat, args, element) for _, variant, repeat in contenders]
    columns, rows = ["model"], [[name] for name, _, _ in contenders]
    records: list[dict[str, Plain]] = []
    for part in works[0]:
        columns += [f"{part} GFLOP", "x vanilla", "MB of weights", "originals", "hidden", "x vanilla"]
        vanilla = works[0][part]
        for row, work in zip(rows, (works[part] for works in works), strict=True):
            row += [f"{work.flops / 1e9:.4g}", f"{work.flops / vanilla.flops:.3f}"]
            row += [f"{count / 1e6:.4g}" for count in (work.weights, work.originals, work.hidden)]
            row.append(f"{work.bytes / vanilla.bytes:.3f}")
    for each in works:
        records.append({f"{part}_floor": _plain(work) for part, work in each.items()})
    print_table("floor: operations, and bytes that have to move", columns, rows)
    return records


def _works(variant: str, repeat: int, args: argparse.Namespace, element: int) -> dict[str, Work]:
    """Of the prompt and of one token behind it; naive repetition is vanilla with K times the tokens."""
    width = repeat if variant == "naive" else 1
    model = architecture_of(model_of("vanilla" if variant == "naive" else variant, repeat // width, args))
    prompt, size = args.prompt * width, {"batch": args.batch, "element": element}
    return {
        "prefill": pass_work(model, args.vocab_size, past=0, new=prompt, **size),
        "decode": pass_work(model, args.vocab_size, past=prompt, new=width, **size),
    }


def _plain(work: Work) -> dict[str, Plain]:
    return {"flops": work.flops, "weights": work.weights, "originals": work.originals, "hidden": work.hidden}
