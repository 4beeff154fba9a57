"""Versus: policies held against the model they began as, on the same prompts: what they gained, and how far they went for it.

    reward      its mean over a policy's answers, and that of each part of a sum; weight 0 makes a part that is only watched
    win rate    of its answers over the start's: by the total reward, or by a judge in both orders (feedback/win_rate.py)
    KL          nats an answer, of its own answers (evaluate/divergence.py)

Answers are drawn at temperature 1, as the divergence is defined. Where the reward rises with the KL and a part that tells the truth
falls, the reward is over-optimised (Gao et al. 2022, arXiv 2210.10760).

output/versus.json report.md versus.png      the figures, a page, reward and parts over KL
output/answers/NAME.jsonl                    every answer with its rewards and its divergence
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import orjson
from pydantic import Field, model_validator
from rich.console import Console
from rich.table import Table

from fettle.core.errors import FettleError
from fettle.core.families import Edit, Stage
from fettle.core.files import make_folder, new_file, read_json, write_bytes, write_json
from fettle.core.spec import Where, refuse
from fettle.data import DataSpec, content_hash
from fettle.data.prompts import Prompt, Prompts, read_prompts
from fettle.data.rows import require_sources
from fettle.evaluate.divergence import divergences, require_same_tokens
from fettle.evaluate.interval import Score, mean_interval, whisker
from fettle.feedback.judge import Judge
from fettle.feedback.model import require_head
from fettle.feedback.reward import Scores, spelled
from fettle.feedback.rewards import AnyReward, Means
from fettle.feedback.win_rate import WinRate, by_judge, of_rewards
from fettle.generate import Sampling, generate
from fettle.generate.remote import Remote
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.memory import MemoryPlan, available, resident, weight_bytes
from fettle.models.spec import ModelSpec
from fettle.models.weight import count_weights
from fettle.stages.artifact import awaited, open_model, require_model
from fettle.stages.check import Report
from fettle.stages.labels import label
from fettle.stages.reference import other_identity
from fettle.stages.reinforce import APART
from fettle.stages.report import table as markdown
from fettle.stages.tune import ARTIFACT

FIGURES, PAGE, PICTURE, ANSWERS = "versus.json", "report.md", "versus.png", "answers"


@dataclass(frozen=True)
class Answered:
    """What a model wrote, an entry an answer: its prompt, text, tokens, rewards, and divergence (None of the start)."""

    prompts: Sequence[Prompt]
    texts: Sequence[str]
    lengths: Sequence[int]
    scores: Scores
    kl: Sequence[float] | None


@dataclass(frozen=True)
class Standing:
    """What is said of one model. `rewards` has the total first, then the parts of a sum."""

    model: str
    rewards: dict[str, Score]
    kl: Score | None
    wins: WinRate | None
    judged: WinRate | None
    tokens: float  # mean length of an answer


class Versus(Stage):
    """Hold policies against the model they began as. It trains nothing: a later stage opens the artifact before it."""

    edits: ClassVar[tuple[Edit, ...]] = ()
    objective: ClassVar[None] = None

    kind: Literal["versus"] = "versus"
    model: ModelSpec = Field(
        default_factory=ModelSpec, description="has no use here: start and policies name the models"
    )
    start: str = Field(description="the model they began as: a run or artifact folder, a model folder or a hub id")
    policies: tuple[str, ...] = Field(
        default=(), description="what it became; default: the artifact of the stage before"
    )
    data: tuple[DataSpec, ...] = Field(min_length=1, description="prompts, best ones that nothing was trained on")
    reward: AnyReward
    judge: Judge | None = Field(default=None, description="compares answers in both orders, beside the reward")
    engines: dict[str, Remote] = Field(
        default={}, description="the endpoints of judges, by the names they are called here"
    )
    answers: int = Field(default=1, ge=1, description="answers to each prompt")
    max_tokens: int = Field(default=128, ge=1, description="most tokens of an answer")
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _makes_sense(self) -> Versus:
        refuse(self._senseless())
        return self

    def _senseless(self) -> Any:
        asked: list[tuple[Where, str]] = [(("reward",), name) for name in self.reward.engines()]
        asked += [(("judge",), self.judge.engine)] if self.judge else []
        for where, name in asked:
            if name not in self.engines:
                yield (
                    where,
                    f"asks the engine '{name}', which is none; say engines: {{{name}: {{url: ..., model: ...}}}}",
                )
        if len(set(self.policies)) < len(self.policies) or self.start in self.policies:
            yield ("policies",), "the same model stands there twice"

    def require_files(self, before: Sequence[Stage] = ()) -> None:
        """FettleError, by its key, where data or a model are not there."""
        require_sources("data", self.data)
        named = [("start", self.start), *((f"policies.{i}", name) for i, name in enumerate(self.policies))]
        for key, name in (*named, *(("reward", name) for name in self.reward.models())):
            require_model(key, name, before)

    def run(self, parent: Path | None = None, *, resume: bool = False) -> Path:
        """Compare, and leave the figures; returns the artifact before, or the folder of the figures where there is none."""
        there = (self.output / FIGURES).exists()
        if there and not resume:
            raise FettleError(f"{self.output}: holds figures already; remove it, or choose another output")
        names = self.named(parent.parent if parent is not None and parent.name == ARTIFACT else parent)
        made = self._made_of(names)
        if there and read_json(self.output / FIGURES)["made_of"] == made:
            return parent or self.output
        found = self.compare(names)
        rows = cells(found)
        draw(found, self.output / PICTURE)
        text = [f"# {self.output.name}", "", f"![reward over KL]({PICTURE})", "", markdown(rows[0], rows[1:])]
        write_bytes(self.output / PAGE, ("\n".join(text) + "\n").encode())
        write_json(self.output / FIGURES, {"made_of": made, "standings": [asdict(one) for one in found]})
        Console(stderr=True).print(shown(rows))
        return parent or self.output

    def named(self, before: Path | None) -> tuple[str, ...]:
        """The policies; `before` is the output of the stage before, if any. FettleError where there are none."""
        if not self.policies and before is None:
            raise FettleError("policies: there is no stage before this one; name the models to hold against the start")
        return self.policies or (str(before),)

    def _made_of(self, names: Sequence[str]) -> dict[str, Any]:
        """All that decides the figures: the stage, the models' manifests, what the data hold."""
        return {
            "stage": self.model_dump(mode="json", exclude={"output", "model"}),
            "models": {name: other_identity(name) for name in (self.start, *names, *self.reward.models())},
            "data": [[source.path, content_hash(source)] for source in self.data],
        }  # fmt: skip

    def compare(self, names: Sequence[str]) -> list[Standing]:
        """The standings of the start and of the policies. FettleError where one writes no text."""
        start, first = opened(self.start), None
        means = Means({ref: open_model(ref)[0] for ref in self.reward.models()}, self.engines)
        found = []
        for name in (self.start, *names):
            forest = start if name == self.start else opened(name)
            made = self.answered(forest, start, means)
            found.append(self.standing(name, made, first))
            self._leave(name, made)
            first = first or made
        return found

    def prompts(self, forest: Forest) -> Prompts:
        """The prompts, as a model reads them. FettleError where it has no room for one before an answer."""
        room = (forest.context or 1 << 20) - self.max_tokens
        if room < 1:
            raise FettleError(
                f"max_tokens: {self.max_tokens} leaves no room for a prompt in the {forest.context} tokens that the model of "
                f"{forest.spec.path} sees"
            )
        keys = "max_tokens in what the model sees"
        return read_prompts(self.data, forest.tokenizer, room, self.seed, self.reward.lack, keys)

    def answered(self, forest: Forest, start: Forest, means: Means) -> Answered:
        """What a model answers, what that is worth, and how far it is from what `start` would say."""
        n, prompts = self.answers, [p for source in self.prompts(forest).sources for p in source]
        tokens = [p.tokens.tolist() for p in prompts]
        written = generate(forest, tokens, Sampling(max_tokens=self.max_tokens, temperature=1.0, seed=self.seed), n=n)
        each, texts = [p for p in prompts for _ in range(n)], [c.text for c in written]
        columns = dict.fromkeys(key for p in prompts for key in p.facts if key not in APART)
        facts = {key: [p.facts.get(key) for p in each] for key in columns}
        offered = replace(means, offered=[p.tools for p in each])
        scores = self.reward.scores([p.asked for p in each], texts, offered, **facts)
        kl = None
        if forest is not start:
            grouped = [[c.tokens for c in written[i : i + n]] for i in range(0, len(written), n)]
            kl = divergences(forest, start, tokens, grouped)
        return Answered(each, texts, [len(c.tokens) for c in written], scores, kl)

    def standing(self, name: str, made: Answered, start: Answered | None) -> Standing:
        """The figures of a model; those of the start, which is held against nothing, where `start` is None."""
        each = {"reward": made.scores.total, **(made.scores.parts if len(made.scores.parts) > 1 else {})}
        rewards = {key: self._mean(values) for key, values in each.items()}
        kl = None if made.kl is None else self._mean(made.kl)
        wins = judged = None
        if start is not None:
            wins = of_rewards(made.scores.total, start.scores.total, made.texts, start.texts, self.answers)
            if self.judge is not None:
                asked = [spelled(p.asked, p.tools) for p in made.prompts]
                engine = self.engines[self.judge.engine]
                judged = by_judge(self.judge, engine, asked, made.texts, start.texts, self.answers)
        return Standing(name, rewards, kl, wins, judged, sum(made.lengths) / len(made.lengths))

    def _mean(self, values: Sequence[float]) -> Score:
        """The mean over answers, its interval by prompt."""
        n = self.answers
        return mean_interval([sum(values[i : i + n]) / n for i in range(0, len(values), n)], self.seed)

    def _leave(self, name: str, made: Answered) -> None:
        """Every answer, for people to read what is rewarded."""
        own = made.scores.parts if len(made.scores.parts) > 1 else {}
        rows = [
            {
                "prompt": prompt.name, "question": prompt.question, "answer": made.texts[i], "reward": made.scores.total[i],
                **{key: values[i] for key, values in own.items()}, "kl": None if made.kl is None else made.kl[i],
            }
            for i, prompt in enumerate(made.prompts)
        ]  # fmt: skip
        file = make_folder(self.output / ANSWERS) / f"{name.strip('/').replace('/', '-')}.jsonl"
        write_bytes(file, b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))

    def look(self, before: Sequence[Any], examples: int, console: Console, time_steps: bool = True) -> Report:
        """What `fettle check` says of it: nothing trains; the prompts as each model reads them, and which are not there yet."""
        names = self.named(next((s.output for s in reversed(before) if not isinstance(s, Versus)), None))
        rewards = self.reward.models()
        lacking = awaited((self.start, *names, *rewards), before)
        forest = load(before[0].model) if self.start in lacking else opened(self.start)  # what it will be made of
        held, here = weight_bytes(forest.model), resident() if forest.device.type == "cpu" else 0
        plan = MemoryPlan(held, 0, 0, 0, 0, runtime=max(0, here - held))
        report = Report(str(self.output), count_weights(forest.model), 0, 0, plan, available(forest.device) + here)
        report.corpus = self.prompts(forest)
        report.notes += report.corpus.notes
        for policy in (opened(name) for name in names if name not in lacking):
            self.prompts(policy)
            if self.start not in lacking:
                require_same_tokens(policy, forest)
        for ref in (ref for ref in rewards if ref not in lacking):
            require_head(open_model(ref)[0], ref)
        report.notes += [f"{name} is not there yet" for name in lacking]
        return report


