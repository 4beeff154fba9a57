"""The blocks of any transformers model, found by their structure: attentions, feed-forward part, norms.

A stack of blocks is an innermost `ModuleList` whose members each hold an attention. An attention is a module that
counts heads and holds linear layers, with what stands beside it below the block (BERT's output projection). What else
of a block multiplies by matrices is its feed-forward part; where no module of its own holds it (OPT, BERT), it has no
name. All names are those of `model.named_modules()`; what edits wrapped or added is seen through.

C width of the block, K heads' width, I width inside of the feed-forward part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fettle.core.errors import FettleError
from fettle.models.select import linears
from fettle.models.weight import in_out, innermost, is_linear

HEADS = ("num_heads", "n_heads", "num_attention_heads", "n_head", "head_dim", "head_size", "num_key_value_groups")
EPSILON = ("eps", "epsilon", "variance_epsilon")
CROSS = ("cross", "encdec", "encoder_attn")


@dataclass(frozen=True)
class Attention:
    """One attention of a block. Where one linear makes queries, keys and values, all three names are its name."""

    name: str  # with all that belongs to it (its output projection, in T5 its norm)
    core: str  # the module that counts heads, inside of it or itself
    query: tuple[str, ...]  # linears [C] -> [K]; empty where their names say nothing
    key: tuple[str, ...]
    value: tuple[str, ...]
    out: str  # linear [K] -> [C]
    cross: bool = False  # attends to an encoder's states

    @property
    def fused(self) -> bool:
        """Whether one linear makes queries, keys and values."""
        return bool(self.query) and self.query == self.key == self.value


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward part of a block: dense layers, or experts."""

    name: str | None  # None where its layers stand in the block itself
    enter: tuple[str, ...]  # linears [C] -> [I], two where it is gated; empty for experts
    leave: str | None  # linear [I] -> [C]; None for experts
    experts: tuple[str, ...] = ()  # modules that hold the weights of all experts as stacks [E, ..]


@dataclass(frozen=True)
class Block:
    """One residual block."""

    name: str
    stack: str  # the list that it is in
    width: int
    attentions: tuple[Attention, ...]
    mlp: FeedForward | None
    norms: tuple[str, ...]

    @property
    def cross(self) -> bool:
        """Whether it reads an encoder's states."""
        return any(a.cross for a in self.attentions)


def blocks(model: nn.Module) -> list[Block]:
    """Every block, stack by stack, in order. FettleError with what was not understood."""
    every = linears(model, exclude_head=False)
    found: list[Block] = []
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    stacks = [name for name, module in lists if all(_heads(member) for member in module)]
    for name, module in lists:
        if name in stacks and not any(other.startswith(f"{name}.") for other in stacks):
            found += [_block(model, f"{name}.{i}", name, every) for i in range(len(module))]
    if not found:
        raise FettleError(
            f"{type(model).__name__}: no list of blocks with attention in it was found; lists looked at: "
            f"{', '.join(f'{n} (of {type(m[0]).__name__})' for n, m in lists) or 'none'}"
        )
    return found


