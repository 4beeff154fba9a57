"""The gate of every export: what was written is read back by other code, and its logits are compared with the model's.

Compared are logits at every position of fixed probe sequences, all computed in float32, so that the rounding of 16-bit
arithmetic hides nothing:

    |m - y| <= FLOOR max(1, |y|)        merging: m the merged weights before they are rounded, y the adapted model as it trained
    |x - w| <= FLOOR max(1, |w|)        writing: x what was read back, w what was to be written, rounded as it is stored
    |c - 1| <= 0.1,  c = <x - base, e> / <e, e>,  e = y - base      rounding: what share of the adaptation arrived

Largest absolute values over all probes. The third rule is about weights in 16 bits: a small update may be lost in them. In
weights of few bits, whose rounding is noise beside the effect, half of it must arrive.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fettle.core import FettleError
from fettle.core.batch import Example, Node, pack
from fettle.models.encdec import start_token
from fettle.models.parts import quiet
from fettle.models.roles import evaluating
from fettle.peft.new_tokens import new_ids, rows_of

if TYPE_CHECKING:
    from fettle.models.forest import Forest

SEQUENCES, LENGTH, SEED = 4, 48, 20240
FLOOR = {torch.float64: 1e-6}  # of a model in float64; 1e-4 for others
LOST = 0.1  # of the adaptation's effect, at most
QUANTIZED = 0.5  # the same where the sum is rounded to few bits, whose noise is beside it


@contextmanager
def silently() -> Iterator[None]:
    """Without what other libraries say while they read back what was written: bars, warnings, the kernels that they lack."""
    with quiet(), warnings.catch_warnings(), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class Parity:
    """What a comparison found; it stands in the manifest of an export."""

    largest_difference: float  # between what was read back and the adapted model: the rounding of merged weights
    mean_difference: float
    written_difference: float  # between what was read back and what was to be written
    tolerance: float  # of the latter
    same_top: float  # share of positions where both have the same likeliest token
    effect_kept: float | None  # c above; None where there is no adaptation to be switched off
    dtype: str
    tokens: int
    checked_with: str


@dataclass(frozen=True)
class Reference:
    """Logits [N, V] of a model on the probes, in float32."""

    probes: tuple[tuple[int, ...], ...]
    adapted: Tensor  # by the path that training takes
    base: Tensor | None  # with its adapters off, of the texts without new tokens; None where it has no adapters
    dtype: torch.dtype  # of what is written

    def agree(self, found: Tensor, wanted: Tensor, what: str) -> tuple[float, float]:
        """(largest difference, tolerance). FettleError where `found` is not `wanted`, but for float32's rounding."""
        if found.shape != wanted.shape:
            raise FettleError(f"{what}: logits have shape {tuple(found.shape)}, the model's {tuple(wanted.shape)}")
        difference = (found - wanted).abs().max().item()
        tolerance = FLOOR.get(self.dtype, 1e-4) * max(1.0, wanted.abs().max().item())
        if not difference <= tolerance:  # also where it is not a number
            raise FettleError(
                f"{what}: logits differ by {difference:.3g}, and {tolerance:.3g} is what rounding explains; nothing was written"
            )
        return difference, tolerance


def probes(
    vocabulary: int, bound: int | None, shunned: int | None = None, new: Sequence[int] = ()
) -> tuple[tuple[int, ...], ...]:
    """Fixed token sequences: the same for the same vocabulary size, but for a token to avoid.

    `new`: the ids of new tokens, which only one more sequence has, in every other place.
    """
    length, random = min(LENGTH, bound or LENGTH), np.random.default_rng(SEED)
    drawn = random.integers(0, vocabulary, size=(SEQUENCES + bool(new), length))
    if shunned is not None:
        drawn[drawn == shunned] = (shunned + 1) % vocabulary
    if new:
        drawn[-1, ::2] = random.choice(np.array(new), len(drawn[-1, ::2]))
    return tuple(tuple(map(int, row)) for row in drawn)


