"""Activations in few bits beside whole weights (W16A8), which no kernel is made for: it tells what rounding activations costs alone.

    y = W x^ + b,    x^ = s_x (l[q] - z_x)      on a grid of activations.py: by token, by tensor, static or not

Quantizers round both together with `activations`; beside this and weights alone (W8A16) it shows which of the two is harder, as
ZeroQuant-V2 asks (Yao et al. 2023, arXiv 2303.08302).

Shapes: x [.., K], W [N, K].
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.models.select import linears
from fettle.models.surgery import made_by, replace
from fettle.models.weight import in_out, is_adapter, is_quantized
from fettle.quantize.activations import Activations, Ranged, range_tensors, rounded
from fettle.quantize.calibrate import Calibration, Unit


class RoundedInput(Ranged):
    """Any linear layer whose input is rounded first."""

    def __init__(self, base: nn.Module, edit: RoundInputs) -> None:
        super().__init__()
        self.base, self.edit, self.enabled = base, edit, True
        self.await_range(edit.grid, next(base.parameters()).device)

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that only looks at its type, shape or device."""
        return self.base.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """x [.., K] -> [.., N]."""
        return self.base(rounded(x, self.edit.grid, self.ready_range()) if self.enabled else x)  # type: ignore[no-any-return]


class RoundInputs(Edit):
    """Round what linear layers are given, and nothing else; nothing trains."""

    role = "quantizes"
    kind: Literal["round_inputs"] = "round_inputs"
    targets: str | tuple[str, ...] = "all-linear"
    grid: Activations = Activations()

    @property
    def activations(self) -> Activations:
        """The grid of a layer's input, under the name that quantizers have for it."""
        return self.grid

    def apply(self, model: nn.Module) -> None:
        """Wrap the targets. FettleError where one is quantized, or where the range is static: that needs text."""
        if self.grid.static:
            raise FettleError(
                "edits: round_inputs: a static range is found on text; put it into a stage of kind: quantize"
            )
        self.outline(model)

    def calibrate(self, model: nn.Module, calibration: Calibration) -> None:
        """The same in a walk over text, which finds static ranges."""

        def work(unit: Unit) -> None:
            unit.moments(unit.names, second=False, observe=self.grid.static)
            for name in unit.names:
                unit.stand(name, self, RoundedInput(model.get_submodule(name), self))

        calibration.walk(self, work, second=False, resumable=False)

    def outline(self, model: nn.Module, names: Any = None) -> None:
        """Wrap the targets, ranges to be filled in."""
        for name, base in linears(model, self.targets).items():
            if is_adapter(base) or is_quantized(base):
                raise FettleError(
                    f"edits: round_inputs: {name} is quantized or carries an adapter; put round_inputs first"
                )
            in_out(base)
            replace(model, name, RoundedInput(base, self))

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Static ranges."""
        found: dict[str, Tensor] = {}
        for name, layer in made_by(model, self, RoundedInput):
            found |= {f"{name}.{key}": t for key, t in range_tensors(layer.held_range).items()}
        return found

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The same, for a run that resumes."""
        return self.tensors(model)

    def merge(self, model: nn.Module) -> None:
        """FettleError: plain weights do not round what they are given."""
        raise FettleError("round_inputs: activations are rounded, which plain weights cannot do; keep the artifact")