def is_norm(module: nn.Module) -> bool:
    """Whether a module scales each channel by a weight after normalizing."""
    own = dict(module.named_parameters(recurse=False))
    return (
        "weight" in own
        and not any(True for _ in module.children())
        and all(p.ndim == 1 for p in own.values())
        and any(hasattr(module, key) for key in EPSILON)
    )


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """Every norm of a model by name; what an edit wrapped around one stands for it, under its name."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if is_norm(innermost(module)) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def closing_norms(model: nn.Module, found: list[Block]) -> dict[str, str | None]:
    """By block, the norm whose output is the block's (post-norm models: BERT), or None (pre-norm: Llama).

    Two classes of one name place their norms differently by their configuration, so this is seen in a run over a few
    tokens: the tensor that leaves the block is the one that left a norm.
    """
    left: dict[str, str | None] = {}
    last: dict[str, tuple[str, Any]] = {}
    handles = []
    for block in found:
        for norm in block.norms:
            put = lambda _, __, out, b=block.name, n=norm: last.__setitem__(b, (n, out))  # noqa: E731
            handles.append(model.get_submodule(norm).register_forward_hook(put))

        def close(_: nn.Module, __: Any, out: Any, b: str = block.name) -> None:
            name, norm_out = last.get(b, (None, None))
            left[b] = name if first(out) is norm_out else None

        handles.append(model.get_submodule(block.name).register_forward_hook(close))
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(**_few_tokens(model))
    except (RuntimeError, TypeError, ValueError) as error:
        raise FettleError(
            f"{type(model).__name__} does not run on a few tokens, so where its norms stand cannot be seen "
            f"({str(error).strip().splitlines()[0]})"
        ) from error
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    missing = [block.name for block in found if block.name not in left]
    if missing:
        raise FettleError(f"{type(model).__name__}: {missing[0]} takes no part in a run over tokens")
    return left


def first(out: Any) -> Any:
    """The states among what a block or layer returns."""
    return out[0] if isinstance(out, tuple) else out


def _few_tokens(model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    ids = torch.tensor([[1, 2, 3]], device=device)
    config = model.config
    return {"input_ids": ids, "decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {"input_ids": ids}  # fmt: skip


def _heads(member: nn.Module) -> list[str]:
    """The modules of a block that count heads and hold linear layers, by name within the block."""
    return [
        name
        for name, module in member.named_modules()
        if name and any(hasattr(module, key) for key in HEADS) and any(is_linear(m) for m in module.modules())
    ]


def _block(model: nn.Module, name: str, stack: str, every: dict[str, nn.Module]) -> Block:
    module = model.get_submodule(name)
    own = {n: m for n, m in every.items() if n.startswith(f"{name}.")}
    roots: dict[str, str] = {}
    for inner in _heads(module):
        root = f"{name}.{_risen(module, inner)}"
        if not any(root == r or root.startswith(f"{r}.") for r in roots):
            roots[root] = f"{name}.{inner}"
    attentions = tuple(_attention(model, root, core, own) for root, core in roots.items())
    width = in_out(own[attentions[0].out])[1]
    mlp = _feed_forward(name, width, list(_multipliers(module, name, own, tuple(f"{r}." for r in roots))), own)
    inner_norms = tuple(f"{name}.{n}" for n in norms(module) if n)
    return Block(name, stack, width, attentions, mlp, inner_norms)


def _risen(block: nn.Module, name: str) -> str:
    """The highest module above `name` that is still below the block and its lists."""
    while "." in name:
        above = name.rpartition(".")[0]
        if isinstance(block.get_submodule(above), nn.ModuleList):
            break
        name = above
    return name


def _attention(model: nn.Module, root: str, core: str, own: dict[str, nn.Module]) -> Attention:
    inside = [n for n in own if n.startswith(f"{root}.")]
    last = [
        n for n in inside if n.rpartition(".")[2][0].lower() not in "qkv" and "qkv" not in n.rpartition(".")[2].lower()
    ]
    out = last[-1] if last else ""
    rest = [n for n in inside if n != out]
    if not out or not any(in_out(own[n])[0] == in_out(own[out])[1] for n in rest):
        raise FettleError(
            f"{root} ({type(model.get_submodule(root)).__name__}): its linear layers {', '.join(inside)} do not read "
            f"as an attention's: queries, keys and values, and one that leads back to the width of the block"
        )
    named = {letter: tuple(n for n in rest if n.rpartition(".")[2].lower().startswith(letter)) for letter in "qkv"}
    if len(rest) == 1:
        named = dict.fromkeys("qkv", (rest[0],))
    elif len({n for part in named.values() for n in part}) < len(rest) or any(
        n.rpartition(".")[2].lower().startswith(("kv", "qk")) for n in rest
    ):
        named = dict.fromkeys("qkv", ())
    places = [root, *(f"{root}.{n}" for n, _ in model.get_submodule(root).named_modules() if n)]
    words = " ".join([root.rpartition(".")[2], *(type(model.get_submodule(p)).__name__ for p in places)]).lower()
    cross = any(word in words for word in CROSS)
    return Attention(root, core, named["q"], named["k"], named["v"], out, cross)


def _multipliers(
    block: nn.Module, name: str, own: dict[str, nn.Module], attentions: tuple[str, ...]
) -> Iterator[tuple[str, nn.Module]]:
    """What holds matrices outside of the attentions: linear layers, and modules with matrices of their own."""
    for inner, module in block.named_modules():
        full = f"{name}.{inner}"
        if not inner or full.startswith(attentions) or any(full.startswith(f"{n}.") for n in own):
            continue
        if _added(block, inner):
            continue
        if full in own or any(p.ndim > 1 for p in module.parameters(recurse=False)):
            yield full, module


def _added(block: nn.Module, inner: str) -> bool:
    """Whether a module, or one around it, was put there by an edit and wraps nothing of the model."""
    parts = inner.split(".")
    above = (block.get_submodule(".".join(parts[: i + 1])) for i in range(len(parts)))
    return any(hasattr(m, "edit") and not isinstance(getattr(m, "base", None), nn.Module) for m in above)


def _feed_forward(
    block: str, width: int, found: list[tuple[str, nn.Module]], own: dict[str, nn.Module]
) -> FeedForward | None:
    if not found:
        return None
    names = [name for name, _ in found]
    above = names[0].rpartition(".")[0]
    while not all(name.startswith(f"{above}.") or name == above for name in names):
        above = above.rpartition(".")[0]
    module = None if above == block else above
    dense = all(name in own for name in names)
    leaves = [name for name in names if name in own and in_out(own[name])[1] == width]
    if dense and len(leaves) == 1 and leaves[0] == names[-1] and len(names) > 1:
        enter = tuple(names[:-1])
        if all(in_out(own[name])[0] == width for name in enter):
            return FeedForward(module, enter, names[-1])
    if module is None:
        raise FettleError(
            f"{block}: {', '.join(names)} stand outside of its attentions and do not read as one feed-forward part "
            f"(linear layers from the width {width}, and one back to it at the end)"
        )
    stacks = tuple(name for name, m in found if any(p.ndim == 3 for p in m.parameters(recurse=False)))
    return FeedForward(module, (), None, stacks)
