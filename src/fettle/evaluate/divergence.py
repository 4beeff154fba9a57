"""How far a policy has gone from the model it began as, on answers of its own.

    KL(pi || pi_0) = E_{o ~ pi} [ log pi(o | q) - log pi_0(o | q) ]        nats an answer; unbiased, single terms may be negative

Both log-probabilities are computed as in training, every prompt once for its answers (core/batch.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from fettle.core.batch import Example, Node, in_rows, pack
from fettle.core.errors import FettleError
from fettle.models.roles import evaluating

if TYPE_CHECKING:
    from fettle.models.forest import Forest

ROW = 4096  # tokens of a batch, unless an example needs more
STEP = 256  # a row's length is a multiple of it, so that shapes come again
Tokens = Sequence[int]


def divergences(
    policy: Forest, start: Forest, prompts: Sequence[Tokens], answers: Sequence[Sequence[Tokens]]
) -> list[float]:
    """log pi - log pi_0 of every answer, in nats, prompt by prompt; `answers[i]` are the policy's own to prompt i, at temperature 1.

    FettleError where the two do not read the same tokens.
    """
    require_same_tokens(policy, start)
    now, before = (log_probabilities(forest, prompts, answers) for forest in (policy, start))
    return [a - b for a, b in zip(now, before, strict=True)]


def require_same_tokens(policy: Forest, start: Forest) -> None:
    """FettleError where the two do not read the same tokens."""
    if policy.tokenizer.get_vocab() != start.tokenizer.get_vocab():
        raise FettleError(
            f"{policy.spec.path} and {start.spec.path} have different tokenizers, so that there is no divergence between them"
        )


@torch.no_grad()
def log_probabilities(
    forest: Forest, prompts: Sequence[Tokens], answers: Sequence[Sequence[Tokens]]
) -> list[float]:  # fmt: skip
    """log p(o | q) of every answer, a sum over its tokens, prompt by prompt."""
    found: list[float] = []
    left = iter(answers)
    pad = forest.tokenizer.pad_token_id or 0
    with evaluating(forest.model):
        for group in in_rows([_tree(p, some) for p, some in zip(prompts, answers, strict=True)], ROW):
            length = -(-sum(map(len, group)) // STEP) * STEP
            logps = forest.logps(pack(group, length, pad).to(forest.device)).double().cpu()
            found += [float(part.sum()) for part in logps.split([len(answer) for _ in group for answer in next(left)])]
    return found


def _tree(prompt: Tokens, answers: Sequence[Tokens]) -> Example:
    """The prompt one token short, and its last token at the head of every answer."""
    below = 0 if len(prompt) > 1 else -1
    root = [Node(np.array(prompt[:-1], np.int32), np.zeros(len(prompt) - 1, np.float32))] if below == 0 else []
    leaves = []
    for answer in answers:
        weights = np.ones(1 + len(answer), np.float32)
        weights[0] = 0
        leaves.append(Node(np.array([prompt[-1], *answer], np.int32), weights, below))
    return Example((*root, *leaves))
