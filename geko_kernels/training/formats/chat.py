"""Conversations as token ids, with labels on the assistant's turns."""

from __future__ import annotations

import re
from typing import Any

from geko_kernels.training.data import IGNORED
from geko_kernels.training.formats.errors import DataError
from geko_kernels.training.formats.records import Turn

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatEncoder:
    """Encodes conversations with the tokenizer's chat template; every assistant turn is trained.

    If the template marks what the assistant generates, that is trained. Otherwise an assistant's turn begins after the
    rendering of the turns before it, generation prompt included, and ends where the rendering of it and those ends.

    Raises:
        DataError: the tokenizer has no chat template, or is a slow one.
    """

    def __init__(self, source: str, tokenizer: Any) -> None:
        self.source, self.tokenizer = source, tokenizer
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"{source} holds conversations, and the tokenizer {name} has no chat template: take the model's chat "
                "or instruct version, or set tokenizer.chat_template and save it; data with `prompt` and `completion` "
                "as text need none"
            )
        if not tokenizer.is_fast:
            raise DataError(
                f"{source} holds conversations, for which the tokenizer {name} must be a fast one, which knows each "
                "token's position in the text: load it with use_fast=True"
            )
        try:
            self.marks = _GENERATION.search(tokenizer.get_chat_template()) is not None
        except ValueError as error:  # several templates, and none of them the default
            raise DataError(
                f"{source} holds conversations, but the tokenizer {name} does not say which template to use: {error}"
            ) from error

    def encode(self, where: str, turns: list[Turn], given: int = 0) -> tuple[list[int], list[int]]:
        """(input_ids, labels) of a conversation whose first `given` turns are not trained.

        Raises:
            DataError: the template fails, or does not render the turns up to an assistant's as a prefix of all.
        """
        text = self._apply(where, turns, tokenize=False)
        if self.marks:
            options = {"return_dict": True, "tokenizer_kwargs": {"return_offsets_mapping": True}}
            encoded = self._apply(where, turns, return_assistant_tokens_mask=True, **options)
            start = self._end(where, turns, given, text)
            marks = zip(encoded["assistant_masks"], encoded["offset_mapping"], strict=True)
            trained = [bool(mark) and b > start for mark, (_, b) in marks]
        else:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            spans = [self._span(where, turns, i, text) for i, turn in enumerate(turns) if i >= given and _speaks(turn)]
            trained = [any(a < end and b > start for start, end in spans) for a, b in encoded["offset_mapping"]]
        ids = encoded["input_ids"]
        return ids, [token if counts else IGNORED for token, counts in zip(ids, trained, strict=True)]

    def _end(self, where: str, turns: list[Turn], given: int, text: str) -> int:
        """The end of the first `given` turns in the `text` of all turns."""
        before = self._apply(where, turns[:given], tokenize=False) if given else ""
        if not text.startswith(before):
            raise DataError(
                f"{where}: the chat template does not render the prompt as the beginning of the whole conversation, so "
                "it is unknown which tokens are the completion's: give the turns as `messages`"
            )
        return len(before)

    def _span(self, where: str, turns: list[Turn], index: int, text: str) -> tuple[int, int]:
        """The position of the assistant's turn `index` in the `text` of all turns."""
        if not index:
            raise DataError(
                f"{where}: the conversation begins with a turn of the assistant, but the chat template has a "
                "generation prompt only after another turn: put a turn of the user before it, or remove it"
            )
        before = self._apply(where, turns[:index], tokenize=False, add_generation_prompt=True)
        whole = self._apply(where, turns[: index + 1], tokenize=False)
        if not (whole.startswith(before) and text.startswith(whole)):
            raise DataError(
                f"{where}: the chat template does not render the turns up to the assistant's (turn {index}) as the "
                "beginning of the whole conversation, so it is unknown which tokens are the assistant's: mark them in "
                "the template with {% generation %} and {% endgeneration %}, or split the conversation so that each "
                "part has one assistant turn, the last"
            )
        return len(before), len(whole)

    def _apply(self, where: str, turns: list[Turn], **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(turns, **options)
        except Exception as error:  # a template may raise anything
            told = f"the first {len(turns)} turns ({type(error).__name__}: {error})"
            raise DataError(f"{where}: the chat template cannot render {told}") from error


def _speaks(turn: Turn) -> bool:
    return turn["role"] == "assistant"
