"""What feeds what: the linear layers that read one tensor, and the module before them that can take a scale off it.

    y = W x,  x = f(z; v):    f(z; v / s) = x / s  for every s > 0    =>    (W s) (x / s) = y

A *reading* is a tensor that linear layers of a block share as their input. A *feed* is a reading with its source: a
norm whose output it is, or a linear layer whose channels reach it one by one (values through an attention, the ungated
half through a gate, a layer through ReLU). Dividing the source's channels by s and multiplying the readers' columns by
s moves scale from activations to weights and changes nothing (SmoothQuant, Xiao et al. 2023, arXiv 2211.10438; AWQ, Lin
et al. 2023, arXiv 2306.00978).

Readings are seen in a run over a few tokens: layers share an input when they are given one tensor. Sources are proposed
by shape and decided by trial: with s random powers of two, which round nothing, the block must return what it returned
before, and must not when only one side is scaled. So a norm that also feeds a router, experts or the residual, a gate
that is no straight line, and whatever else no table knows of, fail and are left alone.

Shapes: C width, K inputs of a reader, N outputs of a source, M channels that s has one factor for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fettle.core.errors import FettleError
from fettle.models.blocks import Block, blocks, first
from fettle.models.experts import Experts, everywhere
from fettle.models.select import linears
from fettle.models.surgery import is_trained
from fettle.models.weight import in_out, read_weight

TOKENS = 8
# What a scaled block may differ from itself, as a share of what scaling one side only does to it.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # 0.03 for narrower types
FACTORS = (0.25, 0.5, 2.0, 4.0)


@dataclass(frozen=True)
class Reading:
    """Linear layers of one block that are given the same tensor [.., K]."""

    block: str
    readers: tuple[str, ...]  # in the order in which they run


@dataclass(frozen=True)
class Feed:
    """A reading whose scale can be moved into its source."""

    reading: Reading
    source: str
    kind: Literal["norm", "offset", "linear"]  # 'offset': a norm that multiplies by 1 + weight
    rows: Tensor  # int64 [M]: the source's channels
    spread: Tensor  # int64 [K]: which of the M factors each input of the readers has

    @property
    def readers(self) -> tuple[str, ...]:
        """The layers whose columns take the scale."""
        return self.reading.readers

    def reduce(self, values: Tensor) -> Tensor:
        """[M], the greatest of `values` [K] among the inputs that share a factor."""
        return values.new_zeros(len(self.rows)).scatter_reduce(
            0, self.spread.to(values.device), values, "amax", include_self=False
        )


@dataclass(frozen=True)
class Feeds:
    """All of a model: what can be scaled, and the readings left alone, each with the reason."""

    found: tuple[Feed, ...]
    left: dict[Reading, str]


@torch.no_grad()
def move(model: nn.Module, feed: Feed, scale: Tensor) -> None:
    """Divide the source's channels by `scale` [M] and multiply the readers' columns by it; the model computes the same."""
    _divide(model.get_submodule(feed.source), feed, scale)
    _multiply(model, feed, scale)


def feeds(model: nn.Module) -> Feeds:
    """The feeds of every block. FettleError where the model does not run on a few tokens, or has no blocks."""
    found: list[Feed] = []
    left: dict[Reading, str] = {}
    for block, seen in _traced(model).items():
        for reading in seen.readings():
            if (why := _untouchable(model, reading.readers)) is not None:
                left[reading] = why
                continue
            feed = next((f for f in _candidates(model, seen, reading) if _holds(model, seen, f)), None)
            if feed is None:
                left[reading] = f"no norm or layer of {block} takes a scale off its input without changing the block"
            else:
                found.append(feed)
    return Feeds(tuple(found), left)


# The run over a few tokens.


class _Seen:
    """What happened in one block."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.given: list[tuple[str, Tensor]] = []  # (linear, its input)
        self.made: dict[str, Tensor] = {}  # what each norm and linear returned

    def readings(self) -> list[Reading]:
        """In the order in which they are read first."""
        groups: dict[tuple[Any, ...], list[str]] = {}
        for name, x in self.given:
            groups.setdefault(identity(x), []).append(name)
        return [Reading(self.block.name, tuple(dict.fromkeys(names))) for names in groups.values()]

    def input_of(self, name: str) -> Tensor:
        return next(x for n, x in self.given if n == name)


