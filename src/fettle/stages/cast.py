"""The cast of reinforcement learning: policy, reference, critic and reward models over one base in memory.

    base ──┬── edits of the parent ──┬── own edits, which train          the policy; with those off, the reference (models/roles.py)
           │                         └── the critic's edits, a head      a twin (models/twin.py): the same weights, modules of its own
           └── edits of a reward model, its head                         a twin of the bare base

What an edit of the policy trains in place (full, bitfit) the reference and the critic get copies of, and of nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.core.spec import Spec
from fettle.feedback.model import require_head
from fettle.models import roles
from fettle.models.critic import Critic, attach
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.spec import ModelSpec
from fettle.models.twin import twin, unchanged, with_task
from fettle.peft import LoRA
from fettle.stages.artifact import add_edits, find_artifact, open_artifact, outline_edits, read_artifact
from fettle.stages.edits import AnyEdit

PLACE = 1000  # of the critic's edits among those that draw at random


class CriticSpec(Spec):
    """The critic of PPO. Without edits it reads the policy's own states, and trains them with its loss."""

    edits: tuple[AnyEdit, ...] = Field(default=(LoRA(),), description="its own, on the policy's base")
    start: Literal["zero", "reward"] = Field(
        default="zero", description="reward: edits and head of the reward model (Ouyang et al. 2022), in place of edits"
    )


@dataclass(frozen=True)
class Cast:
    """Who is there. `edits` are the policy's own that train, and the critic's."""

    policy: Forest
    before: tuple[Edit, ...]
    edits: tuple[Edit, ...]
    rewards: dict[str, Forest]
    reference: Callable[[], AbstractContextManager[Forest]]


@dataclass(frozen=True)
class Part:
    """What a stage asks for: its model or its parent's artifact, edits, reward models by folder, and a critic if there is one.

    `before` are edits of stages that have not run, for a look ahead: they are applied as they begin.
    """

    model: ModelSpec
    parent: Path | None
    edits: Sequence[Edit]
    seed: int
    before: Sequence[Edit] = ()
    rewards: Sequence[str] = ()
    share: bool = True
    critic: CriticSpec | None = None


def cast(part: Part, of_a_run: dict[str, Any]) -> Cast:
    """Open them all; `of_a_run` is what a later stage may say of its model. FettleError where a reward model fits none."""
    spec = part.model if part.parent is None else read_artifact(part.parent, **of_a_run).model
    base = load(spec)
    if base.task != "causal" or base.config.is_encoder_decoder or base.sees_ahead:
        raise FettleError(
            f"reinforce: {type(base.model).__name__} does not write text from left to right, so it can be no policy; "
            "where the stage before gives a reward model, say parent: <the output of the stage whose model is to learn>"
        )
    rewards = {ref: scorer(ref, base, part.share) for ref in part.rewards}
    for ref, forest in rewards.items():
        require_head(forest, ref)
    before = tuple(part.before)
    if part.parent is None:
        outline_edits(base, before)
    else:
        with unchanged(base if rewards and part.share else None, f"parent: {part.parent}", "the reward model shares"):
            base, before = open_artifact(part.parent, base=twin(base), **of_a_run)
    base.model.requires_grad_(False)
    start = twin(base)
    policy = add_edits(base, part.edits, part.seed, len(before))
    moved = [p for p in start.model.parameters() if p.requires_grad]
    if moved:
        rewards = {ref: frozen_twin(forest, moved) for ref, forest in rewards.items()}
    edits = tuple(part.edits)
    if part.critic is not None:
        edits += hang_critic(policy, frozen_twin(start, moved), part, rewards)
    silence(policy.model)
    if roles.obstacle(policy.model) is None:
        return Cast(policy, before, edits, rewards, policy.reference)
    kept = frozen_twin(start, moved)
    return Cast(policy, before, edits, rewards, lambda: resting(kept))


def frozen_twin(start: Forest, moved: Sequence[torch.Tensor]) -> Forest:
    """A twin of the policy as it began, with copies of what trains in place."""
    made = twin(start, moved)
    own = {id(p) for p in start.model.parameters()}
    for parameter in made.model.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(False)
    made.model.eval()
    return made


