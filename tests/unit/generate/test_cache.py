"""The cache of a layer against lists of tokens: windows, growth, rows that move."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fettle.generate.cache import Cache, Layer, Names

K, D, E = 2, 3, 4


def token(row: int, place: int) -> tuple[Tensor, Tensor]:
    """Key [K, D] and value [K, E] that tell where they belong."""
    base = torch.tensor([1000.0 * row + place])
    return (base + torch.arange(K * D).view(K, D) / 100), (base + torch.arange(K * E).view(K, E) / 100)


def stack(row: int, places: range) -> tuple[Tensor, Tensor]:
    keys, values = zip(*(token(row, n) for n in places), strict=True)
    return torch.stack(keys, 1), torch.stack(values, 1)


def held(layer: Layer, row: int, rows: int, last: int) -> set[tuple[float, float]]:
    """The first numbers of the keys and values that the token at place `last` of a row sees."""
    keys, values = layer.read(rows)
    seen = min(last + 1, keys.shape[1])
    return {(keys[row * K, s, 0].item(), values[row * K, s, 0].item()) for s in range(seen)}


@pytest.mark.parametrize("window", [None, 5])
def test_a_token_sees_those_before_it(window: int | None) -> None:
    layer = Layer(3, 40, window, torch.zeros(1, K, 1, D), torch.zeros(1, K, 1, E))
    starts = [0, 3, 9]
    for row, n in enumerate(starts):
        layer.resize(max(4, n))
        if n:
            layer.place(row, *stack(row, range(n)))
    for step in range(6):
        at = [n + step for n in starts]
        layer.resize(max(at) + 1)
        keys, values = (torch.stack(x) for x in zip(*(token(row, n) for row, n in enumerate(at)), strict=True))
        layer.write(torch.arange(3), torch.tensor(at), keys, values)
        for row, n in enumerate(at):
            first = 0 if window is None else max(0, n - window + 1)
            expected = {(1000.0 * row + k, 1000.0 * row + k) for k in range(first, n + 1)}
            assert held(layer, row, 3, n) == expected
    assert layer.length == (15 if window is None else 5)
    layer.move(2, 0)
    assert all(torch.equal(block[0], block[2]) for block in layer.blocks)


def test_the_products_of_a_step_need_no_copy() -> None:
    layer = Layer(4, 64, None, torch.zeros(1, K, 1, D), torch.zeros(1, K, 1, E))
    layer.resize(32)
    keys, values = layer.read(2)
    assert keys.shape == (2 * K, 32, D) and values.shape == (2 * K, 32, E)
    assert keys.data_ptr() == layer.blocks[0].data_ptr() and keys.is_contiguous() and values.is_contiguous()


def test_layers_fit_together() -> None:
    cache, shared, names = Cache(2, 20), nn.Identity(), Names()
    one, two = names.next(shared), names.next(shared)  # a module that two layers share
    cache.fit(8)
    key, value = torch.zeros(1, K, 1, D), torch.zeros(1, K, 1, E)
    first = cache.layer(one, key, value, None)
    assert cache.layer(one, torch.zeros(1), torch.zeros(1), None) is first
    assert cache.layer(two, key, value, 6).length == 6
    first.blocks[0][:] = 1
    for asked, slots in ((7, 8), (16, 16), (12, 16), (9, 9), (30, 20)):
        cache.fit(asked)
        assert first.length == slots
        assert cache.layers[two].length == 6
    assert first.blocks[0][:, :, :8].eq(1).all() and first.blocks[0][:, :, 8:].eq(0).all()
