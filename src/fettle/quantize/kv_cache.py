"""KV cache: keys and values are held in 8 or 4 bits while a model answers, its weights as they are. See cache.py.

    k^ by channel, on a range found on text and held;  v^ by token, on its own      (or both by token, which needs no text)

A token of L layers with K key heads takes L K (D + E) b / 8 bytes, and a scale and a zero a head where ranges are by token, in place of
2 L K (D + E) in 16 bits.

Shapes: K key heads, D size of a key, E size of a value; ranges [K, 1, D].
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.models.roles import evaluating
from fettle.quantize.cache import attach_cache, caches, cannot_merge
from fettle.quantize.calibrate import Calibration, needs_text
from fettle.quantize.grid import Grid, affine


class KVCache(Edit):
    """Hold keys and values on a grid; nothing trains."""

    role = "quantizes"
    kind: Literal["kv_cache"] = "kv_cache"
    bits: int = Field(default=8, ge=2, le=8)
    keys: Literal["channel", "token"] = Field(default="channel", description="what shares a range; channel needs text")
    group: int | Literal["row"] = Field(default="row", description="numbers of a token and head that share a range")

    @property
    def calibrated(self) -> bool:  # type: ignore[override]
        """Whether it looks at text."""
        return self.keys == "channel"

    @property
    def cache(self) -> Grid:
        """The grid of values, and of keys by token."""
        return Grid(bits=self.bits, symmetric=False, group=self.group, scale="float16")

    def apply(self, model: nn.Module) -> None:
        """Round from here on. FettleError where keys are by channel: that needs text."""
        if self.calibrated:
            needs_text(self)
        self.outline(model)

    @torch.no_grad()
    def calibrate(self, model: nn.Module, calibration: Calibration) -> None:
        """Find the range of every channel of keys. FettleError where one is not finite."""
        attach_cache(model, self, self.cache)
        made = caches(model, self)
        self._settled(model)
        if not self.calibrated:
            return
        for cache in made.values():
            cache.enabled, cache.seen = False, []
        with evaluating(model):
            for batch in calibration.batches:
                calibration.forest.hidden(batch.to(calibration.forest.device))
        for name, cache in made.items():
            low, high = cache.seen or (torch.full((1, 1, 1), torch.nan),) * 2
            if not torch.isfinite(low).all() or not torch.isfinite(high).all():
                raise FettleError(
                    f"kv_cache: {name}: keys that are not finite (NaN or infinity) on the calibration text"
                )
            cache.key_scale, cache.key_zero = affine(low, high, self._by_channel)
            cache.enabled, cache.seen = True, None

    @property
    def _by_channel(self) -> Grid:
        return Grid(bits=self.bits, symmetric=False)

    def outline(self, model: nn.Module, names: Collection[str] | None = None) -> None:
        """The same with ranges to be filled in."""
        attach_cache(model, self, self.cache)
        self._settled(model)
        if not self.calibrated or names is None:
            return
        config: Any = model.config
        text = config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        for cache in caches(model, self).values():
            device = next(model.parameters()).device
            cache.key_scale, cache.key_zero = (torch.full((heads, 1, size), torch.nan, device=device) for _ in range(2))

    def _settled(self, model: nn.Module) -> None:
        for cache in caches(model, self).values():
            cache.simulates = False
            cache.keys = self._by_channel if self.calibrated else self.cache

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The ranges of keys."""
        return {
            f"{name}.{key}": tensor
            for name, cache in caches(model, self).items()
            for key, tensor in (("key_scale", cache.key_scale), ("key_zero", cache.key_zero))
            if tensor is not None
        }

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The same, for a run that resumes."""
        return self.tensors(model)

    def merge(self, model: nn.Module) -> None:
        """FettleError: plain weights cannot round what attention reads."""
        raise cannot_merge(self)
