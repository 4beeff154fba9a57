"""Kernels: each within its stated bound of exact arithmetic, its arrangement exact both ways, its guards, what a layer holds."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fettle.models.memory import weight_bytes
from fettle.models.weight import read_weight
from fettle.quantize import NF4, RTN, Activations, Grid, kernels
from fettle.quantize.activations import rounded
from fettle.quantize.int4 import Int4
from fettle.quantize.int8 import Int8
from fettle.quantize.kernels import FORMS, fitting, pick, why_not
from fettle.quantize.linear import QuantizedLinear
from fettle.quantize.normal4 import Normal4
from fettle.quantize.packed import Quantized, quantize, unpack

U = 2.0**-8  # half the distance of two neighbours in bfloat16, as a share
TORCHS = {"int8", "int4", "w8a8"}
WORKING = {kernel for kernel in TORCHS if kernels.works(kernel)}
needs_kernels = pytest.mark.skipif(WORKING != TORCHS, reason=f"of {TORCHS} this machine has {WORKING}")


def random(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer_of(
    grid: Grid, shape: tuple[int, int], activations: Activations | None = None, bias: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> QuantizedLinear:  # fmt: skip
    base = nn.Linear(shape[1], shape[0], bias=bias)
    base.weight.data = random(shape) * 0.02 + 0.002
    if bias:
        base.bias.data = random(shape[:1], 5)
    base = base.to(dtype).requires_grad_(False)
    edit = RTN(grid=grid, activations=activations)
    return QuantizedLinear(base, edit.quantize(read_weight(base)), edit, None, edit.activations)


def exact(layer: QuantizedLinear, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y and |x| |W|' in float64 over the codes that the layer holds, and W."""
    weight = layer.packed.values(torch.float64)
    seen = x if layer.activations is None else rounded(x.float(), layer.activations, layer.held_range)
    y = seen.double() @ weight.t()
    return y if layer.bias is None else y + layer.bias.double(), seen.double().abs() @ weight.abs().t(), weight


# Grids and shapes by the kernel that fits them. N = 112 is a block of 64 and one of 48, or three of 32 and one of 16.
INT8 = [(Grid(bits=8), (7, 48)), (Grid(bits=8, narrow=True), (112, 64)), (Grid(bits=8, group="tensor"), (16, 32))]
INT4 = [
    (Grid(bits=4, group=32), (16, 64)),
    (Grid(bits=4, group=32, symmetric=False), (112, 96)),
    (Grid(bits=4, group=128, symmetric=False, scale="bfloat16"), (128, 256)),
    (Grid(bits=4, group=256), (64, 512)),
    (Grid(bits=4), (48, 160)),  # a row is five blocks of 32
    (Grid(bits=4, group="tensor", symmetric=False), (80, 64)),
    (Grid(bits=4, group=96), (32, 192)),
]
ROWS = (1, 2, 3, 5, 8, 31)


