"""A key-value cache in few bits: what attention reads is what such a cache holds, in forest batches and in generation alike.

    k^ = round(k), v^ = round(v)

    by token      a range for each token and head, or for `group` of its D numbers, found when the token comes
    by channel    a range for each head and channel, found on calibration text and held; what lies beyond it is clipped

Keys have a few channels that are large in every token, values have not: keys by channel and values by token lose least (KIVI, Liu et al.
2024, arXiv 2402.02750; held ranges: KVQuant, Hooper et al. 2024, arXiv 2401.18079). Rounded are keys and values as attention gets them,
after rotation. Each token's depend on nothing but itself, so it makes no difference when they are rounded: the engine packs a token once
and unpacks it at each step (generate/cache.py), everything else rounds what it has, and both compute with the same numbers.

Shapes: K key heads, T tokens, D head size (of keys or of values), G groups of it; keys and values [.., K, T, D].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.models.attention import CACHE
from fettle.quantize.activations import Range, rounded
from fettle.quantize.grid import Grid, decode, encode, fit, group_length
from fettle.quantize.packed import pack, unpack

Parts = tuple[Tensor, ...]  # of n tokens [.., n, *]: bytes, and where ranges are by token their scales and zeros


def pack_tokens(x: Tensor, grid: Grid, held: Range | None = None) -> Parts:
    """x [.., n, D] as bytes uint8 [.., n, ceil(D b / 8)], whole ones for each token; by token also scale and zero [.., n, G]."""
    if held is not None:
        return (_bytes(encode(x, *held, grid), grid.bits),)
    groups = x.reshape(-1, group_length(tuple(x.shape), grid))
    scale, zero = fit(groups, grid)
    codes, shape = encode(groups, scale, zero, grid).view(x.shape), (*x.shape[:-1], -1)
    parts = _bytes(codes, grid.bits), scale.to(grid.scale_dtype).view(shape)
    whole = grid.levels == "int"
    return parts if zero is None else (*parts, zero.to(torch.uint8 if whole else grid.scale_dtype).view(shape))


def unpack_tokens(parts: Parts, width: int, grid: Grid, held: Range | None, dtype: torch.dtype) -> Tensor:
    """x^ [.., n, D] in `dtype`, bit for bit what `rounded` gives; `width` is D."""
    data, wide = parts[0], torch.promote_types(dtype, torch.float32)
    codes = unpack(data.reshape(-1), grid.bits, data.numel() * 8 // grid.bits)
    codes = codes.view(*data.shape[:-1], -1)[..., :width]
    if held is not None:
        return decode(codes, *held, grid).to(dtype)
    scale, zero = parts[1].to(wide)[..., None], parts[2].to(wide)[..., None] if len(parts) > 2 else None
    groups = codes.unflatten(-1, (scale.shape[-2], -1))
    return decode(groups, scale, zero, grid).to(dtype).flatten(-2)


def _bytes(codes: Tensor, bits: int) -> Tensor:
    filled = (
        nn.functional.pad(codes, (0, -codes.shape[-1] % 8)) if bits < 8 else codes
    )  # 8 codes fill bytes, whatever b is
    return pack(filled.reshape(-1), bits).view(*codes.shape[:-1], -1)


class RoundedCache(nn.Module):
    """What one attention layer's cache holds; keys and values each on a grid, keys by channel where their range is held."""

    key_scale: Tensor | None
    key_zero: Tensor | None

    def __init__(self, edit: Edit, keys: Grid, values: Grid, held: Range | None = None) -> None:
        super().__init__()
        self.edit, self.keys, self.values, self.enabled, self.simulates = edit, keys, values, True, True
        self.calls = 0
        self.seen: list[Tensor] | None = (
            None  # [least, greatest] key of each channel so far, while a range is looked for
        )
        self.register_buffer("key_scale", None if held is None else held[0])  # float32 [K, 1, D]
        self.register_buffer("key_zero", None if held is None else held[1])

    @property
    def held(self) -> Range | None:
        """Scale and zero of keys, [K, 1, D], where they are by channel."""
        return None if self.key_scale is None else (self.key_scale, self.key_zero)

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Both rounded, with a straight-through gradient."""
        self.calls += 1
        if self.seen is not None:
            self._see(key.detach().float())
        return (rounded(key, self.keys, self.held), rounded(value, self.values)) if self.enabled else (key, value)

    def _see(self, key: Tensor) -> None:
        assert self.seen is not None
        flat = key.transpose(0, 1).flatten(1, -2) if key.ndim == 4 else key  # [K, .., D]
        low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
        self.seen = [torch.minimum(self.seen[0], low), torch.maximum(self.seen[1], high)] if self.seen else [low, high]

    def parts(self, keys: Tensor, values: Tensor) -> tuple[Parts, Parts]:
        """Keys and values [.., n, D] as a cache holds them."""
        return pack_tokens(keys, self.keys, self.held), pack_tokens(values, self.values)

    def whole(self, keys: Parts, values: Parts, widths: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What attention reads of them."""
        return (
            unpack_tokens(keys, widths[0], self.keys, self.held, dtype),
            unpack_tokens(values, widths[1], self.values, None, dtype),
        )

    def _apply(self, fn: Any, recurse: bool = True) -> RoundedCache:
        """Follow the model to a device; ranges keep their type."""
        super()._apply(lambda t: made if (made := fn(t)).dtype == t.dtype else t.to(made.device), recurse)
        return self


