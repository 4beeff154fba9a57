"""Keys and values of R rows of uneven lengths, in one block of memory a layer: nothing is padded on the left, nothing is joined.

The token that stands at place n of a row lies in slot n of that row, so the filled slots of a row are its first ones. A layer
that sees through a window of W tokens has W slots and writes round and round, n modulo W: what it overwrites is out of sight.
In both cases the token at place n sees the slots 0 .. min(n, S - 1), and the order of slots does not matter to attention.

There are about as many slots as the longest row needs, and a step reads them all: on a CPU, a product with a part of each
row's slots takes up to four times as long as one with all of a block that has no gaps. A block lies at the beginning of memory
that is reserved for the longest text there may be, and rows move apart within it: nothing is there twice, and what no row
has come to yet costs nothing where memory is given out page by page.

Shapes: R rows, B rows in use, K key heads, D size of a key, E size of a value, S slots, n tokens.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from fettle.models.attention import CACHE

SHRINK = 0.7  # of the slots are needed: then the rest goes


class Layer:
    """The cache of one attention layer: blocks [R, K, S, *], of keys and of values, and how one token lies in each."""

    def __init__(self, rows: int, most: int, window: int | None, key: Tensor, value: Tensor) -> None:
        """For texts of up to `most` tokens. `key` [.., K, .., D] and `value` [.., K, .., E] are any that this layer makes."""
        self.window, self.rows, self.heads, self.length = window, rows, key.shape[1], 0
        token = self._parts(key[:1, :, :1], value[:1, :, :1])
        self._shapes = [part.shape[3:] for part in token]  # of one token of one head, in each block
        room = rows * self.heads * self.slots(most)
        self._reserved = [part.new_empty(room * shape.numel()) for part, shape in zip(token, self._shapes, strict=True)]
        self.blocks = self._laid(0)

    def _parts(self, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        """How keys [.., K, n, D] and values [.., K, n, E] lie in the blocks."""
        return keys, values

    def _laid(self, slots: int) -> tuple[Tensor, ...]:
        """The blocks with so many slots, each at the beginning of what is reserved for it."""
        shapes = [(self.rows, self.heads, slots, *shape) for shape in self._shapes]
        return tuple(x[: math.prod(shape)].view(shape) for x, shape in zip(self._reserved, shapes, strict=True))

    @property
    def bytes(self) -> int:
        """What the blocks take."""
        return sum(block.numel() * block.element_size() for block in self.blocks)

    def slots(self, places: int) -> int:
        """How many are needed for texts of so many tokens."""
        return places if self.window is None else min(places, self.window)

    def place(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Begin a row with the keys [K, n, D] and values [K, n, E] of its first n tokens."""
        n, slots = keys.shape[1], self.length
        for block, given in zip(self.blocks, self._parts(keys, values), strict=True):
            if n <= slots:
                block[row, :, :n] = given
            else:  # a window has slid over the beginning
                at = torch.arange(n - slots, n, device=given.device) % slots
                block[row, :, at] = given[:, n - slots :]

    def write(self, rows: Tensor, at: Tensor, keys: Tensor, values: Tensor) -> None:
        """One token a row: keys [B, K, D] and values [B, K, E] at places `at` [B] of `rows` [B]."""
        slot = at if self.window is None else at % self.length
        for block, given in zip(self.blocks, self._parts(keys[:, :, None], values[:, :, None]), strict=True):
            block[rows, :, slot] = given[:, :, 0]

    def read(self, rows: int) -> tuple[Tensor, Tensor]:
        """Keys [B*K, S, D] and values [B*K, S, E] of the first rows."""
        keys, values = self.blocks
        return keys[:rows].flatten(0, 1), values[:rows].flatten(0, 1)

    def resize(self, places: int) -> None:
        """Make room for texts of `places` tokens, and no more."""
        slots, had = self.slots(places), self.length
        if slots < had and self.window is not None:
            return  # a window that was full has its tokens anywhere
        old, self.blocks, self.length = self.blocks, self._laid(slots), slots
        kept, rows = min(slots, had), range(self.rows)
        for before, after in zip(old, self.blocks, strict=True):
            for row in rows if slots < had else reversed(rows):  # so that none is written over before it has moved
                after[row, :, :kept] = before[row, :, :kept].clone()
                after[row, :, kept:] = 0  # what is masked must be a number

    def move(self, source: int, target: int) -> None:
        """Copy a row over another."""
        for block in self.blocks:
            block[target] = block[source]


class Packed(Protocol):
    """What holds keys and values in few bits, see quantize/cache.py."""

    enabled: bool

    def parts(self, keys: Tensor, values: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]: ...
    def whole(
        self, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], widths: tuple[int, int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]: ...


class PackedLayer(Layer):
    """The same in few bits: a token is packed when it comes; a step unpacks one layer at a time, and lets go of it."""

    def __init__(self, rows: int, most: int, window: int | None, key: Tensor, value: Tensor, packed: Packed) -> None:
        self.packed, self.widths, self.dtype = packed, (key.shape[-1], value.shape[-1]), key.dtype
        super().__init__(rows, most, window, key, value)

    def _parts(self, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        first, second = self.packed.parts(keys, values)
        self.split = len(first)
        return *first, *second

    def read(self, rows: int) -> tuple[Tensor, Tensor]:
        """Keys [B*K, S, D] and values [B*K, S, E] of the first rows, unpacked."""
        used = tuple(block[:rows] for block in self.blocks)
        keys, values = self.packed.whole(used[: self.split], used[self.split :], self.widths, self.dtype)
        return keys.flatten(0, 1), values.flatten(0, 1)


Name = tuple[nn.Module, int]  # an attention module, and how often the same pass has called it before


class Names:
    """Tells the layers of one pass apart. A module that several layers share is called once for each of them."""

    def __init__(self) -> None:
        self._calls: dict[nn.Module, int] = {}

    def next(self, module: nn.Module) -> Name:
        """The name of the layer that calls a module now."""
        self._calls[module] = calls = self._calls.get(module, -1) + 1
        return module, calls


class Cache:
    """The layers of a model, made as they show themselves, for R rows of up to `most` tokens, and now of up to `places`."""

    def __init__(self, rows: int, most: int) -> None:
        self.rows, self.most, self.places = rows, most, 0
        self.layers: dict[Name, Layer] = {}

    def layer(self, name: Name, key: Tensor, value: Tensor, window: int | None) -> Layer:
        """The layer of a name, which makes keys [1 or B, K, .., D] and values of this form."""
        found = self.layers.get(name)
        if found is None:
            packed: Packed | None = getattr(name[0], CACHE, None)
            made = self.rows, self.most, window, key, value
            found = Layer(*made) if packed is None or not packed.enabled else PackedLayer(*made, packed)
            found.resize(self.places)
            self.layers[name] = found
        return found

    @property
    def bytes(self) -> int:
        """What all layers take."""
        return sum(layer.bytes for layer in self.layers.values())

    def fit(self, places: int) -> None:
        """Room for texts of `places` tokens in every layer, and not much more."""
        places = min(places, self.most)
        if places > self.places or places < SHRINK * self.places:
            self.places = places
            for layer in self.layers.values():
                layer.resize(places)

    def move(self, source: int, target: int) -> None:
        """Copy a row over another in every layer."""
        for layer in self.layers.values():
            layer.move(source, target)
