"""The families that methods belong to. Each method is one file in the folder of its family."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from fettle.core.spec import Spec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fettle.core.batch import Batch


class Edit(Spec):
    """A change to a model: adapters, a quantizer, a freeze. Applied in the order of the recipe.

    What it puts into a model holds it, and finds it again by identity: two equal edits of a list are two.
    `role` is what it does to weights, for telling which edits exclude each other: it trains the weights themselves or modules
    of its own, trains a change of weights that stay as they are, trains a soft prompt, freezes, holds weights packed,
    computes as if they were packed while others train them (simulates), or moves scales from one weight to the next without
    changing what the model computes (rescales).
    """

    role: ClassVar[Literal["trains", "updates", "prompts", "freezes", "quantizes", "rescales", "simulates"]] = "trains"
    calibrated: ClassVar[bool] = False  # cannot be applied without a look at text: see `calibrate`

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Itself, which never changes: a copy of a model has the same edits."""
        return self

    @property
    def detachable(self) -> bool:
        """Whether the model with this edit's modules switched off is the model as it was before the edit."""
        return True

    def apply(self, model: nn.Module) -> None:
        """Change the model in place and mark what trains (`requires_grad`)."""
        raise NotImplementedError(f"{type(self).__name__}.apply")

    def calibrate(self, model: nn.Module, calibration: Any) -> None:
        """Apply it with calibration text at hand, a `fettle.quantize.calibrate.Calibration`: what a stage of kind quantize does."""
        self.apply(model)

    def outline(self, model: nn.Module, names: Collection[str] | None = None) -> None:
        """Change the model as `apply` does but for what only text or time can tell.

        For opening an artifact, whose tensors, called `names`, then fill it in; without names for a look ahead at a stage that
        has not run.
        """
        self.apply(model)

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """What an artifact must keep so that `apply` on the same base followed by a strict load gives this model."""
        return {}

    def settle(self, model: nn.Module) -> None:
        """Let go of what only training needs (a reparameterisation); from here on `tensors` are what the model runs on."""

    def merge(self, model: nn.Module) -> None:
        """Fold the edit into plain weights, in place, where that is exact; FettleError where it is not."""

    def lr_scales(self, model: nn.Module) -> dict[str, float]:
        """Factors on the learning rate, by the name of the weight; a weight that is not named has 1."""
        return {}

    def penalty(self, model: nn.Module) -> Tensor | None:
        """A differentiable scalar that every step adds to its mean loss."""
        return None

    def after_step(self, model: nn.Module, step: int, steps: int) -> None:
        """Act after step 0 <= `step` < `steps`: the weights have moved, their gradients are still there.

        It may write to float32 weights and to buffers of the edit's own; what it must remember belongs to `state`.
        """

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Live tensors beside the trained weights that a resumed run must find bit for bit; a checkpoint keeps them."""
        return {}


@dataclass
class Loss:
    """A sum over learned tokens (or pairs), its weight, and what to report.

    The loop divides the sum of `sum` by the sum of `count` over the whole step, so accumulation,
    packing and sharding give the same gradient. `metrics` are sums over the same count, or pairs (sum, count).
    """

    sum: Tensor  # scalar, float32, differentiable
    count: Tensor | float  # scalar
    metrics: dict[str, Any] = field(default_factory=dict)


class Objective(Spec):
    """A loss over a batch.

    `form` is what its examples are made of (data/forms.py): learned text, answers that are compared, or answers judged one by
    one; or the model's own answers (train/rollouts.py). `unit` is what its loss is counted in.
    """

    form: ClassVar[Literal["text", "compared", "judged", "rollouts"]] = "text"
    unit: ClassVar[str] = "token"

    def __call__(self, model: Any, batch: Batch) -> Loss:
        """`model` is a `fettle.models.forest.Forest`."""
        raise NotImplementedError(f"{type(self).__name__}.__call__")


class Stage(Spec):
    """One thing that a recipe runs; opens the artifact of the stage before it and leaves its own."""

    output: Path = Field(description="the folder that receives the artifact")
    shared: ClassVar[bool] = False  # whether the processes of a run share its work; else the first one does it

    def other_models(self) -> Iterable[tuple[str, str]]:
        """The keys that name models besides its own without which it cannot be looked at, and what they name."""
        return ()

    def require_files(self, before: Sequence[Stage] = ()) -> None:
        """FettleError, by its key, where a file that the recipe names is not there, nor left by a stage of those `before` this one.

        Asked of all stages before the first one runs.
        """

    def run(self, parent: Path | None = None, *, resume: bool = False) -> Path:
        """Run to the end; returns the artifact's folder."""
        raise NotImplementedError(f"{type(self).__name__}.run")


class Task(Spec):
    """Something to score: for evaluation, for a reward, for prompt search."""

    def examples(self) -> Iterable[Any]:
        """The items, in order."""
        raise NotImplementedError(f"{type(self).__name__}.examples")