def identity(x: Tensor) -> tuple[Any, ...]:
    """The same for two tensors that are one, under whatever shape; while both are alive."""
    return x.data_ptr(), x.numel(), x.shape[-1], x.is_contiguous() or x.stride()


def _traced(model: nn.Module) -> dict[str, _Seen]:
    """By block, in the order of the model."""
    seen = {block.name: _Seen(block) for block in blocks(model)}
    every = linears(model)
    handles = []
    for name, record in seen.items():
        module = model.get_submodule(name)

        def enter(_: nn.Module, args: Any, kwargs: Any, record: _Seen = record) -> None:
            record.args, record.kwargs = args, kwargs

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        for inner in [n for n in every if n.startswith(f"{name}.")]:

            def read(_: nn.Module, args: Any, inner: str = inner, record: _Seen = record) -> None:
                record.given.append((inner, args[0]))

            def made(_: nn.Module, __: Any, out: Any, inner: str = inner, record: _Seen = record) -> None:
                record.made[inner] = out

            handles += [every[inner].register_forward_pre_hook(read), every[inner].register_forward_hook(made)]
        for norm in record.block.norms:

            def normed(_: nn.Module, __: Any, out: Any, norm: str = norm, record: _Seen = record) -> None:
                record.made[norm] = first(out)

            handles.append(model.get_submodule(norm).register_forward_hook(normed))
    try:
        _run(model)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@everywhere()
def _run(model: Any) -> None:
    device = next(model.parameters()).device
    most = int(model.config.get_text_config().vocab_size)
    ids = torch.arange(TOKENS, device=device)[None].mul(7).add(3).remainder(most)
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(**inputs, use_cache=False) if _takes_cache(model) else model.eval()(**inputs)
    except (RuntimeError, TypeError, ValueError) as error:
        raise FettleError(
            f"{type(model).__name__} does not run on a few tokens, so what feeds what cannot be seen "
            f"({str(error).strip().splitlines()[0]})"
        ) from error
    finally:
        model.train(training)


def _takes_cache(model: Any) -> bool:
    return hasattr(model.config, "use_cache")


def _untouchable(model: nn.Module, names: Sequence[str]) -> str | None:
    """Why the weights of some modules may not be scaled."""
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, (nn.Linear, Conv1D)) and type(module).forward not in (nn.Linear.forward, Conv1D.forward):
            return f"{name} is a {type(module).__name__}, more than a linear layer"
        if not isinstance(module, (nn.Linear, Conv1D)) and any(True for _ in module.children()):
            return f"{name} is wrapped by an edit"
        if "weight" not in module._parameters:
            return f"{name} is quantized"
        if is_trained(module.weight):
            return f"an edit trains {name}"
    return None


# Candidates.


def _candidates(model: nn.Module, seen: _Seen, reading: Reading) -> Iterator[Feed]:
    """Sources that the shapes allow, the likeliest first."""
    read = seen.input_of(reading.readers[0])
    width = read.shape[-1]
    every = torch.arange(width)
    for name, out in seen.made.items():
        if name in seen.block.norms and identity(out) == identity(read) and _untouchable(model, [name]) is None:
            for kind in ("norm", "offset"):
                yield Feed(reading, name, kind, every, every)  # type: ignore[arg-type]
            return
    order = [name for name, _ in seen.given]
    before = order[: order.index(reading.readers[0])]
    if (expert := _expert(model, reading.readers[0])) is not None:
        before = [name for name in before if name.startswith(expert)]  # nothing else reaches it channel by channel
    for name in reversed(dict.fromkeys(before)):
        if name not in reading.readers and _untouchable(model, [name]) is None:
            for rows, spread in _channel_maps(model, in_out(model.get_submodule(name))[1], width):
                yield Feed(reading, name, "linear", rows, spread)


