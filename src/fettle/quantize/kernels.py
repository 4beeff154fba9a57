"""Products with packed weights on what the hardware has. A kernel that does not fit is never an error: `plain` always does.

    kernel   weights                          x                        rows       through
    int8     8 bits, symmetric, a row         bfloat16                 to 32      aten._weight_int8pack_mm
    int4     4 bits, groups of 32 n           bfloat16                 to 64      aten._weight_int4pack_mm_for_cpu
    w8a8     8 bits, a row                    rounded, 8 bits at most  any        aten._int_mm; of 2 to 8 the int8 kernel's
    nf4      NF4, blocks of 32 n in a row     bfloat16                 to 128     bitsandbytes' gemv_4bit, where it is installed
    plain    any                              any                      any        W made in the type of x, torch's product

Few rows are bound by reading the weight, many by multiplying: over the bound W is made once for the call, which costs as much
as those rows of the kernel. Each kernel reads an arrangement of its own. A layer is held in it, in place
of the portable codes and at the same size, from the first call that can use it on; the portable form is made again from it,
bit for bit, when somebody asks. The weights that `plain` multiplies with are the same in both forms.

Bounds, for x in bfloat16 with u = 2^-8, y against exact arithmetic on the same codes, |x| |W|' the product of magnitudes:

    plain    u |x| |W|' + u |y|           W and y are rounded once
    int8     u |y| + u |y|                the row's scale is rounded, and y
    int4     u |x| (|W| + |s (8 - z)|)' + u |y|    the group's scale and offset are rounded, and y
    nf4      3 u |x| |W|' + u |y|         the levels, the scale and their product are rounded, and y
    w8a8     u |y| (float32: 2^-22 |y|)   the integers are exact; for 2 to 8 rows of bfloat16 3 u |y|

each up to float32's summation. Before a kernel is first used it is tried on this machine against the formula. What torch's
kernels do not check themselves is checked here: alignment (the int8 kernel ends the process without), sizes, types.

Shapes: M rows of x, N outputs, K inputs, L values a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fettle.quantize.activations import Activations, Range, ranges, rounded
from fettle.quantize.grid import Grid, encode, lasting
from fettle.quantize.int4 import BLOCKS, Int4, block_of
from fettle.quantize.int8 import Int8
from fettle.quantize.normal4 import Normal4, is_installed, why_not_normal4
from fettle.quantize.packed import Quantized, quantize, single

ROWS = {"int8": 32, "int4": 64, "nf4": 128}  # the most for which reading packed weights is the faster way
# _int_mm lays the weight out anew at each call but that of a single row. For these rows, and weights of this size on, which
# no cache near the core holds, that takes longer than the int8 kernel does.
SHORT, LARGE = range(2, 9), 1 << 21
MOST_INPUTS = (2**31 - 1) // 255**2  # K up to which sums of products of codes fit in int32


Arranged = Int8 | Int4 | Normal4
FORMS: dict[str, type[Arranged]] = {"int8": Int8, "int4": Int4, "nf4": Normal4, "w8a8": Int8}  # what a kernel reads
Held = Quantized | Arranged  # what a layer holds; each has `values(dtype)`, `bits` and `portable` or is it


def tensors(held: Held) -> dict[str, Tensor]:
    """What a layer must hold, by name."""
    if isinstance(held, Quantized):
        return held.tensors()
    own = {f"arranged_{field.name}": getattr(held, field.name) for field in fields(held) if field.name != "portable"}
    return own | {name: t for name, t in held.portable.tensors().items() if name != "codes"}


# Which.


def why_not(kernel: str, weight: Quantized, activations: Activations | None = None) -> str | None:
    """What keeps a weight (its codes may be missing) from a kernel; None where nothing does."""
    if kernel == "nf4":
        return why_not_normal4(weight)
    grid, bits = weight.grid, 4 if kernel == "int4" else 8
    if grid.levels != "int" or grid.bits != bits or weight.offset is not None or not isinstance(weight.scale, Tensor):
        return f"the weight is not on plain {bits}-bit integers"
    if kernel == "int4":
        return _why_not_int4(weight)
    outputs, inputs = weight.shape
    if weight.length not in (inputs, outputs * inputs):
        return f"{weight.length} weights share a scale, not a whole row of {inputs}"
    if kernel == "w8a8":
        return _why_not_integers(weight, activations)
    if weight.zero is not None:
        return "the weight has zero points"
    return f"rows of {inputs} weights, not a multiple of 16" if inputs % 16 else None


def _why_not_int4(weight: Quantized) -> str | None:
    if weight.shape[0] % 16:
        return f"{weight.shape[0]} outputs, not a multiple of 16"
    if not block_of(weight):
        return f"groups of {weight.length} in rows of {weight.shape[1]}, not multiples of {BLOCKS[-1]}"
    return None


def _why_not_integers(weight: Quantized, activations: Activations | None) -> str | None:
    if activations is None or activations.levels != "int" or isinstance(activations.group, int):
        return "the inputs are not rounded to integers, by token or tensor"
    if weight.zero is not None and weight.zero.is_floating_point():
        return "zero points that are no integers"
    inputs = weight.shape[1]
    return f"{inputs} inputs, over the {MOST_INPUTS} whose sum fits in 32 bits" if inputs > MOST_INPUTS else None


def fitting(weight: Quantized, activations: Activations | None) -> frozenset[str]:
    """The kernels that a weight and the grid of its inputs fit."""
    return frozenset(kernel for kernel in FORMS if why_not(kernel, weight, activations) is None)


def pick(fits: frozenset[str], rows: int, dtype: torch.dtype, device: str = "cpu") -> str:
    """The kernel for a product of so many rows: one of those that fit and work on this machine, or 'plain'."""
    if not fits or not rows or device != "cpu":
        return "plain"
    if "w8a8" in fits and dtype in (torch.float32, torch.bfloat16, torch.float16) and works("w8a8"):
        return "w8a8"
    if dtype == torch.bfloat16:
        for kernel, most in ROWS.items():
            if kernel in fits and rows <= most and works(kernel):
                return kernel
    return "plain"


# Products.


def kernel_for(fits: frozenset[str], x: Tensor) -> str:
    """`pick` for x [.., K]; 'plain' where its values cannot be looked at (fake tensors, a graph being compiled)."""
    if type(x) is not Tensor or torch.compiler.is_compiling():
        return "plain"
    return pick(fits, x.numel() // x.shape[-1], x.dtype, x.device.type)


def product(
    kernel: str, held: Held, x: Tensor, bias: Tensor | None, activations: Activations | None, range: Range | None
) -> Tensor:
    """x [.., K] -> [.., N]. The weight is held in the form of the kernel, or in any for 'plain'; `range`: a static one of x."""
    flat = x.reshape(-1, x.shape[-1])
    if kernel == "w8a8":
        y = product_w8a8(held, flat, activations, range)  # type: ignore[arg-type]
    else:
        flat = flat if activations is None else rounded(flat, activations, range)
        if kernel == "plain":
            y = F.linear(flat, held.values(x.dtype), None if bias is None else bias.to(x.dtype))
            return y.view(*x.shape[:-1], y.shape[1])
        y = held.product(flat)  # type: ignore[union-attr]
    y = y if bias is None else y.add_(bias)
    return y.view(*x.shape[:-1], y.shape[1])


def product_w8a8(weight: Int8, x: Tensor, grid: Activations, range: Range | None) -> Tensor:
    """x [M, K], rounded to integers -> [M, N] in the type of x. Outliers are multiplied apart, as they are."""
    if grid.outliers is None:
        return _of_integers(weight, x, grid, range).to(x.dtype)
    large = x.abs() >= grid.outliers
    y = _of_integers(weight, x.masked_fill(large, 0), grid, range)
    at = large.any(0).nonzero()[:, 0]  # inputs: few, if any
    y = y if not len(at) else y.float().add_(x[:, at].where(large[:, at], 0).float() @ weight.inputs(at).t())
    return y.to(x.dtype)


def _of_integers(weight: Int8, x: Tensor, grid: Activations, range: Range | None) -> Tensor:
    """In float32, or what the int8 kernel gives.

    y = s_x s_w sum (d - z_x) (c - z_w), with d the codes of x and c those of the weight, both less half of their range.
    """
    scale, zero = range or ranges(x, grid)
    middle = 2 ** (grid.bits - 1)
    codes = encode(x, scale, zero, grid)
    if zero is None and _is_read_best(weight, x):
        return weight.product(codes.to(x.dtype).sub_(middle)).mul_(scale)
    d = codes.sub_(middle).view(torch.int8)
    sums = torch._int_mm(d, weight.codes.t())
    z_x = None if zero is None else (zero - middle).int()
    z_w = None if weight.zeros is None else weight.zeros.int()
    if z_x is not None:
        sums.sub_(z_x * weight.sums)
    if z_w is not None:
        of_x = d.sum(1, keepdim=True, dtype=torch.int32)
        sums.sub_((of_x if z_x is None else of_x - x.shape[1] * z_x) * z_w)
    return torch.mul(sums, scale).mul_(single(weight.portable.scale))


def _is_read_best(weight: Int8, x: Tensor) -> bool:
    """Whether the int8 kernel, given the codes of x as numbers, is faster than the product of integers."""
    if len(x) not in SHORT or weight.codes.numel() < LARGE or x.dtype != torch.bfloat16:
        return False
    return why_not("int8", weight.portable) is None and works("int8")


# Whether they work here.


@cache
def works(kernel: str) -> bool:
    """Whether a kernel exists for this processor and gives what its formula says, on a small problem."""
    with lasting(), torch.no_grad():
        try:
            return _fast(kernel) and _TRIALS[kernel]()
        except (RuntimeError, AttributeError, NotImplementedError):
            return False


def _fast(kernel: str) -> bool:
    """Elsewhere torch has loops that are slower than making the weight."""
    if kernel == "w8a8":
        return torch.cpu._is_vnni_supported()
    if kernel == "nf4":
        return is_installed()
    return torch.backends.cpu.get_cpu_capability() in ("AVX512", "AVX2")


def _try_int8() -> bool:
    weight, x = _problem(Grid(bits=8, scale="bfloat16"), 12, 48)
    return _close(Int8.of(weight).product(x), x, weight)


def _try_int4() -> bool:
    weight, x = _problem(Grid(bits=4, group=32, symmetric=False, scale="bfloat16"), 112, 128)
    made = Int4.of(weight)
    return torch.equal(made.restored().codes, weight.codes) and _close(made.product(x), x, weight)


def _try_nf4() -> bool:
    weight, x = _problem(Grid(levels="normal", bits=4, group=32), 64, 96)
    made = Normal4.of(weight)
    return torch.equal(made.restored().codes, weight.codes) and _close(made.product(x), x, weight)


def _try_w8a8() -> bool:
    """With the largest codes, where units that sum in 16 bits saturate."""
    a, b = torch.full((17, 40), -128, dtype=torch.int8), torch.full((9, 40), -128, dtype=torch.int8)
    a[:, ::3], b[:, ::5] = 127, 127
    return torch.equal(torch._int_mm(a, b.t()).double(), a.double() @ b.double().t())


_TRIALS: dict[str, Callable[[], bool]] = {"int8": _try_int8, "int4": _try_int4, "nf4": _try_nf4, "w8a8": _try_w8a8}


def _problem(grid: Grid, rows: int, columns: int) -> tuple[Quantized, Tensor]:
    noise = torch.arange(rows * columns, dtype=torch.float32).mul_(0.37).sin_().view(rows, columns)
    return quantize(noise + 0.1, grid), noise[:3].mul(0.7).bfloat16()


def _close(y: Tensor, x: Tensor, weight: Quantized) -> bool:
    exact, size = x.double() @ weight.values().double().t(), x.double().abs() @ weight.values().double().abs().t()
    return bool(((y.double() - exact).abs() <= 2**-7 * size).all())