def caches(model: nn.Module, edit: Edit) -> dict[str, RoundedCache]:
    """An edit's, by the name of the attention layer."""
    return {
        name.removesuffix(f".{CACHE}"): m
        for name, m in model.named_modules()
        if isinstance(m, RoundedCache) and m.edit == edit
    }


def attach_cache(model: Any, edit: Edit, keys: Grid, values: Grid | None = None) -> None:
    """Round what the attention of a model reads. FettleError where that cannot be done."""
    kind = edit.kind  # type: ignore[attr-defined]
    layers = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)]
    if any(hasattr(m, CACHE) for m in layers):
        raise FettleError(
            f"{kind}: the model's cache is rounded already, by another edit; leave `cache` out of one of the two"
        )
    for module in layers:
        module.add_module(CACHE, RoundedCache(edit, keys, values or keys))
    try:
        reached = layers and not model.config.is_encoder_decoder and _reached(model, edit)
    except FettleError as error:
        _detach(layers)
        raise FettleError(f"{kind}: cache: {error}") from None
    if not reached:
        _detach(layers)
        raise FettleError(
            f"{kind}: cache: {type(model).__name__} does not hand its keys and values to fettle's attention, so they cannot "
            "be rounded; leave `cache` out, or load the model with model.attention other than 'paths'"
        )
    for module in layers:
        if not getattr(module, CACHE).calls:  # an attention of another kind, or a block around one
            delattr(module, CACHE)


def _detach(layers: list[nn.Module]) -> None:
    for module in layers:
        delattr(module, CACHE)


@torch.no_grad()
def _reached(model: Any, edit: Edit) -> bool:
    """Whether a token's keys come by."""
    training = model.training
    model.eval()
    try:
        model.base_model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device))
    finally:
        model.train(training)
    return any(cache.calls for cache in caches(model, edit).values())


def settle_cache(model: nn.Module, edit: Edit) -> None:
    """From here on the rounding is a part of the model, which no reference is without."""
    for cache in caches(model, edit).values():
        cache.simulates = False


def cannot_merge(edit: Edit) -> FettleError:
    """Why a model with a rounded cache has no plain weights that compute the same."""
    return FettleError(
        f"{edit.kind}: keys and values are rounded too, which plain weights cannot hold; keep the artifact, or train without cache"  # type: ignore[attr-defined]
    )
