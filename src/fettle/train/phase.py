"""A phase of rollouts: the answers of some prompts, what they were worth, and the batches that are learned from them.

A phase is plain tensors, so that a checkpoint in the middle of one keeps it whole: the policy that wrote it is gone by then.

    prompt, one token short ──┬── its last token + answer 1
                              ├── its last token + answer 2          a position predicts one token (core/batch.py)
                              └── ...                                a prompt of one token stands before each answer instead

Shapes: P prompts, n answers each, A = P n answers, N tokens of all answers one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import orjson
import torch
from torch import Tensor

from fettle.core.batch import Batch, Example, Node, pack
from fettle.data.packing import plan, shuffled
from fettle.objectives.policy import KEYS, Judged

ORDER, PACK = 11, 12  # streams of the random generator


@dataclass(frozen=True)
class Phase:
    """What a phase holds. What a method does not use is empty."""

    number: int
    places: Tensor  # int64 [P]: where the prompts stand in the sequence of prompts
    lengths: Tensor  # int64 [A]
    tokens: Tensor  # int32 [N]
    rewards: Tensor  # float64 [A]
    rollout: Tensor  # float32 [N]: log-probabilities as the sampler gave them
    beta: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    old: Tensor = field(
        default_factory=lambda: torch.empty(0)
    )  # as the trainer computes them; empty for a phase of one step
    reference: Tensor = field(default_factory=lambda: torch.empty(0))
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))
    returns: Tensor = field(default_factory=lambda: torch.empty(0))
    used: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))  # [A]

    @property
    def group(self) -> int:
        """Answers of a prompt."""
        return len(self.lengths) // len(self.places)

    @property
    def starts(self) -> np.ndarray:
        """int64 [A + 1]: where each answer's tokens begin."""
        return np.concatenate([[0], self.lengths.numpy().cumsum()])

    def judged(self, made: Judged) -> Phase:
        """With what a method made of it."""
        used = torch.ones(len(self.lengths), dtype=torch.bool) if made.used is None else made.used
        returns = torch.empty(0) if made.returns is None else made.returns
        return replace(
            self, advantages=made.advantages, returns=returns, used=used, figures=self.figures | made.figures
        )

    def tensors(self) -> dict[str, Tensor]:
        """All of it as tensors."""
        plain = {"number": self.number, "beta": self.beta, "figures": self.figures}
        written = torch.frombuffer(bytearray(orjson.dumps(plain)), dtype=torch.uint8)
        return {"plain": written} | {
            f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }

    @staticmethod
    def of(tensors: dict[str, Tensor]) -> Phase:
        """What `tensors` gave."""
        given: dict[str, Any] = dict(tensors)
        return Phase(**orjson.loads(bytes(given.pop("plain").numpy())), **given)


@dataclass(frozen=True)
class Tree:
    """A prompt with some of its answers: the numbers of the answers, and the tokens that they take in a row."""

    prompt: int
    answers: tuple[int, ...]
    size: int


def trees(phase: Phase, prompts: Sequence[np.ndarray], length: int, chosen: Sequence[int]) -> list[Tree]:
    """The used answers of the `chosen` prompts, in trees of at most `length` tokens."""
    found: list[Tree] = []
    lengths, n = phase.lengths.tolist(), phase.group
    for p in chosen:
        root = len(prompts[p]) - 1
        some: list[int] = []
        size = root
        for a in range(p * n, (p + 1) * n):
            if not phase.used[a]:
                continue
            if some and size + 1 + lengths[a] > length:
                found.append(Tree(p, tuple(some), size))
                some, size = [], root
            some.append(a)
            size += 1 + lengths[a]
        if some:
            found.append(Tree(p, tuple(some), size))
    return found


def rows_of(made: Sequence[Tree], length: int, seed: int, place: int) -> list[list[Tree]]:
    """Trees by the rows of `length` tokens that they are packed into."""
    if not made:
        return []
    found = plan(np.array([tree.size for tree in made]), length, True, seed, PACK, place)
    return [[made[i] for i in found.row(r)] for r in range(len(found))]


def parts_of(prompts: int, parts: int, seed: int, turn: int) -> list[np.ndarray]:
    """The prompts of a phase in the order of one pass, cut into the optimizer steps of that pass."""
    return np.array_split(shuffled(prompts, seed, ORDER, turn), parts)


def example(phase: Phase, prompt: np.ndarray, tree: Tree, weights: np.ndarray, name: str) -> list[Example]:
    """A tree as examples to pack; `weights` float32 [A] are those of each answer's tokens."""
    starts, tokens = phase.starts, phase.tokens.numpy()
    below = 0 if len(prompt) > 1 else -1
    nodes = []
    for a in tree.answers:
        answer = tokens[starts[a] : starts[a + 1]]
        learned = np.full(1 + len(answer), weights[a], dtype=np.float32)
        learned[0] = 0
        nodes.append(Node(np.concatenate([prompt[-1:], answer]).astype(np.int32), learned, below))
    if below < 0:
        return [Example((node,), name) for node in nodes]
    root = Node(prompt[:-1], np.zeros(len(prompt) - 1, dtype=np.float32))
    return [Example((root, *nodes), name)]


def batch_of(
    phase: Phase, row: Sequence[Tree], prompts: Sequence[np.ndarray], names: Sequence[str], weights: np.ndarray, shape: tuple[int, int]
) -> Batch:  # fmt: skip
    """A row of trees as a batch of `shape` (length, pad), with what a method needs of its answers' tokens (objectives/policy.py)."""
    length, pad = shape
    examples = [e for tree in row for e in example(phase, prompts[tree.prompt], tree, weights, names[tree.prompt])]
    batch = pack(examples, length, pad)
    answers = [a for tree in row for a in tree.answers]
    starts = phase.starts
    index = [np.arange(starts[a], starts[a + 1]) for a in answers]
    places = torch.from_numpy(np.concatenate(index) if index else np.zeros(0, dtype=np.int64))
    batch.extra["answer"] = torch.from_numpy(np.repeat(np.arange(len(answers)), [len(i) for i in index]))
    given = {key: getattr(phase, key) for key in KEYS if key != "answer"}
    if len(phase.old):
        given.pop("rollout")  # it was compared when the phase was made, before the policy moved
    batch.extra |= {key: value[places] for key, value in given.items() if len(value)}
    batch.extra["places"] = places
    return batch