@contextmanager
def resting(forest: Forest) -> Iterator[Forest]:
    """A reference that is a tree of its own, without gradients."""
    with torch.no_grad():
        yield forest


def hang_critic(policy: Forest, start: Forest, part: Part, rewards: dict[str, Forest]) -> tuple[Edit, ...]:
    """Hang the critic on the policy; returns its edits."""
    assert part.critic is not None
    width = int(policy.config.get_text_config().hidden_size)
    if part.critic.start == "reward":
        if len(rewards) != 1:
            raise FettleError(
                f"critic.start: reward begins as the reward model, and the reward names {len(rewards)} of them; say start: zero"
            )
        return _as_reward(policy, next(iter(rewards.values())), width)
    edits = tuple(edit.model_copy() for edit in part.critic.edits)  # of its own, so that each finds its own modules
    if not edits:
        attach(policy, Critic(width))
        return ()
    trained = {id(p) for p in policy.model.parameters() if p.requires_grad}
    shared = {id(p) for p in policy.model.parameters()}
    try:
        add_edits(start, edits, part.seed, PLACE)
    except FettleError as error:
        raise FettleError(f"critic.{error}") from error
    if any(p.requires_grad and id(p) in shared - trained for p in start.model.parameters()):
        raise FettleError(
            "critic.edits: train weights that the policy shares; give the critic edits beside them, such as lora"
        )
    attach(policy, Critic(width, start.model))
    return edits


def _as_reward(policy: Forest, reward: Forest, width: int) -> tuple[Edit, ...]:
    """A critic that begins as the reward model: copies of what its edits and its head hold."""
    own = {id(p) for p in policy.model.parameters()}
    held = [p for m in roles.switches(reward.model) for n, p in m.named_parameters() if not n.startswith("base.")]
    tree = twin(reward, [p for p in held if id(p) not in own])
    critic = Critic(width, tree.model)
    for module in roles.switches(tree.model):
        for name, parameter in module.named_parameters():
            if not name.startswith("base.") and id(parameter) not in own:
                parameter.requires_grad_(True)
    with torch.no_grad():
        score = next(m for m in reverse_children(reward.model) if isinstance(m, nn.Linear))
        critic.head.weight.copy_(score.weight)
        if score.bias is not None:
            critic.head.bias.copy_(score.bias)
    attach(policy, critic)
    return tuple({id(m.edit): m.edit for m in roles.switches(tree.model)}.values())


def reverse_children(model: nn.Module) -> Iterator[nn.Module]:
    """A model's children, the last first: its head before its body."""
    yield from reversed(list(model.children()))


def scorer(ref: str, base: Forest, share: bool) -> Forest:
    """The reward model of a folder: on the policy's bare base, or where it shares nothing, opened for itself."""
    folder = find_artifact(ref)
    if folder is None:
        raise FettleError(
            f"reward: {ref} holds no artifact; give the output of a stage with objective: {{kind: reward}}"
        )
    if not share:
        return open_artifact(folder, device=base.spec.device)[0]
    made = read_artifact(folder, device=base.spec.device, attention=base.spec.attention)
    same = {"path", "revision", "config", "dtype", "experts"}
    theirs, ours = (spec.model_dump(include=same) for spec in (made.model, base.spec))
    if other := next((key for key in ours if theirs.get(key) != ours[key]), None):
        raise FettleError(
            f"reward: {ref} was trained on another base ({other} '{theirs.get(other)}', the policy's is '{ours[other]}'), so it can "
            "share no weights with it; to let it read the answers as text in memory of its own, say share: false"
        )
    with unchanged(base, f"reward: {ref}", "the policy shares"):
        bare = twin(base)
        bare.spec = made.model
        bare = with_task(bare, made.model) if made.model.task != "causal" else bare
        found, _ = open_artifact(folder, base=bare, device=base.spec.device, attention=base.spec.attention)
    if _vocabulary(found) != _vocabulary(base):
        raise FettleError(
            f"reward: {ref} has another tokenizer than the policy; to let it read the answers as text all the same, say share: false"
        )
    return found


def _vocabulary(forest: Forest) -> Any:
    return forest.tokenizer.get_vocab()


def silence(model: nn.Module) -> None:
    """Take a model's own dropout away: what a policy's ratio is must not be chance."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