def opened(name: str) -> Forest:
    """A model that writes text. FettleError where it is none."""
    forest, _ = open_model(name)
    if forest.task != "causal":
        raise FettleError(f"versus: {name} has task: {forest.task} and writes no text; name a language model")
    return forest


# What is left to read.


def parts(found: Sequence[Standing]) -> list[str]:
    """The reward, and those of its parts that are not the reward itself."""
    return [
        name
        for name in found[0].rewards
        if name == "reward" or any(one.rewards[name] != one.rewards["reward"] for one in found)
    ]


def cells(found: Sequence[Standing]) -> list[list[str]]:
    """A head and a row a model, each figure with its 95% interval."""
    judged = any(one.judged for one in found)
    names = parts(found)
    rows = [
        [
            "model",
            *names,
            "KL, nats an answer",
            "win rate",
            *(["win rate, judged"] if judged else []),
            "tokens an answer",
        ]
    ]
    for one in found:
        wins = [one.wins, *([one.judged] if judged else [])]
        shown = ["" if w is None else str(w.rate) for w in wins]
        rows.append(
            [one.model, *(str(one.rewards[key]) for key in names), str(one.kl or ""), *shown, f"{one.tokens:.1f}"]
        )
    return rows


def shown(rows: Sequence[Sequence[str]]) -> Table:
    """The cells for the terminal."""
    made = Table()
    for head in rows[0]:
        made.add_column(head, overflow="fold")
    for row in rows[1:]:
        made.add_row(*row)
    return made


def draw(found: Sequence[Standing], file: Path) -> None:
    """The reward, and each part that is not the reward itself, over the divergence: a panel each, a point a model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = parts(found)
    figure, axes = plt.subplots(1, len(names), figsize=(1 + 4.2 * len(names), 3.8), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for one in found:
            x, y = one.kl.mean if one.kl else 0.0, one.rewards[name]
            axis.errorbar(
                x,
                y.mean,
                yerr=whisker(y.mean, y.low, y.high),
                fmt="o",
                ms=6,
                lw=1.2,
                color="#8a8f98" if one.kl is None else "#1f4e79",
            )
        axis.set(xlabel="KL from the start (nats an answer)", ylabel=name)
        axis.margins(x=0.18, y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
        label(axis, [(one.kl.mean if one.kl else 0.0, one.rewards[name].mean, Path(one.model).name) for one in found])
    with new_file(file) as handle:
        figure.savefig(handle, format="png", dpi=110)
    plt.close(figure)
