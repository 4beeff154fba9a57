"""Selecting modules of a model by name: what adapters, quantizers and pruners work on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from torch import nn

from fettle.core.errors import FettleError
from fettle.models.tasks import head_weights
from fettle.models.weight import is_embedding, is_linear

ALL = "all-linear"


def linears(model: nn.Module, targets: str | Sequence[str] = ALL, exclude_head: bool = True) -> dict[str, nn.Module]:
    """Linear layers by name, in the order of the model.

    A target is 'all-linear', an exact name, the end of a name ('q_proj', 'mlp.up_proj'), or a regular
    expression that matches a whole name. FettleError where one matches nothing. An adapter that wraps a
    linear layer counts as that layer, under its name; the layer inside it is not offered.
    """
    every = _every(model, exclude_head)
    patterns = [targets] if isinstance(targets, str) else list(targets)
    chosen: set[str] = set()
    for pattern in patterns:
        hits = [name for name in every if matches(pattern, name)]
        if not hits:
            raise FettleError(f"targets: '{pattern}' matches no linear layer; {_nearest(pattern, every)}")
        chosen.update(hits)
    return {name: module for name, module in every.items() if name in chosen}


def adaptable(model: nn.Module, targets: str | Sequence[str] = ALL) -> dict[str, nn.Module]:
    """`linears`, and beside them the head and the embeddings that a target names.

    Only a name or its end means a head or an embedding; 'all-linear' and regular expressions pass them by.
    """
    patterns = [targets] if isinstance(targets, str) else list(targets)
    head = _head(model)
    named: dict[str, str] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if is_linear(module) or is_embedding(module):
            inside = (f"{name}.",)
            by = [p for p in patterns if p == name or name.endswith(f".{p}")]
            if by and (module is head or is_embedding(module)):
                named |= {name: by[0]}
    rest = [p for p in patterns if p not in named.values()]
    chosen = set(linears(model, rest)) if rest else set()
    return {name: module for name, module in model.named_modules() if name in chosen or name in named}


def matches(pattern: str, name: str) -> bool:
    """Whether a target means the module called `name`."""
    if pattern == ALL or name == pattern or name.endswith("." + pattern):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except (re.error, OverflowError, RecursionError) as error:
        raise FettleError(f"targets: '{pattern}' is not a regular expression ({error})") from None


def partly_matched(model: nn.Module, targets: str | Sequence[str]) -> dict[str, list[str]]:
    """By pattern, the layers it leaves out though it takes their sisters in other blocks.

    Two layers are sisters when their names differ only in the numbers of blocks: a pattern that takes `q_proj` of 26
    blocks of 28 misses two, and that is seldom meant. A pattern with a block's number in it is meant, but a class of all
    digits is no number: `[0-9]` misses the blocks from the eleventh on.
    """
    every = _every(model, exclude_head=True)
    patterns = [targets] if isinstance(targets, str) else list(targets)
    chosen = {name for name in every if any(matches(p, name) for p in patterns)}
    left: dict[str, list[str]] = {}
    for pattern in (p for p in patterns if not _NUMBER.search(_ANY_DIGIT.sub("", p))):
        families = {_family(name) for name in every if matches(pattern, name)}
        missed = [name for name in every if name not in chosen and _family(name) in families]
        if missed:
            left[pattern] = missed
    return left


def _every(model: nn.Module, exclude_head: bool) -> dict[str, nn.Module]:
    head = _head(model) if exclude_head else None
    task_head = tuple(head_weights(model)) if exclude_head else ()
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if is_linear(module):
            inside = (f"{name}.",)
            if module is not head and not any(weight.startswith(f"{name}.") for weight in task_head):
                found[name] = module
    return found


def _head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if get else None


# A number that is no part of a word, as fc1's is, once what stands for any digit and the counts of repeats are taken out.
_NUMBER = re.compile(r"(?<![A-Za-z_\d])\d")
_ANY_DIGIT = re.compile(r"\[0-9\]|\{\d*,?\d*\}")


def _family(name: str) -> str:
    return ".".join("#" if part.isdigit() else part for part in name.split("."))


def _nearest(pattern: str, every: dict[str, nn.Module]) -> str:
    ends = sorted({name.rsplit(".", 1)[-1] for name in every})
    close = difflib.get_close_matches(pattern.rsplit(".", 1)[-1], ends, n=3, cutoff=0.5)
    if close:
        return "nearest: " + ", ".join(close)
    return "there are: " + ", ".join(ends[:12])