@needs_kernels
@pytest.mark.parametrize(("grid", "shape"), INT8, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_int8_is_within_its_bound(grid: Grid, shape: tuple[int, int], bias: bool) -> None:
    layer = layer_of(grid, shape, bias=bias)
    for rows in ROWS:
        x = random((rows, shape[1]), rows, torch.bfloat16)
        assert layer.kernel(rows) == "int8"
        found = layer(x).double()
        assert isinstance(layer.held, Int8) and found.shape == (rows, shape[0])
        y, size, _ = exact(layer, x)
        added = torch.zeros(()) if layer.bias is None else layer.bias.double()
        bound = 2.02 * U * (y - added).abs() + (U * found.abs() if bias else 0) + 2.0**-20 * size
        assert bool(((found - y).abs() <= bound).all())


@needs_kernels
@pytest.mark.parametrize(("grid", "shape"), INT4, ids=str)
def test_int4_is_within_its_bound(grid: Grid, shape: tuple[int, int]) -> None:
    layer = layer_of(grid, shape)
    for rows in ROWS:
        x = random((rows, shape[1]), rows, torch.bfloat16)
        assert layer.kernel(rows) == "int4"
        found = layer(x).double()
        assert isinstance(layer.held, Int4) and found.shape == (rows, shape[0])
        y, size, weight = exact(layer, x)
        packed = layer.packed
        group = torch.arange(weight.numel()) // packed.length
        zero = packed.zeros()
        offset = torch.zeros(()) if zero is None else (packed.scale * (8 - zero)).double()[group].view(shape)  # type: ignore[operator]
        rounding = U * (x.double().abs() @ (weight.abs() + 1.01 * offset.abs()).expand(shape).t())
        if grid.scale == "bfloat16" and grid.symmetric:
            rounding = torch.zeros_like(rounding)
        assert bool(((found - y).abs() <= rounding + U * found.abs() + 2.0**-20 * size).all())


@needs_kernels
def test_zero_points_that_are_no_integers_go_through_int4_and_not_through_integers() -> None:
    weight = quantize(random((64, 128)), Grid(bits=4, group=32, symmetric=False))
    weight = replace(weight, zero=weight.zeros() + 0.3)  # type: ignore[operator]
    x, made = random((2, 128), 1, torch.bfloat16), Int4.of(weight)
    y = x.double() @ weight.values(torch.float64).t()
    assert float((made.product(x).double() - y).abs().max()) < 0.02 * float(y.abs().max())
    assert torch.equal(made.values(torch.float32), weight.values()) and torch.equal(
        made.restored().values(), weight.values()
    )
    eight = quantize(random((16, 32)), Grid(bits=8, symmetric=False))
    eight = replace(eight, zero=eight.zeros() + 0.3)  # type: ignore[operator]
    assert "no integers" in str(why_not("w8a8", eight, Activations())) and not fitting(eight, Activations())


def nf4_layer(shape: tuple[int, int], **how: Any) -> QuantizedLinear:
    base = nn.Linear(shape[1], shape[0], bias=False)
    base.weight.data = random(shape) * 0.02
    edit = NF4(**how)
    return QuantizedLinear(base.bfloat16().requires_grad_(False), edit.quantize(base.weight), edit)


@pytest.mark.parametrize("how", [{}, {"double": False}, {"block": 32}, {"block": 128}], ids=str)
def test_nf4_is_within_its_bound_and_comes_back_bit_for_bit(how: dict[str, Any]) -> None:
    if not kernels.works("nf4"):
        pytest.skip("bitsandbytes or its kernel is missing")
    layer = nf4_layer((96, 256), **how)
    weight, portable = layer.packed.values(torch.float64), layer.packed
    for rows in (1, 2, 3, 8, 33, 128):
        x = random((rows, 256), rows, torch.bfloat16)
        assert layer.kernel(rows) == "nf4"
        found = layer(x).double()
        assert isinstance(layer.held, Normal4) and found.shape == (rows, 96)
        y, size = x.double() @ weight.t(), x.double().abs() @ weight.abs().t()
        assert bool(((found - y).abs() <= 3 * U * size + U * found.abs()).all())
    assert layer.kernel(129) == "plain" and torch.equal(layer.values(torch.float32), portable.values())
    again = layer.packed.tensors()
    assert all(torch.equal(t, again[k]) for k, t in portable.tensors().items())
    assert layer.kernel(1) == "nf4" and nf4_layer((96, 255)).kernel(1) == nf4_layer((90, 256)).kernel(1) == "plain"


W8A8 = [
    (Grid(bits=8), Activations()),
    (Grid(bits=8, symmetric=False), Activations(symmetric=False)),
    (Grid(bits=8, group="tensor", symmetric=False), Activations(group="tensor")),
    (Grid(bits=8, narrow=True), Activations(bits=4, symmetric=False)),
    (Grid(bits=8), Activations(group="tensor", static=True)),
    (Grid(bits=8, symmetric=False), Activations(group="tensor", static=True, symmetric=False, bits=6)),
    (Grid(bits=8), Activations(range="percentile", percentile=90.0)),
    (Grid(bits=8, symmetric=False), Activations(outliers=1.5)),
    (Grid(bits=8), Activations(outliers=100.0)),
]


@needs_kernels
@pytest.mark.parametrize(("grid", "activations"), W8A8, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("large", [False, True])
def test_w8a8_is_within_its_bound(
    grid: Grid, activations: Activations, dtype: torch.dtype, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "LARGE", 1 if large else 1 << 40)
    layer = layer_of(grid, (21, 48), activations, dtype=dtype)
    if activations.static:
        layer.hold_range(
            torch.tensor(2.5 / 2**activations.bits * 2), None if activations.symmetric else torch.tensor(20.0)
        )
    unit = {torch.float32: 2.0**-22, torch.bfloat16: U, torch.float16: 2.0**-11}[dtype]
    for rows in (1, 4, 9, 40):
        x = random((rows, 48), rows, dtype)
        assert layer.kernel(rows) == "w8a8"
        found = layer(x).double()
        assert isinstance(layer.held, Int8)
        y, size, _ = exact(layer, x)
        read = large and dtype == torch.bfloat16 and rows == 4 and activations.symmetric and grid.symmetric
        bound = (3 if read else 1.001) * unit * y.abs() + 2.0**-20 * size * (1 if read else 2.0**-3)
        assert bool(((found - y).abs() <= bound).all()), (rows, float((found - y).abs().max()))


@needs_kernels
def test_over_its_rows_and_in_other_types_a_weight_is_made_and_is_the_same_in_every_form() -> None:
    for grid, shape, most in ((Grid(bits=8), (112, 64), 32), (Grid(bits=4, group=32, symmetric=False), (112, 64), 64)):
        layer = layer_of(grid, shape)
        x = random((most + 1, 64), 1, torch.bfloat16)
        assert layer.kernel(most) != "plain" and layer.kernel(most + 1) == "plain"
        portable, before = layer.packed, layer(x)
        layer(x[:1])
        assert type(layer.held) in (Int8, Int4)
        assert torch.equal(layer(x), before), "made of the kernel's form as of the portable one"
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            assert torch.equal(layer.values(dtype), portable.values(dtype))
        assert torch.equal(layer(x.float()), nn.functional.linear(x.float(), portable.values()))


@needs_kernels
@pytest.mark.parametrize(("grid", "shape"), [*INT8, *INT4, (Grid(bits=8, symmetric=False), (9, 40))], ids=str)
def test_the_portable_form_comes_back_bit_for_bit(
    grid: Grid, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = quantize(random(shape), grid)
    for chunk in (1 << 20, 64):
        monkeypatch.setattr("fettle.quantize.int4.CHUNK", chunk)
        monkeypatch.setattr("fettle.quantize.int8.CHUNK", chunk)
        made = (Int4 if grid.bits == 4 else Int8).of(weight)
        if grid.bits == 4:
            codes = unpack(weight.codes, 4, weight.count).view(shape).int()
            assert torch.equal(made.codes, torch._convert_weight_to_int4pack_for_cpu(codes, 1))
        again = made.restored()
        assert again.tensors().keys() == weight.tensors().keys() and made.bits == weight.bits
        assert all(torch.equal(t, weight.tensors()[k]) for k, t in again.tensors().items())
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(made.values(dtype), weight.values(dtype))


def test_one_weight_is_held_not_two() -> None:
    for grid, extra in ((Grid(bits=8), 2 * 64 + 4 * 64), (Grid(bits=4, group=32), 64 * 4 * 2 * 2)):
        layer = layer_of(grid, (64, 128))
        before = weight_bytes(layer)
        layer(random((1, 128), 0, torch.bfloat16))
        assert weight_bytes(layer) - before in (0, extra), "beside the codes only what the kernel reads of the scales"
        assert layer.bits == layer.packed.bits and weight_bytes(layer) == before


def test_a_layer_is_portable_for_whoever_looks() -> None:
    layer = layer_of(Grid(bits=4, group=32, symmetric=False), (64, 64))
    weight, x = layer.packed.tensors(), random((2, 64), 0, torch.bfloat16)
    y = layer(x)
    twin = copy.deepcopy(layer)
    assert all(torch.equal(t, weight[k]) for k, t in layer.packed.tensors().items()), "for an artifact"
    assert torch.equal(layer(x), y) and torch.equal(twin(x), y)
    state = layer.state_dict()
    assert set(weight) <= set(state) and torch.equal(state["codes"], weight["codes"])
    layer.packed.codes.copy_(torch.zeros_like(weight["codes"]))  # filled from a file
    assert not torch.equal(layer(x), y)
    twin.to(torch.float32)
    assert twin.like.dtype == torch.float32 and torch.equal(twin.packed.codes, weight["codes"])
    with torch.inference_mode():
        layer(x)
    layer.packed.codes.zero_()  # no tensor of inference mode


def test_it_goes_to_another_device_after_a_kernel_had_it() -> None:
    for grid in (Grid(bits=8), Grid(bits=4, group=32, symmetric=False)):
        layer = layer_of(grid, (64, 64))
        layer(random((1, 64), 0, torch.bfloat16))
        x = torch.empty(1, 64, dtype=torch.bfloat16, device="meta")
        assert layer.to("meta")(x).device.type == "meta"


def test_two_threads_that_begin_at_once_agree() -> None:
    layer = layer_of(Grid(bits=4, group=32), (64, 64))
    x = random((1, 64), 0, torch.bfloat16)
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(layer(x))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all(torch.equal(y, found[0]) for y in found)


@pytest.mark.parametrize(
    ("kernel", "grid", "shape", "activations", "reason"),
    [
        ("int8", Grid(bits=4), (16, 32), None, "not on plain 8-bit integers"),
        ("int8", Grid(levels="normal", bits=8), (16, 32), None, "not on plain 8-bit integers"),
        ("int8", Grid(bits=8, group=16), (16, 32), None, "16 weights share a scale, not a whole row of 32"),
        ("int8", Grid(bits=8, symmetric=False), (16, 32), None, "zero points"),
        ("int8", Grid(bits=8), (16, 40), None, "rows of 40 weights, not a multiple of 16"),
        ("int4", Grid(bits=4, group=32), (24, 64), None, "24 outputs, not a multiple of 16"),
        ("int4", Grid(bits=4, group=16), (16, 64), None, "groups of 16 in rows of 64"),
        ("int4", Grid(bits=3), (16, 64), None, "not on plain 4-bit integers"),
        ("w8a8", Grid(bits=8), (16, 64), None, "the inputs are not rounded to integers"),
        ("w8a8", Grid(bits=8), (16, 64), Activations(group=32), "the inputs are not rounded to integers"),
        ("w8a8", Grid(bits=8), (16, 64), Activations(levels="normal"), "the inputs are not rounded to integers"),
        ("w8a8", Grid(bits=8, group="tensor"), (2, 40_000), Activations(), "40000 inputs"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_and_runs_plainly(
    kernel: str, grid: Grid, shape: tuple[int, int], activations: Activations | None, reason: str
) -> None:
    layer = layer_of(grid, shape, activations)
    assert reason in str(why_not(kernel, layer.packed, activations))
    x = random((1, shape[1]), 0, torch.bfloat16)
    seen = x if activations is None else rounded(x, activations)
    if not fitting(layer.packed, activations):
        assert layer.kernel(1) == "plain"
        assert torch.equal(layer(x), nn.functional.linear(seen, layer.values(torch.bfloat16)))


def test_double_quantized_scales_fit_no_kernel_of_torchs() -> None:
    assert not fitting(
        quantize(random((64, 64)), Grid(bits=4, group=32), Grid(levels="dynamic", bits=8)), Activations()
    )
    assert fitting(NF4().quantize(random((64, 64))), Activations()) == {"nf4"}
    assert not fitting(NF4().quantize(random((64, 96))), None), "blocks run over rows"


def test_no_rows_and_odd_storage() -> None:
    layer = layer_of(Grid(bits=8), (16, 48))
    assert layer(torch.zeros(0, 48, dtype=torch.bfloat16)).shape == (0, 16)
    buffer = random((3 * 48 + 7,), 0, torch.bfloat16)
    for start in range(1, 8):  # begins where no vector of the processor may
        x = buffer[start : start + 48].view(1, 48)
        assert torch.equal(layer(x), layer(x.clone()))
    wide = random((4, 96), 0, torch.bfloat16)
    assert torch.equal(layer(wide[:, 1:49]), layer(wide[:, 1:49].contiguous()))


@pytest.mark.parametrize("inputs", [30, 33, 40, 1, 15, 17, 31])
@pytest.mark.parametrize("grid", [Grid(bits=8), Grid(bits=4), Grid(bits=8, symmetric=False)], ids=str)
def test_shapes_that_end_the_process_in_torch_do_not_here(grid: Grid, inputs: int) -> None:
    layer = layer_of(grid, (16, inputs))
    for rows in (1, 2, 5):
        x = random((rows, inputs), 1, torch.bfloat16)
        assert torch.equal(layer(x), nn.functional.linear(x, layer.values(torch.bfloat16)))


@pytest.mark.parametrize("kernel", FORMS)
def test_a_kernel_that_is_missing_or_wrong_here_is_not_used(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any) -> Any:
        raise RuntimeError("not compiled for this machine")

    monkeypatch.setitem(kernels._TRIALS, kernel, missing)
    assert not kernels.works.__wrapped__(kernel)
    monkeypatch.setitem(kernels._TRIALS, kernel, lambda: False)
    assert not kernels.works.__wrapped__(kernel)
    monkeypatch.setattr(kernels, "works", lambda name: name != kernel)
    assert pick(frozenset([kernel]), 1, torch.bfloat16) == "plain"


def test_it_is_plain_where_values_cannot_be_looked_at() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = layer_of(Grid(bits=8), (16, 48))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert kernels.kernel_for(layer.fits, torch.empty(1, 48, dtype=torch.bfloat16)) == "plain"
    assert kernels.pick(layer.fits, 1, torch.bfloat16, "cuda") == "plain"


@pytest.mark.parametrize("rows", [1, 40, 70])
@pytest.mark.parametrize(
    ("grid", "activations"),
    [
        (Grid(bits=8), None),
        (Grid(bits=4, group=32, symmetric=False), None),
        (Grid(bits=8), Activations()),
        (Grid(bits=4), Activations()),
    ],
    ids=str,
)
def test_gradients_are_those_of_the_dense_twin(grid: Grid, activations: Activations | None, rows: int) -> None:
    layer = layer_of(grid, (64, 96), activations, bias=True)
    layer.bias.requires_grad_(True)  # type: ignore[union-attr]
    x = random((rows, 96), 2, torch.bfloat16).requires_grad_(True)
    up = random((rows, 64), 3, torch.bfloat16)
    layer(x.detach())  # in the kernel's form, where there is one
    found = torch.autograd.grad(layer(x), (x, layer.bias), up)
    weight = layer.values(torch.bfloat16)
    assert torch.equal(found[0], up @ weight) and torch.equal(found[1], up.sum(0))


def test_a_graph_outlives_a_change_of_form() -> None:
    layer = layer_of(Grid(bits=4, group=32), (64, 64))
    x = random((70, 64), 0, torch.bfloat16).requires_grad_(True)
    y = layer(x)  # made of the portable form
    layer(x[:1].detach())  # and now it is held in the kernel's
    assert not isinstance(layer.held, Quantized)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, torch.ones(70, 64, dtype=torch.bfloat16) @ layer.values(torch.bfloat16))
    layer(x)
    assert isinstance(layer.held, Quantized), "training makes the weight from the portable form"


def test_a_static_range_must_be_found_first_and_clips_the_gradient() -> None:
    from fettle.core.errors import FettleError

    layer = layer_of(Grid(bits=8), (16, 48), Activations(group="tensor", static=True), dtype=torch.float32)
    x = torch.tensor([[0.5, 5.0, -5.0] + [0.0] * 45], requires_grad=True)
    with pytest.raises(FettleError, match="a layer of 16 x 48 has no range yet"):
        layer(x)
    layer.hold_range(torch.tensor(1 / 127.5))
    (grad,) = torch.autograd.grad(layer(x).sum(), x)
    whole = torch.ones(1, 16) @ layer.values(torch.float32)
    assert torch.allclose(grad[0, [0, *range(3, 48)]], whole[0, [0, *range(3, 48)]]) and not grad[0, 1:3].any()


@pytest.mark.parametrize(
    "edit",
    [RTN(), RTN(grid=Grid(bits=4, group=32, symmetric=False)), RTN(activations=Activations()), NF4(block=32)],
    ids=["int8", "int4", "w8a8", "nf4"],
)
def test_a_model_through_its_kernels_is_as_near_to_float32_as_without_them(
    edit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, vocab_size=64,
        initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16().eval().requires_grad_(False)
    edit.apply(model)
    prompt = torch.arange(12)[None]
    found = model(prompt).logits.float()
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert len(layers) == 14 and len({m.kernel(12) for m in layers}) == 1
    assert {type(m.held) is Quantized for m in layers} == {layers[0].kernel(12) == "plain"}
    step = model(prompt[:, :1]).logits
    assert torch.isfinite(step).all()
    monkeypatch.setattr(kernels, "works", lambda kernel: False)
    plain = model(prompt).logits.float()
    exact = model.float()(prompt).logits
    assert float((found - exact).norm()) < 1.3 * float((plain - exact).norm()), "as near as bfloat16 is without them"
