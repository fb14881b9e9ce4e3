"""Prompts that a capture holds only as text, made into tokens again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from logitstore.errors import InvalidInputError, MissingDependencyError
from logitstore.tokenizer import TOKENIZER_FILE, Tokenizer


@dataclass(slots=True)
class PromptEncoder:
    """Makes of a text the tokens that an engine may have made of it; pickles.

    Args:
        tokenizer: the teacher's, whole and read from files.
    """

    tokenizer: Tokenizer
    _engine: Any = field(default=None, repr=False)
    _opening: str = field(default="", repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return PromptEncoder, (self.tokenizer,)

    def load(self) -> PromptEncoder:
        """Get ready; called by `encodings` where it was not.

        Raises:
            MissingDependencyError: the package tokenizers is not there.
            InvalidInputError: it cannot read this tokenizer.
        """
        if self._engine is not None:
            return self
        try:
            import tokenizers  # noqa: PLC0415 - an optional dependency
        except ImportError as error:
            says = "encoding the prompts needs the package tokenizers: pip install 'logitstore[tokenizers]'"
            raise MissingDependencyError(says) from error
        path = next((path for path in self.tokenizer.files if path.name == TOKENIZER_FILE), None)
        if path is None:
            raise InvalidInputError("encoding the prompts needs a tokenizer.json; give its path as the tokenizer")
        try:
            self._engine = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # it raises nothing narrower
            raise InvalidInputError(f"{path}: the package tokenizers cannot read it ({error})") from error
        self._engine.no_truncation()
        self._engine.no_padding()
        bos = self.tokenizer.bos_id
        self._opening = self.tokenizer.text([] if bos is None else [bos]) + " "
        return self

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, special tokens in it included and none added."""
        return list(self.load()._engine.encode(text, add_special_tokens=False).ids)

    def encodings(self, text: str) -> Iterator[list[int]]:
        """The tokens that the engine may have made of a prompt, with and without BOS, the likeliest first."""
        tokens = self.encode(text)
        bos = self.tokenizer.bos_id
        if bos is None or tokens[:1] == [bos]:
            yield tokens
        else:
            yield from ([bos, *tokens], tokens) if self.tokenizer.adds_bos else (tokens, [bos, *tokens])
        if bos is not None and text.startswith(self._opening):
            # Some tokenizers put a space before a text, which the reply then shows: not a second one.
            yield [bos, *self.encode(text.removeprefix(self._opening))]
