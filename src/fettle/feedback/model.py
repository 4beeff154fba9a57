"""A reward model as a reward: a model with a head of one number, which reads a prompt with its answer and scores the last token.

What it reads is made from the text by its own tokenizer and chat template, as in its training (data/preference.py): the policy
may have others. A prompt is computed once for all of its answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fettle.core.errors import FettleError
from fettle.feedback.reward import Asked, Reward, Tools

if TYPE_CHECKING:
    from fettle.core.batch import Example
    from fettle.data.template import Encoded, Encoder
    from fettle.generate.protocol import Prompt
    from fettle.models.forest import Forest

ROW = 4096  # tokens of a batch, unless an example needs more
STEP = 256  # a row's length is a multiple of it, so that shapes come again


class ModelReward(Reward):
    """The score of a reward model: an artifact's folder, whose model the caller has opened."""

    kind: Literal["model"] = "model"
    path: str

    def rate(self, asked: Asked) -> Sequence[float]:
        """The head's number for each answer."""
        if self.path not in asked.means.forests:
            raise FettleError(f"reward '{self.path}': the reward model is not open; give it in Means.forests")
        return model_scores(asked.means.forests[self.path], asked.prompts, asked.answers, self.path, asked.offered)

    def models(self) -> tuple[str, ...]:
        """The reward model."""
        return (self.path,)


def model_scores(
    forest: Forest, prompts: Sequence[Prompt], answers: Sequence[str], name: str = "reward model",
    offered: Sequence[Tools] | None = None,
) -> list[float]:  # fmt: skip
    """What a model with a head of one number gives each answer, in order; `offered` are the tools of each prompt.

    FettleError where it has no such head, or an answer with its prompt is longer than it can see.
    """
    import torch

    from fettle.core.batch import in_rows, pack
    from fettle.data.template import Encoder
    from fettle.models.roles import evaluating

    require_head(forest, name)
    paths = _encoded(Encoder(forest.tokenizer).plain(), prompts, answers, name, offered or [()] * len(answers))
    for i, path in enumerate(paths):
        if forest.context is not None and len(path.tokens) > forest.context:
            raise FettleError(
                f"reward '{name}': {Asked(prompts, answers, None, {}).quoted(i)} has {len(path.tokens)} tokens with its prompt, and "  # type: ignore[arg-type]
                f"the reward model sees {forest.context} at most; lower max_tokens"
            )
    found: list[float] = []
    pad = forest.tokenizer.pad_token_id or 0
    with torch.no_grad(), evaluating(forest.model):
        for group in in_rows(_examples(prompts, paths), ROW):
            length = -(-sum(map(len, group)) // STEP) * STEP
            found += forest.scores(pack(group, length, pad).to(forest.device))[:, 0].float().tolist()
    return found


def require_head(forest: Forest, name: str) -> None:
    """FettleError where a model has no head of one number."""
    if forest.task != "classify" or len(forest.config.id2label) != 1:
        raise FettleError(
            f"reward '{name}': {type(forest.model).__name__} has no head of one number; train one with objective: {{kind: reward}}"
        )


def _encoded(
    encoder: Encoder, prompts: Sequence[Prompt], answers: Sequence[str], name: str, offered: Sequence[Tools]
) -> list[Encoded]:
    """Each prompt, and the tools it offers, with its answer as tokens, of which the answer's are marked."""
    from fettle.data.formats import Sample
    from fettle.data.template import Encoded

    samples, bare = [], {}
    for i, (prompt, answer, tools) in enumerate(zip(prompts, answers, offered, strict=True)):
        if not isinstance(prompt, str):
            turns: tuple[dict[str, Any], ...] = (*map(dict, prompt), {"role": "assistant", "content": answer})
            samples.append(Sample(messages=turns, tools=tuple(tools), weights=(*[0.0] * len(prompt), 1.0)))
        elif answer:
            samples.append(Sample(prompt=prompt, completion=answer))
        else:  # the end came at once
            tokens = [*encoder.prefix, *encoder.ids(prompt), *([encoder.eos] if encoder.eos is not None else [])]
            bare[i] = Encoded(np.array(tokens, np.int32), ((len(tokens) - 1, len(tokens), 1.0),))
    made = iter(encoder.encode(samples))
    found = []
    for i in range(len(answers)):
        encoded = [bare[i]] if i in bare else next(made)
        if isinstance(encoded, str) or len(encoded) != 1 or not encoded[0].learned:
            why = (
                encoded if isinstance(encoded, str) else "its template rewrites earlier turns, or leaves the answer out"
            )
            raise FettleError(f"reward '{name}': {Asked(prompts, answers, None, {}).quoted(i)} cannot be read: {why}")  # type: ignore[arg-type]
        found.append(encoded[0])
    return found


def _examples(prompts: Sequence[Prompt], paths: Sequence[Encoded]) -> Iterator[Example]:
    """Neighbours with the same prompt as one tree each, of a row's tokens at most."""
    from fettle.data.preference import joined_at, tree

    for _, places in groupby(range(len(paths)), lambda i: prompts[i]):
        group: list[Encoded] = []
        size = 0
        for i in places:
            if group and size + len(paths[i].tokens) > ROW:
                yield tree(replace(joined_at(group), labels=(1.0, 0.0)))
                group, size = [], 0
            group.append(paths[i])
            size += len(paths[i].tokens)
        yield tree(replace(joined_at(group), labels=(1.0, 0.0)))
