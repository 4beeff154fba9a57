"""AWQ: scale up the channels that see large activations before rounding, and clip (Lin et al. 2023, arXiv 2306.00978).

    y = (x / s) Q(W s)',    s = mean|x|^r, over the root of its greatest times its least,    r = 0, 1/20, .. 19/20

A few channels of a weight matter, those whose inputs are large; a scale over them shrinks their rounding error by as
much. x / s comes for free from the norm or layer before (models/feeds.py finds it and proves it). The ratio r is the
one of the least squared error of the block's output (`search: block`, as the paper has it), or of the layers' own
(`search: layer`: by H alone, faster).

Then each group's range is clipped: the share of min-max, 1 down to 0.55 in ten steps, of the least error of the group's
part in the output. Queries and keys are not clipped, since what they make goes through a softmax together.

Shapes: W [N, K], x [.., K], s [M] (M = K, or fewer where inputs share a channel), H [K, K], G groups a row, L values a
group."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fettle.core.families import Edit
from fettle.models.blocks import blocks
from fettle.models.feeds import Feed, feeds
from fettle.models.weight import read_weight
from fettle.quantize.calibrate import Calibration, Unit, needs_text
from fettle.quantize.grid import Grid, affine, decode, encode, group_length
from fettle.quantize.linear import dequantize_linears, kept, outline_linears, quantize_linears
from fettle.quantize.moments import Moments, output_error
from fettle.quantize.packed import Quantized, assemble, blank, quantize
from fettle.quantize.scaling import changed, move_scale, outline_changed

LEAST = 1e-4  # of a mean activation


class AWQ(Edit):
    """Hold linear layers on a grid, scaled and clipped so that their outputs on a text change little; nothing trains."""

    role = "quantizes"
    calibrated: ClassVar[bool] = True
    loftq: ClassVar[None] = None
    activations: ClassVar[None] = None
    kind: Literal["awq"] = "awq"
    targets: str | tuple[str, ...] = "all-linear"
    grid: Grid = Grid(bits=4, symmetric=False, group=128, scale="float16")
    points: int = Field(default=20, ge=1, description="ratios that the search tries")
    weighted: bool = Field(default=False, description="divide by mean|w|^(1-r) too, the weights' own size")
    clip: bool = Field(default=True, description="search each group's range")
    search: Literal["block", "layer"] = Field(default="block", description="whose output decides on the scales")
    samples: int = Field(default=16, ge=1, description="rows that the search runs the block on, with search: block")
    least: int = Field(
        default=32, ge=1, description="tokens that a layer must see; with fewer it is rounded to nearest"
    )

    @model_validator(mode="after")
    def _ranges(self) -> AWQ:
        if self.clip and self.grid.range != "minmax":
            raise ValueError("clip: searches ranges by itself; give range: minmax, or clip: false")
        return self

    def quantize(self, weight: Tensor) -> Quantized:
        """One weight [N, K] rounded to nearest."""
        return quantize(weight, self.grid)

    def apply(self, model: nn.Module) -> None:
        """FettleError: AWQ needs text."""
        needs_text(self)

    def calibrate(self, model: nn.Module, calibration: Calibration) -> None:
        """Scale, clip and replace the targets, block by block; what cannot be scaled is only clipped, and listed."""
        seen = feeds(model)
        for reading, why in seen.left.items():
            calibration.leave(", ".join(reading.readers), f"not scaled: {why}")
        together = {n for block in blocks(model) for a in block.attentions for n in (*a.query, *a.key)}

        def work(unit: Unit) -> None:
            mine = [f for f in seen.found if f.reading.block == unit.name and set(f.readers) & set(unit.names)]
            names = dict.fromkeys([*unit.names, *(n for f in mine for n in f.readers)])
            moments = unit.moments(names)
            for feed in mine:
                if moments[feed.readers[0]].count >= self.least:
                    scale = self._scale(unit, feed, moments[feed.readers[0]])
                    move_scale(model, feed, scale, self)
                    unit.scaled(feed.readers, scale[feed.spread.to(scale.device)])
            for name in unit.names:
                self._put(unit, name, clip=self.clip and name not in together)

        calibration.walk(self, work)

    def _put(self, unit: Unit, name: str, clip: bool) -> None:
        seen, weight = unit.seen(name), unit.weight(name)
        if seen.count < self.least or seen.second is None:
            why = f"saw {seen.count} tokens of the text, under awq.least ({self.least}): rounded to nearest"
            unit.put(name, self, self.quantize(weight), fallback=why)
        else:
            unit.put(name, self, clipped(weight, seen.second, self.grid) if clip else self.quantize(weight))

    def _scale(self, unit: Unit, feed: Feed, seen: Moments) -> Tensor:
        """s for what feeds the readers: 1 where no ratio beats plain rounding."""
        named = {n: unit.weight(n) for n in feed.readers if n in unit.names}
        spread = feed.spread.to(seen.mean.device)
        bars = feed.reduce(bar(list(named.values()), self.grid)) if self.weighted else None

        def by_layer(scale: Tensor) -> float:
            assert seen.second is not None
            rounded = {n: self._seen_as(w, scale[spread]) for n, w in named.items()}
            return sum(float(output_error(w, rounded[n], seen.second).sum()) for n, w in named.items())

        def by_block(scale: Tensor) -> float:
            return block_error(unit, {n: self._seen_as(w, scale[spread]) for n, w in named.items()}, self.samples)

        error = by_block if self.search == "block" and unit.run is not None else by_layer
        return awq_scale(feed.reduce(seen.mean), error, self.points, bars)[0]

    def _seen_as(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Q(W s) / s."""
        return self.quantize(weight * scale).values() / scale

    def outline(self, model: nn.Module, names: Collection[str] | None = None) -> None:
        """Blank layers to fill in; without names, layers rounded to nearest."""
        if names is None:
            quantize_linears(model, self)
        else:
            outline_changed(model, self, names)
            outline_linears(model, self, names, lambda w: blank(tuple(w.shape), self.grid, device=w.device))

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The packed weights, and the norms, biases and layers that were scaled."""
        return changed(model, self) | kept(model, self, always=True)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The same, for a run that resumes."""
        return self.tensors(model)

    def merge(self, model: nn.Module) -> None:
        """Put dense weights back, in the model's type, so that later edits of the list can be folded into them."""
        dequantize_linears(model, self)


