"""Grids and packing: properties over all of them, and float64 formulae."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fettle.core.errors import FettleError
from fettle.quantize.grid import Grid, decode, dynamic, encode, fit, group_length, levels, snapped
from fettle.quantize.packed import Quantized, fake, pack, packed_bytes, quantize, unpack

SCALES = Grid(levels="dynamic", bits=8, group=256)


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    kind = draw(st.sampled_from(["int", "normal", "dynamic"]))
    symmetric = kind == "dynamic" or draw(st.booleans())
    return Grid(
        levels=kind,
        bits=8 if kind == "dynamic" else draw(st.integers(2, 8)),
        symmetric=symmetric,
        narrow=kind == "int" and symmetric and draw(st.booleans()),
        group=draw(st.sampled_from(["row", "tensor", 4, 6])),
        range=draw(st.sampled_from(["minmax", "mse", "percentile"])),
        percentile=draw(st.sampled_from([60.0, 99.0, 100.0])),
        scale=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
    )


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.sampled_from([(12,), (5, 12), (2, 3, 24), (1, 36)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(shape, generator=generator, dtype=draw(st.sampled_from([torch.float32, torch.float64])))
    x = x * 10.0 ** draw(st.integers(-3, 3)) + draw(st.sampled_from([0.0, 0.5, -3.0]))
    if draw(st.booleans()):
        x[..., :6] = 0
    return x


def halves(grid: Grid) -> float:
    """The largest distance of a number within the levels from the nearest of them, as a share of the scale."""
    return float(levels(grid).double().diff().max()) / 2


@given(grids(), tensors())
def test_every_value_is_within_half_a_gap_of_its_grid(grid: Grid, x: Tensor) -> None:
    grid = grid.model_copy(update={"range": "minmax", "scale": "float32"})
    length = group_length(tuple(x.shape), grid)
    found = quantize(x, grid).values(x.dtype)
    groups, values = x.reshape(-1, length), found.reshape(-1, length)
    scale, zero = fit(groups, grid)
    # a real zero is stored in float32, as a share of the scale; an integer one may lie half a step off
    slack = 1e-5 + (0.5 if zero is not None and grid.levels == "int" else 0.0)
    assert bool(((groups - values).abs() <= scale * (halves(grid) + slack) + 1e-30).all())


@given(grids(), tensors())
def test_the_code_is_the_nearest_of_all_levels(grid: Grid, x: Tensor) -> None:
    groups = x.reshape(-1, group_length(tuple(x.shape), grid)).double()
    scale, zero = fit(groups, grid)
    chosen = decode(encode(groups, scale, zero, grid), scale, zero, grid)
    table = levels(grid).double()[1 if grid.narrow else 0 :]
    every = (table - (0 if zero is None else zero)[..., None] if zero is not None else table[None, None]) * scale[
        ..., None
    ]
    nearest = (groups[..., None] - every).abs().amin(-1)
    assert torch.allclose((groups - chosen).abs(), nearest, rtol=1e-9, atol=1e-9 * float(groups.abs().max()))


@given(grids(), tensors())
def test_quantizing_twice_changes_nothing_where_the_range_is_kept(grid: Grid, x: Tensor) -> None:
    groups = x.reshape(-1, group_length(tuple(x.shape), grid))
    scale, zero = fit(groups, grid)
    codes = encode(groups, scale, zero, grid)
    again = encode(decode(codes, scale, zero, grid), scale, zero, grid)
    used = (scale > 0).expand_as(codes)
    assert torch.equal(codes[used], again[used])


@given(grids(), tensors())
def test_packed_values_are_those_of_the_plain_formula(grid: Grid, x: Tensor) -> None:
    packed = quantize(x, grid)
    groups = x.reshape(-1, packed.length)
    scale, zero = fit(groups, grid)
    plain = decode(encode(groups, scale, zero, grid), scale, zero, grid).view(x.shape)
    assert torch.equal(packed.values(), plain.float()) or torch.allclose(
        packed.values(), plain.float(), rtol=2e-7, atol=0
    )
    assert packed.codes.numel() == packed_bytes(x.numel(), grid.bits)


@given(grids(), tensors())
def test_the_least_error_is_the_least(grid: Grid, x: Tensor) -> None:
    def error(kind: str) -> Tensor:
        one = grid.model_copy(update={"range": kind})
        groups = x.reshape(-1, group_length(tuple(x.shape), one))
        scale, zero = fit(groups, one)
        return (decode(encode(groups, scale, zero, one), scale, zero, one) - groups).square().sum(1)

    assert bool((error("mse") <= error("minmax") * (1 + 1e-6)).all())


@given(st.integers(2, 8), st.integers(0, 70), st.integers(0, 9))
def test_packing_comes_back_and_takes_no_bit_too_many(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    data = pack(codes, bits)
    assert data.numel() == (count * bits + 7) // 8
    assert torch.equal(unpack(data, bits, count), codes)
    text = "".join(f"{int(c):0{bits}b}" for c in codes).ljust(8 * data.numel(), "0")
    assert [int(text[8 * i : 8 * i + 8], 2) for i in range(data.numel())] == data.tolist()


def test_int_grids_are_the_textbook_formulae() -> None:
    x = torch.tensor([[-1.0, 0.2, 3.0, 0.9]], dtype=torch.float64)
    scale, zero = fit(x, Grid(bits=4, symmetric=False))
    assert float(scale) == pytest.approx(4 / 15) and float(zero) == round(1 / (4 / 15))
    assert encode(x, scale, zero, Grid(bits=4, symmetric=False)).tolist() == [[0, 5, 15, 7]]
    scale, zero = fit(x, Grid(bits=8, narrow=True))
    assert float(scale) == pytest.approx(3 / 127) and zero is None
    assert encode(x, scale, None, Grid(bits=8, narrow=True)).tolist() == [[128 - 42, 128 + 8, 255, 128 + 38]]
    scale, _ = fit(x, Grid(bits=4))
    assert float(scale) == pytest.approx(3 / 7.5)


def test_normal_levels_are_equally_likely_quantiles() -> None:
    from fettle.quantize.grid import NF4, _normal

    assert torch.equal(levels(Grid(levels="normal", bits=4)), torch.tensor(NF4))
    for bits in range(2, 9):
        table = levels(Grid(levels="normal", bits=bits))
        assert len(table) == 2**bits and bool((table.diff() > 0).all())
        assert table[0] == -1 and table[-1] == 1 and (table == 0).sum() == 1
    end = 1 - (1 / 32 + 1 / 30) / 2
    above = torch.special.ndtri(torch.linspace(end, 0.5, 9, dtype=torch.float64))[:-1].flip(0)
    assert torch.allclose(torch.tensor(NF4[8:], dtype=torch.float64), above / above.max(), atol=2e-7)
    assert torch.equal(_normal(4), torch.tensor(NF4))


def test_the_dynamic_code_spans_seven_decades() -> None:
    for signed in (True, False):
        code = dynamic(signed)
        assert len(code) == 256 and bool((code.diff() > 0).all()) and code[-1] == 1 and (code == 0).sum() == 1
        assert float(code[code > 0].min()) < 6e-7


@pytest.mark.parametrize("bits", range(2, 9))
def test_effective_bits_count_scales_and_zeros(bits: int) -> None:
    x = torch.randn(8, 128)
    assert quantize(x, Grid(bits=bits, group=64)).bits == bits + 32 / 64
    assert quantize(x, Grid(bits=bits, group=64, scale="float16")).bits == bits + 16 / 64
    assert quantize(x, Grid(bits=bits, group=64, symmetric=False)).bits == bits + (32 + bits) / 64
    assert quantize(x, Grid(bits=bits, group="tensor")).bits == bits + 32 / 1024


@given(st.integers(1, 700), st.sampled_from([3, 7, 64]), st.integers(2, 8))
def test_groups_that_run_over_rows_and_a_short_last_one(count: int, group: int, bits: int) -> None:
    x = torch.randn(count, generator=torch.Generator().manual_seed(count))
    packed = quantize(x, Grid(bits=bits, group=group), SCALES, across_rows=True)
    alone = torch.cat([fake(part, Grid(bits=bits, group="tensor")) for part in x.split(group)])
    plain = quantize(x, Grid(bits=bits, group=group), across_rows=True)
    assert torch.equal(plain.values(), alone)
    scales = packed.scale
    assert isinstance(scales, Quantized) and isinstance(plain.scale, Tensor) and torch.equal(packed.codes, plain.codes)
    spread = float((plain.scale - plain.scale.mean()).abs().max())
    assert float((scales.values() - plain.scale).abs().max()) <= 0.01 * spread + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_long_tensors_go_through_in_chunks(monkeypatch: pytest.MonkeyPatch, bits: int, dtype: torch.dtype) -> None:
    x = torch.randn(37, 60)
    packed = quantize(x, Grid(bits=bits, group=60, symmetric=False))
    whole = packed.values(dtype)
    monkeypatch.setattr("fettle.quantize.packed.CHUNK", 128)
    assert torch.equal(packed.values(dtype), whole) and whole.dtype == dtype
    assert torch.equal(whole, packed.values().to(dtype))


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_that_begin_anywhere_in_memory_have_the_same_values(bits: int) -> None:
    packed = quantize(torch.randn(3, 40), Grid(bits=bits, group=8, symmetric=False))
    for start in range(1, 9):
        memory = torch.full((start + packed.codes.numel() + 3,), 255, dtype=torch.uint8)
        memory[start : start + packed.codes.numel()] = packed.codes
        moved = packed.holding(packed.tensors() | {"codes": memory[start : start + packed.codes.numel()]})
        assert torch.equal(moved.values(), packed.values())


def test_rows_are_channels_and_tokens() -> None:
    x = torch.randn(3, 4, 16)
    assert torch.equal(
        fake(x, Grid(bits=4)), torch.stack([fake(row, Grid(bits=4)) for row in x.flatten(0, 1)]).view_as(x)
    )
    assert group_length((3, 4, 16), Grid(group="tensor")) == 192


def test_refusals_are_sentences() -> None:
    with pytest.raises(FettleError, match="group: 7 does not divide rows of 12 values; choose 6"):
        quantize(torch.randn(2, 12), Grid(group=7))
    with pytest.raises(FettleError, match="too wide for a scale of float16; set grid.scale: float32"):
        quantize(torch.full((1, 32), 1e6), Grid(scale="float16"))
    with pytest.raises(FettleError, match="not finite"):
        quantize(torch.tensor([1.0, torch.nan]), Grid())
    for bad in ({"levels": "dynamic"}, {"narrow": True, "symmetric": False}, {"group": 0}, {"bits": 9}):
        with pytest.raises(ValueError):
            Grid(**bad)


def test_zeros_and_constants() -> None:
    for kind in ("int", "normal"):
        for symmetric in (True, False):
            grid = Grid(levels=kind, symmetric=symmetric, bits=4)
            assert torch.equal(fake(torch.zeros(2, 8), grid), torch.zeros(2, 8))
            found = fake(torch.full((1, 8), 3.0), grid)
            assert torch.allclose(found, torch.full((1, 8), 3.0), rtol=0.07)


@given(tensors(), grids(), st.sampled_from([1.0, 0.5]))
def test_snapping_is_encoding_and_decoding(x: Tensor, grid: Grid, share: float) -> None:
    groups = x.reshape(-1, x.shape[-1])
    scale, zero = fit(groups, grid)
    scale = scale * share
    found = snapped(groups, scale, zero, grid)
    assert torch.equal(found, decode(encode(groups, scale, zero, grid), scale, zero, grid))
    assert found.dtype == scale.dtype and torch.equal(
        snapped(groups.bfloat16(), scale.float(), zero, grid),
        decode(encode(groups.bfloat16(), scale.float(), zero, grid), scale.float(), zero, grid),
    )
