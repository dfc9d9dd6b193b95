"""A model that is served: its name, tokenizer and special tokens, and what becomes of texts and conversations."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from phd_megatron.errors import UserError, shown
from phd_megatron.huggingface.chat_template import render
from phd_megatron.huggingface.generation import check_prompt, check_tokens
from phd_megatron.serving.refusals import Refusal
from phd_megatron.serving.token_text import BROKEN, TokenText

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NO_TEMPLATE = (
    "the model {name} has no chat template, so it is not known how it was taught to read a conversation; use "
    "/v1/completions, or export it again with --chat-template FILE"
)
#: of a generation_config.json, what says nothing about how tokens are chosen, or is taken over
_TAKEN = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "max_length")


class Served:
    """What requests are turned into tokens with.

    Args:
        name: what clients call the model.
    """

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name = name
        self.vocabulary: int = model.get_input_embeddings().num_embeddings
        self._tokenizer = tokenizer
        self._reading = threading.Lock()  # the library's tokenizer cannot be set up by two threads at once
        self._writer = copy.deepcopy(tokenizer)  # of the engine's thread alone
        ends = model.generation_config.eos_token_id
        self.ends: tuple[int, ...] = tuple(ends) if isinstance(ends, (list, tuple)) else () if ends is None else (ends,)

    @property
    def has_template(self) -> bool:
        """Whether it can read conversations."""
        return bool(self._tokenizer.chat_template)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, on the engine's thread; special tokens have none."""
        text: str = self._writer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def text_of(self, tokens: Sequence[int]) -> str:
        """The same for every other thread."""
        with self._reading:
            text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def token_name(self, token: int) -> tuple[str, bool]:
        """What one token is called beside its probability, and whether that is its text: one of whole characters."""
        with self._reading:
            text: str = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
            if text and BROKEN not in text:
                return text, True
            name: str | None = self._tokenizer.convert_ids_to_tokens(token)
        # A row of the embedding beyond the tokenizer's words has no name.
        return (f"token {token}" if name is None else name), False

    def offsets(self, tokens: Sequence[int]) -> list[int]:
        """Where the text of each token begins, in characters."""
        text, found, length = TokenText(self.text_of, ()), [], 0
        for token in tokens:
            found.append(length)
            length += len(text.take(token))
        return found

    def tokens_of(self, text: str, param: str = "prompt", *, special: bool = True) -> tuple[int, ...]:
        """Tokens of a text, at least one; ``special`` ones are added as the tokenizer does for ``generate``.

        Raises:
            Refusal: it is no text or has no tokens, or the tokenizer is another model's.
        """
        try:
            check_prompt(text)
            with self._reading:
                tokens = tuple(self._tokenizer(text, add_special_tokens=special)["input_ids"])
            check_tokens(text, tokens, self.vocabulary)
        except UserError as error:
            raise Refusal(str(error), param=param) from error
        return tokens

    def checked(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Tokens that a client gives.

        Raises:
            Refusal: there are none, or one is not in the vocabulary.
        """
        if not tokens:
            raise Refusal("a prompt has no tokens; give at least one", param="prompt")
        if wrong := [token for token in tokens if not 0 <= token < self.vocabulary]:
            raise Refusal(
                f"token {shown(wrong[0])} in prompt: the model's vocabulary is 0 to {self.vocabulary - 1}; use its own "
                "tokenizer",
                param="prompt",
            )
        return tuple(tokens)

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Tokens of a conversation up to where the answer begins.

        Raises:
            Refusal: the model has no template, or that refuses the conversation.
        """
        if not self.has_template:
            raise Refusal(NO_TEMPLATE.format(name=self.name), param="messages", code="no_chat_template")
        for message in messages:
            try:
                check_prompt(message["content"])
            except UserError as error:
                raise Refusal(str(error), param="messages") from error
        try:
            with self._reading:
                text = render(self._tokenizer, messages)
        except UserError as error:
            raise Refusal(str(error), param="messages") from error
        return self.tokens_of(text, "messages", special=False)


def unused_defaults(model: PreTrainedModel) -> list[str]:
    """What ``generation_config.json`` says of how tokens are chosen, which a request says instead."""
    found: Callable[[], dict[str, object]] = model.generation_config.to_diff_dict
    return [
        f"{name}={shown(value)}" for name, value in sorted(found().items()) if name not in _TAKEN and name[0] != "_"
    ]