def measure(forest: Forest, dtype: torch.dtype | None = None) -> Reference:
    """The reference of a model with its edits applied, to be written in its own type or in `dtype`; it is left as it was."""
    model: Any = forest.model
    new = new_ids(model)
    old = min([rows_of(model.get_input_embeddings()), *new])
    rows = probes(old, forest.context, _shunned(forest), new)
    modules = [m for m in forest.model.modules() if isinstance(getattr(m, "enabled", None), bool)]
    base = None
    with widened(model):
        adapted = _forest_logits(forest, rows)
        if modules:
            with _switched_off(modules):
                base = _forest_logits(forest, rows[:SEQUENCES])
    return Reference(rows, adapted, base, dtype or forest.dtype)


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """The same weights in float32, in place: there and back loses nothing, and costs no second copy."""
    narrow = widen(model)
    try:
        yield
    finally:
        for tensor, dtype in narrow:
            tensor.data = tensor.data.to(dtype)


def widen(model: nn.Module) -> list[tuple[Tensor, torch.dtype]]:
    """Bring weights and buffers of 16 bits to float32, in place; what each was."""
    every: list[Tensor] = [*model.parameters(), *model.buffers()]
    narrow = [(t, t.dtype) for t in every if t.dtype in (torch.float16, torch.bfloat16)]
    for tensor, _ in narrow:
        tensor.data = tensor.data.float()
    return narrow


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
    with evaluating(forest.model):
        if forest.task != "causal":
            return forest.scores(batch).float().cpu()
        last = [s for i, s in enumerate(batch.segments) if all(other.parent != i for other in batch.segments)]
        return forest.logits(batch, torch.cat([torch.arange(s.start, s.stop) for s in last])).float().cpu()


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
    with evaluating(model):
        ids = torch.tensor(rows, device=next(model.parameters()).device)
        given = {"input_ids": ids}
        if getattr(model.config, "is_encoder_decoder", False):
            given["decoder_input_ids"] = torch.cat([ids.new_full((len(ids), 1), start_token(model)), ids], 1)
        logits: Tensor = model(**given).logits
    return logits.reshape(-1, logits.shape[-1]).float().cpu()


def wide_logits(model: nn.Module, rows: tuple[tuple[int, ...], ...]) -> Tensor:
    """`plain_logits`, computed in float32."""
    with widened(model):
        return plain_logits(model, rows)


def check(
    reference: Reference, reread: Callable[[tuple[tuple[int, ...], ...]], Tensor], what: str, by: str,
    written: Tensor | None = None, lost: float | None = None,
) -> Parity:  # fmt: skip
    """Compare what was written, through `reread(probes) -> logits [N, V]` in float32; FettleError where it is another model.

    `written`: the logits of what was to be written, in float32, where that is not the adapted model itself. `lost`: how much
    of the adaptation may be lost, where that is not LOST.
    """
    found, wanted = reread(reference.probes), reference.adapted
    differs, tolerance = reference.agree(found, wanted if written is None else written, what)
    difference = (found - wanted).abs()
    parity = Parity(
        difference.max().item(), difference.mean().item(), differs, tolerance,
        (found.argmax(-1) == wanted.argmax(-1)).double().mean().item(), _kept(reference, found),
        str(reference.dtype).removeprefix("torch."), len(found), by,
    )  # fmt: skip
    if parity.effect_kept is not None and abs(parity.effect_kept - 1) > (lost or LOST):
        small = f"in weights rounded to {parity.dtype}" if lost is None else "in weights of so few bits"
        way = "--dtype float32, where rounding loses nothing" if lost is None else "--to hf, which rounds less"
        raise FettleError(
            f"{what}: {parity.effect_kept:.0%} of the adaptation arrived {small}; nothing was written. Export with {way}, or --to "
            "peft, which is not merged"
        )
    return parity


def _kept(reference: Reference, found: Tensor) -> float | None:
    if reference.base is None:
        return None
    base = reference.base
    rows, columns = base.shape  # texts and a vocabulary without new tokens
    adapted, found = (logits[:rows, :columns] for logits in (reference.adapted, found))
    effect, arrived = (adapted - base).double(), (found - base).double()
    power = effect.square().sum().item()
    return (effect * arrived).sum().item() / power if power > 0 else None


def facts(parity: Parity) -> dict[str, Any]:
    """As it stands in a manifest."""
    return asdict(parity)
