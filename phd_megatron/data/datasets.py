"""Training, validation and test data of a run.

The training order is drawn in blocks of ``data_horizon_samples``. Within a block it is Megatron's order for that many
samples, or that of packed ones (`packed.py`); the next block is drawn anew with the next seed. Megatron's own order
depends on how many epochs a run asks for, so a run that is extended, or a member of a sweep with another budget, would
see other batches from the start.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.utils.data import Dataset

from phd_megatron.config.schema import RunConfig
from phd_megatron.data.blend import SPLIT_NAMES, SplitPlan, check_split, plan_splits
from phd_megatron.data.index_cache import is_alone
from phd_megatron.data.indexed import IndexedInfo, check_indexed
from phd_megatron.data.one_pass import build_pass
from phd_megatron.data.output import sidecar_of
from phd_megatron.data.samples import Sample, Samples
from phd_megatron.data.tokenizers import Tokenizer, load_tokenizer
from phd_megatron.data.verify import Fingerprint, verify, verify_end
from phd_megatron.errors import UserError

logger = logging.getLogger(__name__)

_MAX_BLOCKS = 256
#: More samples than this, in more passes than that, are a mistake and no run.
_MANY_SAMPLES, _MANY_PASSES = 10**7, 10**4


class BlockedDataset(Dataset[Sample]):
    """Blocks of ``block`` samples one after the other; the last one may be cut by ``length``."""

    def __init__(self, blocks: Sequence[Samples], block: int, length: int) -> None:
        self.blocks, self.block, self.length = blocks, block, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(f"sample {index} of {self.length}")
        return self.blocks[index // self.block][index % self.block]


def resolve_tokenizer(run: RunConfig) -> Tokenizer:
    """The tokenizer named in the run, else the one saved beside the first data prefix. Raises UserError."""
    if run.data.tokenizer is not None:
        return load_tokenizer(run.data.tokenizer)
    prefix = next(plan for plan in plan_splits(run.data) if plan is not None).prefixes[0]
    directory = Path(f"{prefix}.tokenizer")
    if not directory.is_dir():
        raise UserError(
            f"no --tokenizer is given and {directory} does not exist (data not made by `phd-megatron prepare`?); name "
            f"the tokenizer the data was made with"
        )
    return load_tokenizer(directory)


def data_horizon(run: RunConfig, num_train: int) -> int:
    """Samples per block of the training order. Raises UserError unless positive."""
    horizon = run.data.data_horizon_samples
    if horizon is not None and horizon < 1:
        raise UserError(f"--data-horizon-samples {horizon}: must be at least 1; leave it out for the run's own length")
    if horizon is not None and num_train > _MAX_BLOCKS * horizon:
        raise UserError(
            f"--data-horizon-samples {horizon}: {num_train} training samples make more than {_MAX_BLOCKS} blocks of "
            f"this size, each with an index of its own; use a larger horizon, such as the run's own length"
        )
    return horizon or max(1, num_train)


def check_data(run: RunConfig, tokenizer: Tokenizer, wanted: tuple[int, int, int]) -> dict[str, IndexedInfo]:
    """Everything that can be wrong with the data of a run, without building anything or importing Megatron.

    A process that is alone reads every index whole and parts of the tokens; of several ranks one does that for all
    (:func:`verify_data`), once they are connected, and here they look at headers, sizes and sidecars.

    Returns the checked files by prefix. Raises UserError.
    """
    data, model = run.data, run.model
    if model.vocab_size is not None and tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but vocab_size is {model.vocab_size}; set vocab_size to "
            f"at least {tokenizer.vocab_size}, or use the tokenizer the model was made for"
        )
    infos: dict[str, IndexedInfo] = {}
    for index, (plan, count) in enumerate(zip(plan_splits(data), wanted, strict=True)):
        if count <= 0:
            continue
        if plan is None:
            cure = "; or use --eval-iters 0" if index else ""
            raise UserError(
                f"{count} {SPLIT_NAMES[index]} samples are needed but the data gives that split nothing; give it a "
                f"share in --split or its own --{('train', 'valid', 'test')[index]}-data-path{cure}"
            )
        for prefix in plan.prefixes:
            if prefix not in infos:
                infos[prefix] = check_indexed(prefix)
                verify_end(infos[prefix])
                _check_sidecar(infos[prefix], tokenizer)
                if is_alone():
                    verify(infos[prefix], tokenizer.vocab_size)
        tokens = sum(check_split(plan, infos, model.seq_length, index))
        if index == 0:
            _refuse_endless_passes(count, tokens // model.seq_length)
    return infos


def _refuse_endless_passes(samples: int, available: int) -> None:
    """The order of all samples of a block is drawn before the first step, which would take hours and all memory."""
    passes = samples / max(1, available)
    if samples > _MANY_SAMPLES and passes > _MANY_PASSES:
        raise UserError(
            f"the run takes {samples:,} training samples and the data has {available:,}: {passes:,.0f} passes "
            "over it; ask for a shorter run (train_iters, train_samples) or give more data"
        )


def verify_data(
    run: RunConfig, tokenizer: Tokenizer, wanted: tuple[int, int, int]
) -> tuple[list[Fingerprint] | None, ...]:
    """Read the data of a run as :func:`phd_megatron.data.verify.verify` does.

    Returns:
        What the training, validation and test sets hold, each in the order of its prefixes; None for one that is not
        wanted.

    Raises:
        UserError: for data that is damaged or does not fit the tokenizer.
    """
    known: dict[str, Fingerprint] = {}
    found: list[list[Fingerprint] | None] = []
    for plan, count in zip(plan_splits(run.data), wanted, strict=True):
        if plan is None or count <= 0:
            found.append(None)
            continue
        for prefix in plan.prefixes:
            if prefix not in known:
                known[prefix] = verify(check_indexed(prefix), tokenizer.vocab_size)
        found.append([known[prefix] for prefix in plan.prefixes])
    return tuple(found)


def _check_sidecar(info: IndexedInfo, tokenizer: Tokenizer) -> None:
    """Refuse data that is not what its sidecar describes, or was made with a tokenizer of other ids."""
    sidecar = sidecar_of(info)
    if sidecar is None:
        return
    made_id, largest = sidecar["tokenizer"], sidecar.get("max_token_id", 0)
    if largest >= tokenizer.vocab_size:
        hint = f" (it was prepared with {made_id['spec']})" if "spec" in made_id else ""
        raise UserError(
            f"data {info.prefix!r} holds token id {largest}{hint}, but the tokenizer has only {tokenizer.vocab_size} "
            f"tokens; use the tokenizer the data was made with"
        )
    ours = tokenizer.unique_identifiers
    if any(made_id.get(key) != value for key, value in ours.items() if key in ("class", "vocab_size", "eod")):
        raise UserError(
            f"data {info.prefix!r} was made with another tokenizer ({_describe(made_id)}) than this run uses "
            f"({_describe(ours)}); leave --tokenizer out to use the data's own, or prepare the data again"
        )
    if made_id.get("sha256") != ours.get("sha256"):  # may be the same ids written by another version
        logger.warning(
            "data %r was made with tokenizer files of other content than this run's, although size and end of "
            "document agree; if the ids differ too, leave --tokenizer out to use the data's own",
            info.prefix,
        )


def _describe(identifiers: Mapping[str, str | int]) -> str:
    return ", ".join(f"{key} {identifiers[key]}" for key in ("class", "vocab_size", "eod") if key in identifiers)


def build_datasets(
    run: RunConfig, tokenizer: Tokenizer, samples: tuple[int, int, int]
) -> tuple[Samples | None, Samples | None, Samples | None]:
    """Training samples of the wanted number; one pass over validation and test data where any are; None where none are.

    A pass has the samples that the data has, be they more or fewer than wanted
    (:mod:`phd_megatron.data.one_pass`).

    Items are dicts of tensors of shape [seq_length]: tokens, labels (int64), loss_mask (float32), position_ids (int64).
    To be called by all ranks when torch.distributed is initialised; it need not be. Raises UserError.
    """
    infos = check_data(run, tokenizer, samples)
    plans = plan_splits(run.data)
    built: list[Samples | None] = []
    for index, (plan, count) in enumerate(zip(plans, samples, strict=True)):
        if count <= 0 or plan is None:
            built.append(None)
        elif index:
            built.append(build_pass(run, tokenizer, plan, infos, index))
        else:
            horizon = data_horizon(run, count)
            blocks = [
                _build_block(run, tokenizer, plan, infos, horizon, run.training.seed + number)
                for number in range(-(-count // horizon))
            ]
            built.append(BlockedDataset(blocks, horizon, count))
    train, valid, test = built
    return train, valid, test


def _build_block(
    run: RunConfig, tokenizer: Tokenizer, plan: SplitPlan, infos: dict[str, IndexedInfo], count: int, seed: int
) -> Samples:
    """``count`` samples of the training split by Megatron's builder."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

    from phd_megatron.data.gpt_index import IndexedGPTDataset, index_config
    from phd_megatron.data.packed import PackedGPTDataset

    kind = {"none": IndexedGPTDataset, "best_fit": PackedGPTDataset}[run.data.packing]
    weights = plan.weights
    if weights is None and len(plan.prefixes) > 1:
        # Without weights Megatron stops after one epoch of the blend; by tokens is the same mix without an end.
        weights = [float(count) for count in check_split(plan, infos, run.model.seq_length, 0)]
    config = index_config(
        run,
        tokenizer,
        plan,
        infos,
        0,
        random_seed=seed,
        blend=(plan.prefixes, weights),
        # Small blends need more than Megatron's half percent, because each part is rounded up.
        mid_level_dataset_surplus=0.005 + 2.0 * len(plan.prefixes) / count,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's notes on read-only arrays
        dataset = BlendedMegatronDatasetBuilder(kind, [count, 0, 0], lambda: True, config).build()[0]
    if dataset is None or len(dataset) < count:
        raise UserError(
            f"the training split gives {0 if dataset is None else len(dataset)} samples of the {count} wanted; give "
            "more data or ask for fewer"
        )
    return dataset
