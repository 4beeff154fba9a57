"""What answers conversations: a model of this process, or an endpoint that speaks OpenAI's protocol (remote.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fettle.generate.prompts import prompter
from fettle.generate.request import Completion, Sampling
from fettle.generate.sample import generate

if TYPE_CHECKING:
    from fettle.models.forest import Forest

Prompt = str | Sequence[Mapping[str, Any]]  # a text to go on from, or a conversation to answer


class Engine(Protocol):
    """Whatever answers prompts. What it gives does not depend on where it runs."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling | None = None, *, n: int = 1, seeds: Sequence[int] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Completion]:  # fmt: skip
        """n answers to each prompt, those of one prompt beside each other: answer j of prompt i is number i * n + j.

        `seeds` gives each answer a number of its own in place of that. `progress(k)` is called when k more have ended.
        """
        ...


@dataclass(frozen=True)
class Local:
    """A model of this process. Texts and conversations become tokens by its own template and tokenizer rules."""

    forest: Forest

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling | None = None, *, n: int = 1, seeds: Sequence[int] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Completion]:  # fmt: skip
        """See `Engine`."""
        render = prompter(self.forest.tokenizer)
        tokens = [render.plain(prompt) if isinstance(prompt, str) else render.chat(prompt) for prompt in prompts]
        return generate(self.forest, tokens, sampling, n=n, seeds=seeds, progress=progress)
