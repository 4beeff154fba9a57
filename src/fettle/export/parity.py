"""The gate of every export: what was written is read back by other code, and its logits are compared with the model's.

Compared are logits at every position of fixed probe sequences. Two rules:

    largest |x - y|  <=  max(FLOOR(dtype) * max(1, largest |y|), 4 * rounding)
    |c - 1| <= 0.1,  c = <x - base, e> / <e, e>,  e = wide - base        (what share of the adaptation arrived)

x exported, y the adapted model; wide the same weights computed in float32, base those with the adapters switched off. The
rounding of 16 bits is measured, as the largest difference that they make to the model itself, rather than guessed. The
second rule sees an adapter that was lost, even one so small that the first would let it pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fettle.core import FettleError
from fettle.core.batch import Example, Node, pack
from fettle.models.encdec import start_token

if TYPE_CHECKING:
    from fettle.models.forest import Forest

SEQUENCES, LENGTH, SEED = 4, 48, 20240
FLOOR = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
TIMES = 4.0  # an export rounds its weights once more than the model did, and elsewhere
HEARD = 3.0  # the share of the adaptation is measured where its effect is not this many times below the rounding


@dataclass(frozen=True)
class Parity:
    """What a comparison found; it stands in the manifest of an export."""

    largest_difference: float
    mean_difference: float
    tolerance: float
    same_top: float  # share of positions where both have the same likeliest token
    effect_kept: float | None  # c above; None where the adaptation has no effect to be heard
    dtype: str
    tokens: int
    checked_with: str


@dataclass(frozen=True)
class Reference:
    """Logits [N, V] of a model on the probes."""

    probes: tuple[tuple[int, ...], ...]
    adapted: Tensor  # as it is, by the path that training takes
    wide: Tensor  # in float32
    base: Tensor | None  # in float32, with its adapters off; None where it has none
    dtype: torch.dtype
    rounding: float = 0.0  # the largest difference that 16 bits make

    @property
    def tolerance(self) -> float:
        """The largest difference that rounding explains."""
        return max(FLOOR[self.dtype] * max(1.0, self.adapted.abs().max().item()), TIMES * self.rounding)


def probes(vocabulary: int, bound: int | None, shunned: int | None = None) -> tuple[tuple[int, ...], ...]:
    """Fixed token sequences: the same for the same vocabulary size, but for a token to avoid."""
    length = min(LENGTH, bound or LENGTH)
    drawn = np.random.default_rng(SEED).integers(0, vocabulary, size=(SEQUENCES, length))
    if shunned is not None:
        drawn[drawn == shunned] = (shunned + 1) % vocabulary
    return tuple(tuple(map(int, row)) for row in drawn)


def measure(forest: Forest) -> Reference:
    """The reference of a model with its edits applied; the model is left as it was."""
    model: Any = forest.model
    rows = probes(model.get_input_embeddings().weight.shape[0], forest.context, _shunned(forest))
    modules = [m for m in forest.model.modules() if isinstance(getattr(m, "enabled", None), bool)]
    adapted = _forest_logits(forest, rows)
    narrow = plain_logits(model, rows)
    with _widened(model):
        wide = plain_logits(model, rows)
        base = None
        if modules:
            with _switched_off(modules):
                base = plain_logits(model, rows)
    return Reference(rows, adapted, wide, base, model.dtype, (wide - narrow).abs().max().item())


@contextmanager
def _widened(model: nn.Module) -> Iterator[None]:
    """The same weights in float32, in place: there and back loses nothing, and costs no second copy."""
    every: list[Tensor] = [*model.parameters(), *model.buffers()]
    narrow = [(t, t.dtype) for t in every if t.dtype in (torch.float16, torch.bfloat16)]
    try:
        for tensor, _ in narrow:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in narrow:
            tensor.data = tensor.data.to(dtype)


@contextmanager
def _switched_off(modules: list[nn.Module]) -> Iterator[None]:
    before: list[Any] = [m.enabled for m in modules]
    try:
        for module in modules:
            module.enabled = False  # type: ignore[assignment]
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.enabled = value


@torch.no_grad()
def _forest_logits(forest: Forest, rows: tuple[tuple[int, ...], ...]) -> Tensor:
    examples = [Example(_nodes(forest, np.array(row, np.int32)), f"probe {i}") for i, row in enumerate(rows)]
    batch = pack(examples, sum(map(len, examples)), 0).to(forest.device)
    was_training = forest.model.training
    forest.model.eval()
    try:
        if forest.task != "causal":
            return forest.scores(batch).float().cpu()
        last = [s for i, s in enumerate(batch.segments) if all(other.parent != i for other in batch.segments)]
        return forest.logits(batch, torch.cat([torch.arange(s.start, s.stop) for s in last])).float().cpu()
    finally:
        forest.model.train(was_training)


def _nodes(forest: Forest, row: np.ndarray) -> tuple[Node, ...]:
    """A probe as the model's own data is: a text; one whose words all have a mark; or a source and the same as its target."""
    blank = np.zeros(len(row), np.float32)
    if forest.config.is_encoder_decoder:
        target = np.concatenate([[start_token(forest.model)], row])
        return Node(row, blank, causal=False), Node(target, np.zeros(len(target), np.float32), parent=0)
    if forest.task == "tag":
        return (Node(row, blank + 1, causal=not forest.sees_ahead, marks=np.zeros(len(row), np.int64)),)
    return (Node(row, blank, causal=not forest.sees_ahead),)