@torch.no_grad()
def awq_scale(
    mean: Tensor, error: Callable[[Tensor], float], points: int = 20, bars: Tensor | None = None
) -> tuple[Tensor, float]:
    """(s [M], its error): the best of `points` ratios by `error(s)`, and of no scale at all.

    `mean` [M] is mean|x|; `bars` [M], where given, the size of the weights, for s = mean|x|^r / bars^(1-r).
    """
    mean = mean.clamp_min(LEAST)
    best = torch.ones_like(mean)
    least = error(best)
    for i in range(points):
        ratio = i / points
        scale = mean.pow(ratio) / (1 if bars is None else bars.pow(1 - ratio) + LEAST)
        scale = scale.clamp_min(LEAST)
        scale = scale / (scale.max() * scale.min()).sqrt()
        found = error(scale)
        if found < least:
            best, least = scale, found
    return best, least


def bar(weights: Sequence[Tensor], grid: Grid) -> Tensor:
    """[K], mean over all outputs of |w| as a share of the greatest of its group."""
    every = torch.cat(list(weights)).abs()
    groups = every.view(-1, group_length(tuple(every.shape), grid))
    return (groups / groups.amax(1, keepdim=True).clamp_min(1e-30)).view_as(every).mean(0)


@torch.no_grad()
def clipped(weight: Tensor, second: Tensor, grid: Grid, steps: int = 10, least: float = 0.55) -> Quantized:
    """A weight [N, K] on a grid whose ranges are cut to the share 1 .. `least` that errs least, for each group apart.

    The error of a group is that of its own part of the output, mean ((w - q) x)^2 over its L inputs: by H, [K, K].
    """
    length = group_length(tuple(weight.shape), grid)
    k = weight.shape[1]
    if length > k:
        return quantize(weight, grid)
    groups = weight.to(torch.promote_types(weight.dtype, torch.float32)).reshape(-1, length)
    count = k // length
    squares = torch.stack([second[i : i + length, i : i + length] for i in range(0, k, length)]).to(groups)  # [G, L, L]
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale, zero = affine(low, high, grid)
    best = torch.full_like(scale, torch.inf)
    for i in range(steps):
        share = 1 - i * (1 - least) / max(1, steps - 1)
        tried = affine(low * share, high * share, grid)
        apart = decode(encode(groups, *tried, grid), *tried, grid) - groups
        parts = apart.view(-1, count, length).transpose(0, 1)  # [G, N, L]
        error = ((parts @ squares) * parts).sum(2).T.reshape(-1, 1)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, tried[0], scale)
        zero = None if zero is None or tried[1] is None else torch.where(better, tried[1], zero)
    codes = encode(groups, scale, zero, grid).view(weight.shape)
    return assemble(codes, scale, zero, grid)


@torch.no_grad()
def block_error(unit: Unit, weights: dict[str, Tensor], samples: int) -> float:
    """Mean squared difference of the block's output with other weights [N, K] in some of its layers, over `samples` batches."""
    rows = list(unit.batches)[:samples]
    expected = unit.remembered(rows)
    held = {name: read_weight(unit.model.get_submodule(name)).detach().clone() for name in weights}
    try:
        for name, weight in weights.items():
            read_weight(unit.model.get_submodule(name)).copy_(weight)
        total, count = 0.0, 0
        for j in rows:
            for found, wanted in zip(unit.outputs(j), expected[j], strict=True):
                total += float((found.float() - wanted.float()).square().sum())
                count += found.numel()
        return total / max(1, count)
    finally:
        for name, weight in held.items():
            read_weight(unit.model.get_submodule(name)).copy_(weight)
