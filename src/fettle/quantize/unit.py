"""What a method works on: a block with the states that enter it, and its layers by what they read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fettle.core.errors import FettleError
from fettle.models.blockwise import Blockwise
from fettle.models.experts import everywhere
from fettle.models.feeds import identity
from fettle.models.surgery import replace
from fettle.models.weight import in_out, is_quantized, read_weight
from fettle.quantize.linear import QuantizedLinear
from fettle.quantize.moments import ROWS, Moments, Watch
from fettle.quantize.packed import Quantized

if TYPE_CHECKING:
    from fettle.quantize.calibrate import Calibration


@dataclass(frozen=True)
class Outcome:
    """What became of one layer."""

    layer: str
    tokens: int  # that it saw
    error: float | None  # |W x - W^ x^|^2 / |W x|^2 over kept rows of x; None where it saw none
    fallback: str = ""  # why it was rounded to nearest instead


class Unit:
    """A block with the states that enter it; or, without a `run`, all layers outside of blocks under the whole model."""

    def __init__(self, calibration: Calibration, name: str, names: list[str], run: Blockwise | None) -> None:
        self.calibration, self.model, self.name, self.names, self.run = calibration, calibration.model, name, names, run
        self._seen: dict[str, Moments] = {}
        self._outputs: dict[int, list[Tensor]] = {}

    @property
    def batches(self) -> range:
        """The numbers of the batches."""
        return range(len(self.calibration.batches))

    def outputs(self, j: int) -> list[Tensor]:
        """What the unit returns for batch `j`, a tensor a call."""
        return (
            self.run.run(j) if self.run is not None else [self.calibration.forest.hidden(self.calibration.batches[j])]
        )

    def steps(self, sequential: bool) -> list[list[str]]:
        """The unit's targets in the order in which a method takes them: layers of one step are calibrated together."""
        if self.run is None or not sequential:
            return [list(self.names)]
        order: dict[str, list[str]] = {}
        for reading in self._readings():
            order.setdefault(family(reading[0]), []).extend(reading)
        return list(order.values())

    def moments(self, names: Iterable[str], *, second: bool = True, observe: bool = False) -> dict[str, Moments]:
        """The moments of the inputs of some layers, over all batches; layers that are given one tensor have one object."""
        names = list(names)
        first = {name: reading[0] for reading in self._readings(names) for name in reading}
        rows = -(-ROWS // len(self.batches))
        watches = {name: Watch(second, observe, rows) for name in dict.fromkeys(first.values())}
        with self._hooked({name: watch.see for name, watch in watches.items()}):
            for j in self.batches:
                self.outputs(j)
        device = self.calibration.forest.device
        made = {n: w.moments(in_out(self.model.get_submodule(n))[0], device) for n, w in watches.items()}
        self._seen |= {name: made[first[name]] for name in names}
        return {name: self._seen[name] for name in names}

    def seen(self, name: str) -> Moments:
        """The moments of a layer's input, as they are after all scaling."""
        return self._seen[name]

    def remembered(self, rows: Sequence[int]) -> dict[int, list[Tensor]]:
        """What the unit returned for some batches when this was asked first, before anything in it was rounded."""
        for j in rows:
            if j not in self._outputs:
                self._outputs[j] = [out.detach().clone() for out in self.outputs(j)]
        return self._outputs

    def scaled(self, names: Iterable[str], scale: Tensor) -> None:
        """From now on the input of some layers is x / scale."""
        self._seen |= {name: self._seen[name].scaled(scale) for name in names if name in self._seen}

    def weight(self, name: str) -> Tensor:
        """[N, K], float32."""
        return read_weight(self.model.get_submodule(name)).detach().float()

    @torch.no_grad()
    def put(
        self,
        name: str,
        edit: Any,
        packed: Quantized,
        *,
        fallback: str = "",
        residual: tuple[Tensor, Tensor] | None = None,
    ) -> QuantizedLinear:
        """Put a packed layer in the place of a plain one, and keep what that does to its output."""
        layer = QuantizedLinear(self.model.get_submodule(name), packed, edit, residual, edit.activations)
        self.stand(name, edit, layer, fallback)
        return layer

    @torch.no_grad()
    def stand(self, name: str, edit: Any, layer: Any, fallback: str = "") -> None:
        """Put any layer that rounds in the place of a plain one: its static range is found, and what it does to the output."""
        base, seen = self.model.get_submodule(name), self._seen.get(name)
        if layer.held_range is not None:
            if seen is None or seen.observer is None or not seen.count:
                raise FettleError(
                    f"edits: {edit.kind}: {name} saw no token of the calibration text, so its static range is not known; "
                    "calibrate on other text, or leave the layer out of the targets"
                )
            layer.hold_range(*seen.observer.range(edit.activations))
        error = None
        if seen is not None and len(seen.rows):
            bias = None if base.bias is None else base.bias.float()
            wanted = nn.functional.linear(seen.rows, self.weight(name), bias)
            plain = wanted if bias is None else wanted - bias
            rows = seen.rows if is_quantized(layer) else seen.rows.to(base.weight.dtype)
            error = float((layer(rows).float() - wanted).square().sum() / plain.square().sum().clamp_min(1e-30))
        replace(self.model, name, layer)
        self.calibration.note(Outcome(name, 0 if seen is None else seen.count, error, fallback))

    # How.

    def _readings(self, names: Sequence[str] | None = None) -> list[tuple[str, ...]]:
        """Layers by the tensor that they are given, in the order in which that is read first, as the first batch shows it."""
        groups: dict[Any, list[str]] = {}
        held: list[Tensor] = []
        names = self.names if names is None else names

        def see(name: str, x: Tensor) -> None:
            held.append(x)  # so that no other tensor comes to lie where it does
            groups.setdefault(identity(x), []).append(name)

        with self._hooked({n: lambda x, n=n: see(n, x) for n in names}), everywhere():
            self.outputs(0)
        found = [tuple(dict.fromkeys(group)) for group in groups.values()]
        seen = {name for group in found for name in group}
        unique = list({group[0]: group for group in found}.values())
        return [*unique, *((name,) for name in names if name not in seen)]

    @contextmanager
    def _hooked(self, eyes: dict[str, Callable[..., None]]) -> Iterator[None]:
        handles = [
            self.model.get_submodule(name).register_forward_pre_hook(lambda _, args, eye=eye: eye(args[0]))
            for name, eye in eyes.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def family(name: str) -> str:
    """The name without numbers: the layers of all experts of a block have one."""
    return re.sub(r"\d+", "#", name)