def _shunned(forest: Forest) -> int | None:
    """The padding's id, where transformers looks for it in a text: a classifier's last token, RoBERTa's positions."""
    plain = forest.task == "causal" and not forest.config.is_encoder_decoder
    return None if plain else forest.config.get_text_config().pad_token_id


@torch.no_grad()
def plain_logits(model: nn.Module, rows: tuple[tuple[int, ...], ...]) -> Tensor:
    """Logits [N, V], float32, of any transformers (or peft) model on the probes; of a classifier its scores [texts, labels]."""
    was_training = model.training
    model.eval()
    try:
        ids = torch.tensor(rows, device=next(model.parameters()).device)
        given = {"input_ids": ids}
        if getattr(model.config, "is_encoder_decoder", False):
            given["decoder_input_ids"] = torch.cat([ids.new_full((len(ids), 1), start_token(model)), ids], 1)
        logits: Tensor = model(**given).logits
    finally:
        model.train(was_training)
    return logits.reshape(-1, logits.shape[-1]).float().cpu()


def check(reference: Reference, reread: Callable[[tuple[tuple[int, ...], ...]], Tensor], what: str, by: str) -> Parity:
    """Compare what was written, through `reread(probes) -> logits [N, V]`; FettleError where it is another model."""
    found = reread(reference.probes)
    wanted = reference.adapted
    if found.shape != wanted.shape:
        raise FettleError(
            f"{what}: the export gives logits of shape {tuple(found.shape)}, the model {tuple(wanted.shape)}"
        )
    difference = (found - wanted).abs()
    tolerance = reference.tolerance
    parity = Parity(
        difference.max().item(), difference.mean().item(), tolerance,
        (found.argmax(-1) == wanted.argmax(-1)).double().mean().item(), _kept(reference, found),
        str(reference.dtype).removeprefix("torch."), len(found), by,
    )  # fmt: skip
    if not parity.largest_difference <= tolerance:  # also where it is not a number
        raise FettleError(
            f"{what}: the exported model's logits differ by {parity.largest_difference:.3g} from the adapted model's, and "
            f"{tolerance:.3g} is what {parity.dtype} rounding explains; nothing was written"
        )
    if parity.effect_kept is not None and abs(parity.effect_kept - 1) > 0.1:
        raise FettleError(
            f"{what}: {parity.effect_kept:.0%} of the adaptation arrived in the export; nothing was written. Export in float32, "
            "where rounding loses nothing, or as a peft adapter, which is not merged"
        )
    return parity


def _kept(reference: Reference, found: Tensor) -> float | None:
    if reference.base is None:
        return None
    base = reference.base
    wide, found = (logits[:, : base.shape[1]] for logits in (reference.wide, found))  # a vocabulary may have grown
    effect, arrived = (wide - base).double(), (found - base).double()
    power = effect.square().sum().item()
    noise = (found - wide).double().square().sum().item()
    if power == 0 or noise > HEARD**2 * power:
        return None
    return (effect * arrived).sum().item() / power


def facts(parity: Parity) -> dict[str, Any]:
    """As it stands in a manifest."""
    return asdict(parity)