def _expert(model: nn.Module, name: str) -> str | None:
    """The prefix of the names of an expert's layers, where a layer is one of them."""
    home = name.rpartition(".")[0]
    return f"{home}." if isinstance(model.get_submodule(home.rpartition(".")[0]), Experts) else None


def _channel_maps(model: Any, outputs: int, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """How N channels may reach K inputs: one to one, the last of a fused layer, heads shared or apart."""
    text = model.config.get_text_config()
    heads = next((int(getattr(text, key)) for key in ("num_attention_heads", "n_head") if getattr(text, key, None)), 1)
    shared = int(getattr(text, "num_key_value_heads", None) or heads)
    every = torch.arange(width)
    if outputs >= width:
        yield torch.arange(outputs - width, outputs), every
    if width % heads:
        return
    size = width // heads
    if shared < heads and heads % shared == 0 and outputs >= shared * size:
        head, inside = every // size, every % size
        yield torch.arange(outputs - shared * size, outputs), head // (heads // shared) * size + inside
    if outputs == 3 * width and heads > 1:
        yield every // size * (3 * size) + 2 * size + every % size, every


# The trial.


@torch.no_grad()
def _holds(model: nn.Module, seen: _Seen, feed: Feed) -> bool:
    """Whether the block computes the same after `move`, and not after half of it."""
    generator = torch.Generator().manual_seed(0)
    choice = torch.randint(len(FACTORS), (len(feed.rows),), generator=generator)
    device = next(model.parameters()).device
    scale = torch.tensor(FACTORS)[choice].to(device)
    before = _output(model, seen)
    with _kept(model, [feed.source]):
        _divide(model.get_submodule(feed.source), feed, scale)
        half = _apart(_output(model, seen), before)
        with _kept(model, feed.readers):
            _multiply(model, feed, scale)
            whole = _apart(_output(model, seen), before)
    tolerance = TOLERANCE.get(before.dtype, 0.03)
    return half > 0 and whole <= tolerance * half


@everywhere()
def _output(model: nn.Module, seen: _Seen) -> Tensor:
    block = model.get_submodule(seen.block.name)
    training = block.training
    try:
        return first(block.eval()(*seen.args, **seen.kwargs))  # type: ignore[no-any-return]
    finally:
        block.train(training)


def _apart(one: Tensor, other: Tensor) -> float:
    """The norm of the difference; infinite where it is not a number."""
    return float((one.double() - other.double()).norm().nan_to_num(torch.inf))


@contextmanager
def _kept(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within it the parameters of some modules may change; after it they are as before, bit for bit."""
    held = [(p, p.detach().clone()) for n in names for p in model.get_submodule(n).parameters()]
    try:
        yield
    finally:
        for parameter, value in held:
            parameter.copy_(value)


def _divide(source: nn.Module, feed: Feed, scale: Tensor) -> None:
    rows, bias = feed.rows.to(scale.device), source._parameters.get("bias")
    weight = read_weight(source) if feed.kind == "linear" else source._parameters["weight"]
    assert weight is not None
    wide = weight[rows].to(torch.promote_types(weight.dtype, torch.float32))
    by = scale.to(wide)
    weight[rows] = ((1 + wide) / by - 1 if feed.kind == "offset" else wide / _column(by, wide)).to(weight.dtype)
    if bias is not None:
        bias[rows] = (bias[rows].to(wide.dtype) / by).to(bias.dtype)


def _multiply(model: nn.Module, feed: Feed, scale: Tensor) -> None:
    columns = scale[feed.spread.to(scale.device)]
    for name in feed.readers:
        weight = read_weight(model.get_submodule(name))
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight.copy_((weight.to(wide) * columns.to(wide)).to(weight.dtype))


def _column(by: Tensor, like: Tensor) -> Tensor:
    return by[:, None] if like.ndim == 2 else by
