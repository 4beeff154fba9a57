"""What a quantized checkpoint's configuration says of a layer's tensors, read into one form for all formats.

    gptq                 bits, group_size, checkpoint_format (gptq: version 1, gptq_v2), dynamic (by layer)
    awq                  bits, group_size, version: gemm
    compressed-tensors   config_groups {targets, weights, input_activations}, ignore, format (pack-quantized, int-quantized)

What cannot be computed here as the file means it is refused in a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fettle.core.errors import FettleError
from fettle.quantize.activations import Activations
from fettle.quantize.layouts import Affine, from_awq, from_compressed, from_gptq

Said = Mapping[str, Any]
WORD_TENSORS = ("qweight", "qzeros", "scales", "g_idx")
COMPRESSED_TENSORS = (
    "weight_packed", "weight", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "input_scale",
    "input_zero_point",
)  # fmt: skip


@dataclass(frozen=True)
class Scheme:
    """How the layers of one checkpoint are held."""

    method: str
    parts: tuple[str, ...]  # the tensors that a layer may have, by the end of their names
    marks: tuple[str, ...]  # a layer that has all of one of these ('a' or 'a+b') is a quantized one
    read: Callable[[str, Mapping[str, Tensor]], Affine]  # of a layer's name and its tensors by the end of their names
    activations: Callable[[str], Activations | None] = lambda name: None


def _number(said: Said, key: str, what: str = "quantization_config") -> int:
    value = said.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise FettleError(f"{what}.{key} is {value!r}; expected a whole number")
    return value


def _bits(said: Said, key: str, known: tuple[int, ...]) -> int:
    bits = _number(said, key)
    if bits not in known:
        raise FettleError(f"its weights have {bits} bits; {', '.join(map(str, known))} can be read")
    return bits


# GPTQ.


def _gptq(said: Said) -> Scheme:
    form = said.get("checkpoint_format") or "gptq"
    versions = {"gptq": 1, "gptq_v2": 2}
    if form not in versions:
        raise FettleError(f"checkpoint_format is '{form}'; gptq and gptq_v2 can be read")
    if said.get("pack_dtype") not in (None, "int32"):
        raise FettleError(f"pack_dtype is '{said['pack_dtype']}'; int32 can be read")
    _bits(said, "bits", (2, 3, 4, 8)), _number(said, "group_size")

    def read(name: str, tensors: Mapping[str, Tensor]) -> Affine:
        own = _overridden(said, name)
        return from_gptq(tensors, _bits(own, "bits", (2, 3, 4, 8)), _number(own, "group_size"), versions[form])

    return Scheme("gptq", WORD_TENSORS, ("qweight",), read)


def _overridden(said: Said, name: str) -> Said:
    """With what `dynamic` says of a layer: patterns that begin with '+:' or nothing; those with '-:' mean dense ones."""
    for pattern, change in (said.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), name):
            return {**said, **change}
    return said


# AWQ.


def _awq(said: Said) -> Scheme:
    version = str(said.get("version") or said.get("format") or "gemm").lower()
    if version != "gemm":
        raise FettleError(f"the version of AWQ is '{version}'; gemm can be read")
    _bits(said, "bits", (4,))
    group = _number(said, "group_size")
    return Scheme("awq", WORD_TENSORS[:3], ("qweight",), lambda name, tensors: from_awq(tensors, group))


# compressed-tensors.


def _compressed(said: Said) -> Scheme:
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        value = said.get(key)
        if value and not (key == "sparsity_config" and value.get("format") == "dense"):
            raise FettleError(f"{key} is set, which cannot be computed here; take a file without it")
    groups = said.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise FettleError("quantization_config has no 'config_groups'")
    for group in groups.values():
        _check_group(group, str(group.get("format") or said.get("format")))

    def find(name: str) -> Said:
        for group in groups.values():
            if any(_means(target, name) for target in group["targets"]):
                return group  # type: ignore[no-any-return]
        raise FettleError("no group of config_groups means it")

    def read(name: str, tensors: Mapping[str, Tensor]) -> Affine:
        if "weight_g_idx" in tensors:
            raise FettleError(
                "its groups are in the order of activations (weight_g_idx); take a file with actorder: static"
            )
        weights = find(name)["weights"]
        size = weights.get("group_size") if weights.get("strategy") == "group" else None
        return from_compressed(tensors, _number(weights, "num_bits"), size, bool(weights.get("symmetric", True)))

    return Scheme(
        "compressed-tensors", COMPRESSED_TENSORS, ("weight_packed", "weight+weight_scale"), read,
        lambda name: _activations(find(name).get("input_activations")),
    )  # fmt: skip


def _check_group(group: Said, form: str) -> None:
    weights = group.get("weights") or {}
    if form not in ("pack-quantized", "int-quantized", "naive-quantized") or weights.get("type", "int") != "int":
        raise FettleError(
            f"its weights are {weights.get('type')} in the format '{form}'; integers, packed or whole, can be read"
        )
    if weights.get("strategy") not in ("tensor", "channel", "group"):
        raise FettleError(
            f"the strategy of its weights is '{weights.get('strategy')}'; tensor, channel and group can be read"
        )
    _bits(weights, "num_bits", (2, 3, 4, 5, 6, 7, 8))
    if group.get("output_activations"):
        raise FettleError("output_activations is set, which cannot be computed here; take a file without it")
    _activations(group.get("input_activations"))


def _means(target: str, name: str) -> bool:
    """Whether a target of compressed-tensors (a class, 're:' and a pattern, or a name) means a linear layer."""
    return target == "Linear" or target == name or target.startswith("re:") and bool(re.match(target[3:], name))


def _activations(said: Said | None) -> Activations | None:
    if not said:
        return None
    strategy, dynamic = said.get("strategy"), said.get("dynamic")
    if said.get("type", "int") != "int" or (strategy, dynamic) not in (
        ("token", True),
        ("tensor", True),
        ("tensor", False),
    ):
        raise FettleError(
            f"its activations are {said.get('type')} by {strategy}, {'dynamic' if dynamic else 'static'}; integers by token "
            "(dynamic) or by tensor can be computed here"
        )
    group = "row" if strategy == "token" else "tensor"
    bits, symmetric = _number(said, "num_bits"), bool(said.get("symmetric", True))
    return Activations(bits=bits, symmetric=symmetric, group=group, static=not dynamic)


READERS: dict[str, Callable[[Said], Scheme]] = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed}
