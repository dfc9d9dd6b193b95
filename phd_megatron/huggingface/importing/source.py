"""A Hugging Face directory: its configuration, with its class's defaults, and its tensors one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from phd_megatron.data.generation import GENERATION_FILE, TOKEN_IDS, Values, checked, outside, read_generation
from phd_megatron.errors import UserError
from phd_megatron.huggingface.families import FAMILIES
from phd_megatron.huggingface.family import Family
from phd_megatron.huggingface.importing.spellings import check_spellings
from phd_megatron.huggingface.json_values import Fields
from phd_megatron.huggingface.loading import load_config
from phd_megatron.huggingface.mapping import Rule, VocabRows, some_names
from phd_megatron.huggingface.weights import (
    EMBEDDINGS,
    TOKENIZER_JSON,
    check_config,
    check_json,
    read_json,
    tensor_places,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: tensors that old checkpoints hold and no model reads
_COMPUTED = ("rotary_emb.inv_freq",)
_HEAD = "lm_head.weight"


class HFDirectory:
    """One directory in the form that ``save_pretrained`` writes.

    Raises:
        UserError: if it is none, of an unknown family, or a file of its weights is missing or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.family, self.content = self._read_config()
        self._places = self._read_index()

    def _read_config(self) -> tuple[Family, Fields]:
        self._raw = raw = read_json(self.path / "config.json")
        kind = raw.get("model_type")
        if not isinstance(kind, str) or kind not in FAMILIES:
            raise UserError(
                f"{self.path} holds a model of type {kind!r}; {', '.join(FAMILIES)} can be imported, give one"
            )
        self._found = tensor_places(self.path)
        check_config(self.path / "config.json", raw, self._found)
        check_spellings(self.path / "config.json", raw, FAMILIES[kind].norm_scheme)
        check_json(self.path, TOKENIZER_JSON)
        config = load_config(self.path)
        return FAMILIES[kind], {**config.to_dict(), **_rope_as_now(raw, config)}

    def _read_index(self) -> dict[str, tuple[Path, tuple[int, ...], torch.dtype]]:
        """Tensor name to its file, shape and type."""
        places: dict[str, tuple[Path, tuple[int, ...], torch.dtype]] = {}
        for key, place in self._found.items():
            dtype = _DTYPES.get(place.dtype)
            if dtype is None:
                raise UserError(f"{key} in {place.path} is of type {place.dtype}; export it unquantised")
            places[key] = place.path, place.shape, dtype
        if not places:
            raise UserError(f"{self.path} holds weight files without a tensor; copy it again")
        return {key: place for key, place in places.items() if not key.endswith(_COMPUTED)}

    @property
    def dtype(self) -> torch.dtype:
        """The widest type of its tensors that are not float32 by rule."""
        kinds = {dtype for key, (_, _, dtype) in self._places.items() if not key.endswith("e_score_correction_bias")}
        found = kinds.pop()
        for other in kinds:
            found = torch.promote_types(found, other)
        return found

    def generation(self, vocab_size: int, log: Callable[[str], None]) -> Values:
        """Its defaults of generation; what is not known is left out by name.

        Raises:
            UserError: a value cannot be, or a token is not in the vocabulary.
        """
        values, left_out = read_generation(self.path)
        ids = {name: self._raw.get(name) for name in TOKEN_IDS}
        values = {**checked(ids, self.path / "config.json")[0], **values}
        if names := outside(values, vocab_size):
            raise UserError(
                f"{self.path} says {names[0]}={values[names[0]]}, and its vocabulary has {vocab_size} tokens; correct "
                f"its {GENERATION_FILE} or config.json"
            )
        if left_out:
            log(f"note: {self.path / GENERATION_FILE}: {', '.join(left_out)} left out, as not known here")
        return values

    @property
    def has_tokenizer(self) -> bool:
        """Whether it holds a fast tokenizer's files."""
        return (self.path / "tokenizer.json").is_file()

    def check_complete(self, rules: Iterable[Rule], tied: bool) -> None:
        """Refuse tensors too many, too few, or of a shape that ``config.json`` does not say.

        Raises:
            UserError: naming them.
        """
        rules = list(rules)
        expected = {name for rule in rules for name in rule.hf}
        found = set(self._places)
        if tied and _HEAD in found - expected:
            self._check_copy()
            found.discard(_HEAD)
        if missing := sorted(expected - found):
            raise UserError(f"{self.path} lacks {some_names(missing)}, which its config.json describes; copy it again")
        if left := sorted(found - expected):
            raise UserError(
                f"{self.path} holds {some_names(left)}, for which its config.json has no place; nothing is dropped"
            )
        for rule in rules:
            outline = {name: torch.empty(self._places[name][1], device="meta") for name in rule.hf}
            try:
                shape = tuple(rule.to_mcore(outline).shape)
            except (RuntimeError, IndexError) as error:
                raise self._misfit(rule, rule.shape) from error
            if shape != rule.shape:
                raise self._misfit(rule, rule.shape)

    def _check_copy(self) -> None:
        """Old files hold the head of a tied model, too; one that is another matrix would be lost."""
        embedding = next((name for name in EMBEDDINGS if name in self._places), None)
        if embedding is None:
            return  # which is missing, and said to be
        head, table = self.read([_HEAD, embedding]).values()
        if head.shape != table.shape or not torch.equal(head, table.to(head.dtype)):
            raise UserError(
                f"{self.path} holds {_HEAD}, which is not {embedding}, and its config.json says "
                "tie_word_embeddings=true, which has no place for it; nothing is dropped, so set that to false, or "
                "copy the directory again"
            )

    def _misfit(self, rule: Rule, wanted: tuple[int, ...]) -> UserError:
        shapes = ", ".join(f"{name} {self._places[name][1]}" for name in rule.hf[:3])
        what = "rows of the vocabulary" if isinstance(rule, VocabRows) else f"together {wanted}"
        return UserError(
            f"{self.path}: {shapes} do not fit config.json, which says {what}: {wanted}; correct it, or copy "
            "the directory again"
        )

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Whole tensors on the CPU."""
        found = {}
        for name in names:
            path = self._places[name][0]
            try:
                with safe_open(path, framework="pt") as file:
                    found[name] = file.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{name} cannot be read from {path} ({error}); copy the file again") from error
            if not found[name].isfinite().all():
                raise UserError(
                    f"{name} in {path} holds values that are not finite: nothing can go on from that model; copy the "
                    "file again, or import another one"
                )
        return found


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def _rope_as_now(raw: Fields, config: PreTrainedConfig) -> Fields:
    """Files of before transformers 5 say ``rope_theta`` and ``rope_scaling``; the class has turned them into one."""
    old = [name for name in ("rope_theta", "rope_scaling") if name in raw]
    return {"rope_parameters": dict(config.rope_parameters)} if old else {}
