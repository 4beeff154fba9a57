"""Reinforce: a policy learns from rewards of its own answers; an artifact, a report and the answers themselves come out.

output/artifact/            the policy (stages/artifact.py)
output/answers/             what each phase wrote, with its rewards: phase-000001.jsonl ...
output/report.md            one page to read, with loss.png and reward.png
output/metrics.jsonl        a row a step
output/checkpoints/         what --resume goes on from, in the middle of a phase too
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from rich.console import Console

from fettle.core.errors import FettleError
from fettle.core.families import Edit, Stage
from fettle.core.files import MANIFEST, sha256
from fettle.core.spec import Spec, Where, one_of, refuse
from fettle.data import DataSpec, content_hash, prepare
from fettle.data.prompts import Prompt, Prompts, read_prompts
from fettle.data.rows import require_sources
from fettle.feedback.rewards import AnyReward, Means
from fettle.generate.remote import Remote
from fettle.models.critic import detach
from fettle.models.forest import Forest
from fettle.models.memory import reset_peak
from fettle.objectives.grpo import GRPO
from fettle.objectives.policy import PolicyGradient
from fettle.stages.artifact import find_artifact, planned, require_artifact
from fettle.stages.cast import Cast, CriticSpec, Part, cast
from fettle.stages.check import Report, gate
from fettle.stages.rehearse import look, preflight
from fettle.stages.tune import ARTIFACT, OF_A_RUN, Recipe
from fettle.train import Job, Spent, fit
from fettle.train.parallel import World
from fettle.train.rollouts import Actors, Mix, Rollouts, RolloutSpec

ANSWERS = "answers"
APART = ("prompts", "answers", "means", "self")  # columns that a reward's own arguments are called


class MixSpec(Spec):
    """Pre-training rows beside the answers (PPO-ptx, Ouyang et al. 2022, arXiv 2203.02155, equation 2)."""

    data: tuple[DataSpec, ...] = Field(min_length=1)
    rows: int = Field(default=1, ge=1, description="rows of batch.tokens in each optimizer step")
    coefficient: float = Field(
        default=1.0, gt=0, description="gamma: how much their mean loss counts beside the policy's"
    )


class Reinforce(Recipe):
    """Tune a policy by reinforcement learning: `data` are prompts, and what is learned from are the policy's own answers."""

    kind: Literal["reinforce"] = "reinforce"  # type: ignore[assignment]
    parent: Path | None = Field(
        default=None, description="the output of an earlier stage to begin from, in place of the stage before"
    )
    reward: AnyReward
    engines: dict[str, Remote] = Field(
        default={}, description="the endpoints of judges, by the names that the reward has for them"
    )
    share: bool = Field(default=True, description="a reward model shares the policy's base; false: it may have another")
    objective: one_of(PolicyGradient) = GRPO()  # type: ignore[valid-type]
    rollouts: RolloutSpec = RolloutSpec()
    critic: CriticSpec = CriticSpec()
    mix: MixSpec | None = Field(default=None, description="pre-training rows beside the answers")

    @model_validator(mode="after")
    def _rolls_out(self) -> Reinforce:
        refuse(senseless(self))
        return self

    def run(self, parent: Path | None = None, *, resume: bool = False) -> Path:
        """Learn to the end and write the artifact; returns its folder."""
        target, world, parent = self.output / ARTIFACT, World.join(None), self._parent(parent)
        if self._is_done(target, parent, world, resume):
            return target
        reset_peak()
        spent = Spent(self.output if resume else None)
        people = self.cast(parent)
        prompts = self.prompts(people.policy)
        Console(stderr=True).print(prompts.table())
        job = replace(self.rolling(people, prompts, resume, parent), spent=spent)
        report = preflight(self, prompts, job)
        gate(report)
        last = fit(job)
        policy, edits = people.policy, (*people.before, *self.edits)
        facts = self.facts(policy, prompts, job.steps, last)  # type: ignore[arg-type]
        facts |= {"seconds": spent.seconds, "peak_bytes": spent.peak(policy.device)}
        facts |= {"made_of": job.made_of, "notes": report.notes, "predicted_bytes": report.memory.total}
        detach(policy)
        for edit in edits:
            edit.settle(policy.model)
        self._leave(target, policy, edits, facts, world)
        return target

    def require_files(self, before: Sequence[Stage] = ()) -> None:
        """FettleError, by its key, where what a tuned stage needs, the parent, reward models or rows of the mix are not there."""
        super().require_files(before)
        require_sources("mix.data", self.mix.data if self.mix else ())
        for key, ref in [("parent", self.parent), *(("reward", ref) for ref in self.reward.models())]:
            if ref is not None:
                require_artifact(key, str(ref), before)

    def _parent(self, parent: Path | None) -> Path | None:
        """The artifact to begin from. FettleError where the stage that `parent` names has left none."""
        if self.parent is None:
            return parent
        folder = find_artifact(str(self.parent))
        if folder is None:
            raise FettleError(f"parent: {self.parent} holds no artifact; run the stage with that output first")
        return folder

    def cast(
        self,
        parent: Path | None,
        before: Sequence[Edit] = (),
        chain: Sequence[Recipe] = (),
        without: Sequence[str] = (),
    ) -> Cast:
        """Everyone who takes part, opened. For a look ahead: edits and stages that have not run, reward models that are not there."""
        waits = without and self.critic.start == "reward"
        critic = (
            CriticSpec() if waits else self.critic
        )  # a usual one stands in for one that begins as what is not there
        part = Part(
            chain[0].model if chain else self.model, parent, self.edits, self.seed, before,
            [ref for ref in self.reward.models() if ref not in without], self.share,
            critic if self.objective.critic else None,
        )  # fmt: skip
        return cast(part, self.model.model_dump(include=set(OF_A_RUN)))

    def open(self, parent: Path | None) -> tuple[Forest, tuple[Edit, ...]]:
        """The policy, and the list of its edits."""
        people = self.cast(self._parent(parent))
        return people.policy, (*people.before, *self.edits)

    def prompts(self, forest: Forest) -> Prompts:
        """The prompts that leave room for an answer."""
        room = min(self.batch.tokens, forest.context or self.batch.tokens) - self.rollouts.max_tokens
        if room < 1:
            raise FettleError(
                f"rollouts.max_tokens: {self.rollouts.max_tokens} leaves no room for a prompt in a row of {self.batch.tokens} tokens"
                + (f" and a context of {forest.context}" if forest.context else "")
            )
        return read_prompts(self.data, forest.tokenizer, room, self.seed, self.reward.lack)

    def rolling(
        self, people: Cast, prompts: Prompts, resume: bool = False, parent: Path | None = None
    ) -> Job:  # fmt: skip
        """What the loop needs."""
        policy, spec = people.policy, self.rollouts
        actors = Actors(policy, self.scorer(people), people.reference, self._mixed(policy))
        ids = (policy.tokenizer.pad_token_id, policy.tokenizer.eos_token_id, 0)
        shape = (self.batch.tokens, next(i for i in ids if i is not None))
        source = Rollouts(actors, prompts, self.objective, spec, shape, self.seed, self.output / ANSWERS)
        phases = -(-prompts.per_epoch // spec.prompts)
        return Job(
            model=policy, objective=self.objective, batches=source, optim=self.optim,
            steps=self.optim.length(phases * spec.steps), folder=self.output, edits=people.edits, seed=self.seed,
            checkpoints=self.checkpoint, not_finite=self.not_finite, made_of=self.made_of(parent), resume=resume,
        )  # fmt: skip

    def scorer(self, people: Cast) -> Any:
        """What rewards answers: the recipe's reward with the models that it names."""
        means = Means(people.rewards, self.engines)

        def score(asked: Sequence[Prompt], answers: Sequence[str]) -> Any:
            columns = dict.fromkeys(key for prompt in asked for key in prompt.facts if key not in APART)
            facts = {key: [prompt.facts.get(key) for prompt in asked] for key in columns}
            offered = replace(means, offered=[prompt.tools for prompt in asked])
            return self.reward.scores([prompt.asked for prompt in asked], answers, offered, **facts)

        return score

    def _mixed(self, forest: Forest) -> Mix | None:
        if self.mix is None:
            return None
        corpus = prepare(
            self.mix.data, forest.tokenizer, self.batch.tokens, seed=self.seed, cache=self._cache, packing=self.batch.packing,
            context=forest.context,
        )  # fmt: skip
        return Mix(corpus, self.mix.rows, self.mix.coefficient)

    def made_of(self, parent: Path | None = None) -> dict[str, Any]:
        """All that decides what training gives, the reward models and the mix included."""
        made = super().made_of(parent)
        mixed = [[source.path, content_hash(source)] for source in (self.mix.data if self.mix else ())]
        found = {ref: find_artifact(ref) for ref in self.reward.models()}
        hashes = {ref: sha256(folder / MANIFEST) for ref, folder in found.items() if folder}
        return made | {"data": [*made["data"], *mixed], **({"rewards": hashes} if hashes else {})}

    def chain(self, before: Sequence[Recipe]) -> Sequence[Recipe]:
        """The stages that this one's model comes from."""
        if self.parent is None:
            return before
        last = planned(str(self.parent), before)
        return before[: before.index(last) + 1] if last is not None else ()

    def look(self, before: Sequence[Recipe], examples: int, console: Console, time_steps: bool = True) -> Report:
        """What `fettle check` shows: the prompts, some of their answers with rewards, memory and time."""
        return look(self, before, examples, console, time_steps)


def senseless(recipe: Reinforce) -> Iterator[tuple[Where, str]]:
    """(place in the recipe, what is wrong and what to do), beside what every stage is asked (sense.py)."""
    method, spec = recipe.objective, recipe.rollouts
    if recipe.validation is not None:
        yield ("validation",), "there is no held-out loss of a reward; evaluate scores the policy after the run"
    if recipe.optim.accumulate != 1:
        yield (
            ("optim", "accumulate"),
            "a step takes as many batches as its answers fill; set rollouts.prompts and rollouts.parts instead",
        )
    if method.one_step and spec.steps > 1:
        yield ("rollouts",), f"{method.kind} takes one step a phase; set passes and parts to 1, or take ppo"
    if lack := method.lack(spec.answers):
        yield ("rollouts", "answers"), lack
    if spec.parts > spec.prompts:
        yield ("rollouts", "parts"), f"{spec.prompts} prompts cannot be cut into {spec.parts} parts"
    if recipe.critic != CriticSpec() and not method.critic:  # a manifest says what was left out, too
        yield ("critic",), f"{method.kind} has none; leave it out, or take ppo"
    for name in recipe.reward.engines():
        if name not in recipe.engines:
            yield (
                ("reward",),
                f"asks the engine '{name}', which is none; say engines: {{{name}: {{url: ..., model: ...}}}}",
            )
    for i, edit in enumerate(recipe.edits):
        if getattr(edit, "dropout", 0):
            yield (
                ("edits", i, "dropout"),
                "a policy's ratio to itself must be 1, which dropout makes a matter of chance; leave it out",
            )
