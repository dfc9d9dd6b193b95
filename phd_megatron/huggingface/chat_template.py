"""Chat templates: Jinja texts that say how a conversation becomes a prompt, rendered in transformers' sandbox alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from phd_megatron.config.files import read_text
from phd_megatron.errors import UserError, shown
from phd_megatron.huggingface.loading import first_words, load_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_FILE = "chat_template.jinja"
_LARGEST = 1 << 20  # bytes of a template
_CURE = "give the Jinja text of a chat template"
#: of which each word has to be in what a template makes of it
_TRIAL = (
    {"role": "user", "content": "question-one"},
    {"role": "assistant", "content": "answer-one"},
    {"role": "user", "content": "question-two"},
)


def read_template(path: str | Path) -> str:
    """The text of a template's file.

    Raises:
        UserError: it is no regular file of UTF-8 text, too large, or empty.
    """
    text = read_text(path, _CURE, _LARGEST)
    if not text.strip():
        raise UserError(f"{path} is empty; {_CURE}")
    return text


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], template: str | None = None
) -> str:
    """The conversation as text, up to where the answer begins; by the tokenizer's own template unless one is given.

    Raises:
        UserError: with what the template says, where it is wrong or refuses the conversation.
    """
    given = {} if template is None else {"chat_template": template}
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True, **given
        )
    except Exception as error:  # a template may raise anything, of its own choice too
        raise UserError(
            f"the chat template makes no text of this conversation: {first_words(error)}; change the conversation, or "
            "the template"
        ) from error
    return text


def check_template(tokenizer: PreTrainedTokenizerBase, template: str, named: str | Path) -> None:
    """Refuse a template that does not compile, or does not say all of a conversation of two turns.

    Raises:
        UserError: naming the template's file.
    """
    try:
        text = render(tokenizer, _TRIAL, template)
    except UserError as error:
        raise UserError(f"{named}: {error}") from error
    if missing := [message["content"] for message in _TRIAL if message["content"] not in text]:
        raise UserError(
            f"{named}: of a conversation of two turns it leaves out {', '.join(missing)} and makes {shown(text)}; a "
            "template says every message"
        )


def add_template(directory: Path, template: str, named: str | Path) -> None:
    """Save a template with the tokenizer of a directory, whose own one, if any, it replaces.

    Raises:
        UserError: see :func:`check_template`.
    """
    from transformers import AutoTokenizer

    try:
        # With the configuration at hand transformers does not look for the class that the directory names.
        tokenizer = AutoTokenizer.from_pretrained(
            directory, config=load_config(directory), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # what a damaged tokenizer makes the libraries raise is of many kinds
        raise UserError(f"the tokenizer cannot be loaded to try {named} with: {first_words(error)}") from error
    check_template(tokenizer, template, named)
    (directory / TEMPLATE_FILE).write_text(template, encoding="utf-8")
