"""Rollouts: batches that are made while the run goes on, from what the model has become.

for each phase:  write n answers to each of P prompts          the sampler's log-probabilities beside them
                 reward them                                    a number for each answer
                 compute what the method needs in forest rows   the trainer's log-probabilities, the reference's, the critic's values
                 advantages                                     the method's (objectives/)
for each step of the phase:  rows of trees, every prompt once for its answers, that take `passes` passes in `parts` steps each

Everything is a function of (seed, phase), of the weights at its beginning, and of what the method remembers; so a run that is
resumed in the middle of a phase goes on with the phase that its checkpoint holds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson
import torch
from pydantic import Field
from rich.console import Console
from torch import Tensor

from fettle.core.batch import IGNORE, Batch
from fettle.core.errors import FettleError
from fettle.core.files import write_bytes
from fettle.core.spec import Spec
from fettle.data.prompts import Prompt, Prompts
from fettle.data.source import Corpus
from fettle.generate.sample import Completion, Sampling, generate
from fettle.models.critic import values_of
from fettle.models.memory import worst_batch
from fettle.models.roles import evaluating
from fettle.objectives.policy import KEYS, Answers, PolicyGradient, compare, each_weight
from fettle.train.parallel import World
from fettle.train.phase import Phase, Tree, batch_of, parts_of, rows_of, trees

ROWS = 1 << 20  # batches are numbered step * ROWS + row
WORST = 5  # prompts that an error names


class Scored(Protocol):
    """Rewards of answers, and the parts they are made of (feedback/reward.py: Scores)."""

    total: list[float]
    parts: dict[str, list[float]]


Score = Callable[[Sequence[Prompt], Sequence[str]], Scored]


class RolloutSpec(Spec):
    """How a phase is made. Answers are drawn from the policy itself: temperature 1, no filter and no penalty."""

    prompts: int = Field(default=16, ge=1, description="prompts of a phase")
    answers: int = Field(default=8, ge=1, description="answers to each")
    max_tokens: int = Field(default=128, ge=1, description="most tokens of an answer")
    stop: tuple[str, ...] = Field(default=(), description="texts that end an answer")
    passes: int = Field(default=1, ge=1, description="how often a phase's answers are learned from")
    parts: int = Field(default=1, ge=1, description="optimizer steps of a pass, each on its share of the prompts")
    unfinished: float | None = Field(
        default=None, allow_inf_nan=False, description="the reward of an answer that does not end by itself, in place of its own"
    )  # fmt: skip
    batch_tokens: int = Field(
        default=65536, ge=1, description="bounds the sampler's cache: answers x (prompt + max_tokens)"
    )

    @property
    def steps(self) -> int:
        """Optimizer steps of a phase."""
        return self.passes * self.parts


@dataclass(frozen=True)
class Mix:
    """Pre-training rows beside the answers: `rows` of them a step, weighted so that their mean loss counts `coefficient` times."""

    corpus: Corpus
    rows: int
    coefficient: float


@dataclass(frozen=True)
class Actors:
    """Who takes part. `score` rewards answers of prompts; `reference` gives, within a `with`, the forest that the policy began as."""

    policy: Any
    score: Score
    reference: Callable[[], AbstractContextManager[Any]]
    mix: Mix | None = None


class Rollouts:
    """A source of batches for the loop (train/loop.py: Phased)."""

    def __init__(
        self, actors: Actors, prompts: Prompts, objective: PolicyGradient, spec: RolloutSpec, shape: tuple[int, int],
        seed: int = 0, folder: Path | None = None,
    ) -> None:  # fmt: skip
        """`shape` is (tokens of a row, the id of padding); what is written and rewarded is left in `folder`, where there is one."""
        if lack := objective.lack(spec.answers):
            raise FettleError(f"rollouts.answers: {lack}")
        self.actors, self.prompts, self.objective, self.spec = actors, prompts, objective, spec
        self.shape, self.seed, self.folder = shape, seed, folder
        self.world = World()
        self.phase: Phase | None = None
        self.memory: dict[str, float] = {}
        self._rows: dict[int, list[list[Tree]]] = {}

    # What the loop asks for.

    def begin(self, step: int, world: World) -> list[int]:
        """The batches of optimizer step `step`, as many for each process; makes the phase that it belongs to."""
        self.world = world
        number = step // self.spec.steps
        if self.phase is None or self.phase.number != number:
            self.phase = self._made(number)
            self._rows.clear()
        rows = len(self.rows(step)) + (self.actors.mix.rows if self.actors.mix else 0)
        rows += (
            -rows % world.size if rows else world.size
        )  # a step in which nobody learns still has a batch, an empty one
        return [step * ROWS + row for row in range(rows)]

    def batch(self, index: int) -> Batch:
        """A row of answers, then the rows of the mix; the first row also counts the answers that are left out."""
        step, at = divmod(index, ROWS)
        assert self.phase is not None
        rows = self.rows(step)
        if self.actors.mix is not None and len(rows) <= at < len(rows) + self.actors.mix.rows:
            return self._mixed(step, at - len(rows))
        row = rows[at] if at < len(rows) else []
        weights, counts = each_weight(self.phase.lengths, self.objective.per(), self.spec.max_tokens)
        asked = self._asked(self.phase.places)
        batch = batch_of(
            self.phase, row, [p.tokens for p in asked], [p.name for p in asked], weights.numpy(), self.shape
        )
        counted = [a for tree in row for a in tree.answers] if at else self._answers_of(step, rows)
        batch.extra["count"] = counts[counted].sum(dtype=torch.float64)
        if not rows:
            batch.extra["count"].clamp_min_(1.0 - at)  # a step in which nobody learns has the loss 0
        batch.extra["beta"] = torch.tensor(self.phase.beta, dtype=torch.float64)
        return batch

    def figures(self, step: int) -> dict[str, float]:
        """What the phase of a step came to; the time it took stands at its first step."""
        assert self.phase is not None
        found = {"phase": self.phase.number + 1, "beta": self.phase.beta, **self.phase.figures}
        if step % self.spec.steps:
            found.pop("rollout_seconds", None)
        return found

    def state(self) -> dict[str, Tensor]:
        """The phase and what the method remembers."""
        memory = torch.frombuffer(bytearray(orjson.dumps(self.memory)), dtype=torch.uint8)
        return {"memory": memory} | (self.phase.tensors() if self.phase is not None else {})

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state` gave."""
        given = dict(tensors)
        self.memory = orjson.loads(bytes(given.pop("memory").numpy()))
        self.phase = Phase.of(given) if given else None
        self._rows.clear()

    def texts(self) -> list[str]:
        """The answers of the phase as text."""
        assert self.phase is not None
        pieces = self.phase.tokens.split(self.phase.lengths.tolist())
        return [self.actors.policy.tokenizer.decode(piece.tolist(), skip_special_tokens=True) for piece in pieces]

    # A phase.

    def rows(self, step: int) -> list[list[Tree]]:
        """The rows of trees of an optimizer step."""
        assert self.phase is not None
        if step not in self._rows:
            asked = [p.tokens for p in self._asked(self.phase.places)]
            turn, part = divmod(step % self.spec.steps, self.spec.parts)
            turn += self.phase.number * self.spec.passes
            chosen = parts_of(len(asked), self.spec.parts, self.seed, turn)[part].tolist()
            self._rows[step] = rows_of(trees(self.phase, asked, self.shape[0], chosen), self.shape[0], self.seed, step)
        return self._rows[step]

    def _answers_of(self, step: int, rows: list[list[Tree]]) -> list[int]:
        """The answers that the first row of a step counts: its own, and those of the step that are in no row."""
        assert self.phase is not None
        turn, part = divmod(step % self.spec.steps, self.spec.parts)
        turn += self.phase.number * self.spec.passes
        n, kept = self.phase.group, {a for row in rows[1:] for tree in row for a in tree.answers}
        if self.objective.only_used:
            return [a for row in rows[:1] for tree in row for a in tree.answers]
        chosen = parts_of(len(self.phase.places), self.spec.parts, self.seed, turn)[part].tolist()
        return [a for p in chosen for a in range(p * n, (p + 1) * n) if a not in kept]

    def _asked(self, places: Tensor) -> list[Prompt]:
        return [self.prompts.at(place) for place in places.tolist()]

    def _made(self, number: int) -> Phase:
        """Write, reward, compute, judge."""
        began, spec, n = time.perf_counter(), self.spec, self.spec.answers
        places = torch.arange(number * spec.prompts, (number + 1) * spec.prompts)
        asked = self._asked(places)
        written, rewards, parts = self._written(number, asked)
        phase = Phase(
            number=number, places=places, rewards=torch.tensor(rewards, dtype=torch.float64),
            lengths=torch.tensor([len(c.tokens) for c in written]),
            tokens=torch.tensor([t for c in written for t in c.tokens], dtype=torch.int32),
            rollout=torch.tensor([x for c in written for x in c.logps], dtype=torch.float32),
            beta=self.memory.get("beta", self.objective.kl.beta), used=torch.ones(len(written), dtype=torch.bool),
        )  # fmt: skip
        phase = self._computed(phase, asked)
        answers = Answers(
            n, phase.lengths, phase.rewards, phase.old if len(phase.old) else phase.rollout,
            phase.reference if len(phase.reference) else None, phase.values if len(phase.values) else None,
        )  # fmt: skip
        figures = phase.figures | _figures(answers, written) | parts
        phase = replace(phase, figures=figures).judged(self.objective.judge(answers, phase.beta, self.memory))
        self._bound(answers, figures, asked)
        self.memory["beta"] = self.objective.kl.adapted(phase.beta, figures.get("kl", 0.0))
        self._leave(phase, answers, asked, written)
        return replace(phase, figures=phase.figures | {"rollout_seconds": time.perf_counter() - began})

    def _written(self, number: int, asked: Sequence[Prompt]) -> tuple[list[Completion], list[float], dict[str, float]]:
        """The answers, their rewards, and the means of the rewards' parts; every process does its share of the prompts."""
        n, spec = self.spec.answers, self.spec
        sampling = Sampling(max_tokens=spec.max_tokens, temperature=1.0, stop=spec.stop, seed=self.seed)
        own = range(self.world.rank, len(asked), self.world.size)
        first = number * len(asked) * n
        seeds = [first + i * n + j for i in own for j in range(n)]
        mine = [asked[i] for i in own]
        made: list[Completion] = []
        total: list[float] = []
        parts: dict[str, list[float]] = {}
        if mine:
            tokens = [p.tokens.tolist() for p in mine]
            made = generate(self.actors.policy, tokens, sampling, n=n, seeds=seeds, batch_tokens=spec.batch_tokens)
            scores = self.actors.score([p for p in mine for _ in range(n)], [c.text for c in made])
            total, parts = _checked(scores.total, made, mine, n), scores.parts if len(scores.parts) > 1 else {}
        if spec.unfinished is not None:
            total = [r if c.reason in ("end", "stop") else spec.unfinished for r, c in zip(total, made, strict=True)]
        shares = self.world.gather((made, total, parts))
        order = [(i % self.world.size, i // self.world.size) for i in range(len(asked))]
        written = [shares[rank][0][k * n + j] for rank, k in order for j in range(n)]
        rewards = [shares[rank][1][k * n + j] for rank, k in order for j in range(n)]
        names = dict.fromkeys(name for share in shares for name in share[2])
        means = {name: sum(sum(share[2].get(name, ())) for share in shares) / len(written) for name in names}
        return written, rewards, {f"reward_{name}": value for name, value in means.items()}

    def _computed(self, phase: Phase, asked: Sequence[Prompt]) -> Phase:
        """With what needs a forward pass over the answers: by rows, each process its share of them."""
        objective, steps = self.objective, self.spec.steps
        wanted = [("old", steps > 1), ("reference", objective.kl.asked), ("values", objective.critic)]
        names = [name for name, needed in wanted if needed]
        prompts, where = [p.tokens for p in asked], [p.name for p in asked]
        ones = np.ones(len(phase.lengths), dtype=np.float32)
        rows = rows_of(trees(phase, prompts, self.shape[0], range(len(asked))), self.shape[0], self.seed, phase.number)
        found = {name: torch.zeros(len(phase.tokens)) for name in names}
        gaps: list[tuple[float, float]] = []
        for row in rows[self.world.rank :: self.world.size] if names else ():
            batch = batch_of(phase, row, prompts, where, ones, self.shape)
            places = batch.extra["places"]
            for name in names:
                found[name][places] = self._one(name, batch).float().cpu()
            if "old" in found:
                total, count = compare(found["old"][places], phase.rollout[places], objective.gap, batch.names)
                gaps.append((float(total), float(count)))
        summed = torch.tensor([[0.0, 0.0], *gaps], dtype=torch.float64).sum(0)
        *shares, summed = self._summed([*found.values(), summed])
        found = dict(zip(names, shares, strict=True))
        figures = {"gap": float(summed[0] / summed[1])} if "old" in found else {}
        return replace(phase, figures=figures, **found)  # type: ignore[arg-type]

    def _summed(self, tensors: list[Tensor]) -> list[Tensor]:
        """Sums over the processes, which exchange what lies on the policy's device."""
        there = [t.to(self.actors.policy.device) for t in tensors]
        self.world.sum(there)
        return [t.cpu() for t in there]

    @torch.no_grad()
    def _one(self, name: str, batch: Batch) -> Tensor:
        policy = self.actors.policy
        if name == "reference":
            with self.actors.reference() as forest, evaluating(forest.model):
                return forest.logps(batch)  # type: ignore[no-any-return]
        with evaluating(policy.model):
            return values_of(policy, batch) if name == "values" else policy.logps(batch)

    def _bound(self, answers: Answers, figures: dict[str, float], asked: Sequence[Prompt]) -> None:
        """Stop or warn where the policy has come apart from its reference."""
        kl = self.objective.kl
        if kl.limit is None or answers.reference is None or figures["kl_token"] <= kl.limit:
            return
        each = answers.divergence() / answers.lengths
        worst = each.view(-1, answers.group).mean(1).argsort(descending=True)[:WORST].tolist()
        shown = "; ".join(f"{asked[i].name} ({asked[i].question[:60]!r})" for i in worst)
        said = (
            f"objective.kl: the policy is {figures['kl_token']:.3g} nats a token from its reference, more than {kl.limit:g}, most on "
            f"{shown}; lower optim.lr or raise objective.kl.beta"
        )
        if kl.beyond == "stop":
            raise FettleError(f"{said}; the last checkpoint is from before (kl.beyond: warn goes on all the same)")
        if self.world.first:
            Console(stderr=True).print(f"warning: {said}", markup=False, highlight=False)

    def _leave(
        self, phase: Phase, answers: Answers, asked: Sequence[Prompt], written: Sequence[Completion]
    ) -> None:  # fmt: skip
        """Write the phase's answers down, for people to read what is rewarded."""
        if self.folder is None or not self.world.first:
            return
        kl = answers.divergence().tolist()
        rows = [
            {
                "prompt": asked[a // phase.group].name, "question": asked[a // phase.group].question, "answer": c.text,
                "reward": phase.rewards[a].item(), "kl": kl[a], "tokens": len(c.tokens), "ended": c.reason,
                **({"kept": bool(phase.used[a])} if self.objective.only_used else {}),
            }
            for a, c in enumerate(written)
        ]  # fmt: skip
        lines = b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)
        write_bytes(self.folder / f"phase-{phase.number + 1:06d}.jsonl", lines)

    # The mix.

    def _mixed(self, step: int, at: int) -> Batch:
        """A row of pre-training data, whose weights make the step's rows of it count as the coefficient says."""
        mix, phase = self.actors.mix, self.phase
        assert mix is not None and phase is not None
        rows = [mix.corpus.batch(step * mix.rows + i) for i in range(mix.rows)]
        learned = sum(float(row.weights[row.targets != IGNORE].sum()) for row in rows)
        _, counts = each_weight(phase.lengths, self.objective.per(), self.spec.max_tokens)
        made = self.rows(step)
        inside = self._answers_of(step, made) + [a for row in made[1:] for tree in row for a in tree.answers]
        batch, count = rows[at], counts[inside].sum(dtype=torch.float64).clamp_min(1.0)
        batch.extra["mixed"] = torch.tensor(True)
        batch.extra["count"] = (
            count if not made and not at else torch.zeros_like(count)
        )  # where no row of answers counts
        return replace(batch, weights=batch.weights * (mix.coefficient * float(count) / (learned or 1.0)))


def _checked(rewards: Sequence[float], written: Sequence[Completion], asked: Sequence[Prompt], n: int) -> list[float]:
    """The rewards; FettleError unless they are finite numbers, one an answer."""
    if len(rewards) != len(written):
        raise FettleError(f"reward: {len(rewards)} rewards for {len(written)} answers")
    for i, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise FettleError(f"reward: {reward} for the answer {written[i].text[:60]!r} to {asked[i // n].name}")
    return list(rewards)


def _figures(answers: Answers, written: Sequence[Completion]) -> dict[str, float]:
    """What is said of a phase beside the loss. `entropy`: the mean of - log pi of what was drawn.

    `kl` is the mean of log pi - log pi_ref of whole answers. Single terms may be negative; but k3, which may not, has a tail: what the
    reference writes often and the policy once in a thousand times counts a thousand, once in a thousand times.
    """
    rewards, lengths = answers.rewards, answers.lengths.double()
    found = {
        "reward": float(rewards.mean()), "reward_std": float(rewards.std()) if len(rewards) > 1 else 0.0,
        "entropy": -float(answers.old.double().mean()), "length": float(lengths.mean()), "longest": float(lengths.max()),
        "ended": sum(c.reason in ("end", "stop") for c in written) / len(written),
    }  # fmt: skip
    if answers.reference is not None:
        each = answers.divergence()
        found |= {"kl": float(each.mean()), "kl_token": float(each.sum() / lengths.sum())}
    return found


def fullest(objective: PolicyGradient, length: int, longest: int) -> Batch:
    """A row in which every token is learned, as answers of at most `longest` tokens: no batch of a run needs more memory."""
    batch = worst_batch(length, -(-length // min(length, longest)))
    owner = torch.cat([torch.full((s.stop - s.start,), i) for i, s in enumerate(batch.segments)])
    figures = {key: torch.zeros(length) for key in KEYS if key not in ("answer", "rollout")}
    batch.extra |= figures | {
        "answer": owner,
        "count": torch.tensor(float(length)),
        "beta": torch.tensor(objective.kl.beta),
    }
    return batch
