"""A cache in few bits: packing gives back what rounding gives, ranges are those of the text, and the engine computes what is simulated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fettle.core.batch import Batch, Example, Node, pack
from fettle.core.errors import FettleError
from fettle.generate import Sampling, engine, generate
from fettle.generate.cache import Cache, PackedLayer
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.spec import ModelSpec
from fettle.quantize import QAT, Grid, KVCache
from fettle.quantize.activations import rounded
from fettle.quantize.cache import caches, pack_tokens, unpack_tokens
from fettle.quantize.calibrate import Calibration
from fettle.quantize.grid import affine
from fettle.stages.artifact import open_artifact, save_artifact

GRIDS = {
    "8 bits": Grid(bits=8, symmetric=False, scale="float16"), "4 bits": Grid(bits=4, symmetric=False, group=4, scale="float16"),
    "3 bits, symmetric": Grid(bits=3), "normal": Grid(levels="normal", bits=4, symmetric=False, group=6),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", GRIDS)
def test_what_is_unpacked_is_what_is_rounded_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    grid, x = GRIDS[name], torch.randn(2, 3, 5, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    parts = pack_tokens(x, grid)
    assert torch.equal(unpack_tokens(parts, 12, grid, None, dtype), rounded(x, grid))
    assert parts[0].shape[-1] == {8: 12, 4: 8, 3: 6}[grid.bits]  # whole bytes, of a multiple of 8 codes under 8 bits


@pytest.mark.parametrize("bits", [8, 4])
def test_a_range_a_channel_is_held_and_clips(bits: int) -> None:
    x = torch.randn(2, 3, 50, 8, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0] * 7 + [40.0])
    grid = Grid(bits=bits, symmetric=False)
    held = affine(x.amin((0, 2))[:, None], x.amax((0, 2))[:, None], grid)
    by_channel = unpack_tokens(pack_tokens(x, grid, held), 8, grid, held, x.dtype)
    assert torch.equal(by_channel, rounded(x, grid, held))
    assert (by_channel - x).abs().amax((0, 2)).le(held[0][:, 0] * 0.5001).all()
    by_token = rounded(x, grid)
    small = (..., slice(0, 7))  # the channel that is large in every token takes the range of the others
    assert (by_channel - x)[small].square().mean() < 0.05 * (by_token - x)[small].square().mean()
    beyond = unpack_tokens(pack_tokens(3 * x, grid, held), 8, grid, held, x.dtype)
    assert beyond.amax() <= x.amax() + held[0].max()


def opened(folder: Path, edit: Any = None, dtype: str = "float32") -> Forest:
    forest = load(ModelSpec(path=str(folder), dtype=dtype))  # type: ignore[arg-type]
    if edit is not None:
        edit.calibrate(forest.model, Calibration(forest, [row(range(5, 60)), row(range(60, 115))]))
    return forest


def row(tokens: Any) -> Batch:
    ids = np.array(list(tokens), np.int32)
    return pack([Example((Node(ids, np.ones(len(ids), np.float32)),), "text")], len(ids), 0)


EDITS = {"channel": KVCache(bits=4), "token": KVCache(bits=4, keys="token", group=8), "8 bits": KVCache(bits=8)}


@pytest.mark.parametrize("name", EDITS)
def test_the_engine_computes_what_is_simulated(name: str, tiny_llama: Path) -> None:
    """Log-probabilities of answers, rows of uneven lengths together, against forest batches over the same texts."""
    forest, plain = opened(tiny_llama, EDITS[name]), opened(tiny_llama)
    for f in (forest, plain):
        f.model.double()  # so that no value lies so near a boundary that the order of a sum decides
    prompts = [list(range(5, 30)), list(range(40, 47)), [9]]
    for prompt, answer in zip(prompts, generate(forest, prompts, Sampling(max_tokens=8)), strict=True):
        whole = row([*prompt, *answer.tokens])
        simulated, other = (
            f.head.logits(f.hidden(whole)).log_softmax(-1)[len(prompt) - 1 : -1] for f in (forest, plain)
        )
        picked = torch.tensor(answer.tokens)[:, None]
        assert torch.allclose(simulated.gather(1, picked)[:, 0], torch.tensor(answer.logps).double(), atol=1e-5)
        if len(prompt) > 1 and name != "8 bits":
            assert (simulated - other).abs().max() > 1e-4


@pytest.mark.parametrize("name,share", [("8 bits", 0.54), ("channel", 0.29)])
def test_the_memory_is_that_of_the_bits(
    name: str, share: float, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Cache] = []
    monkeypatch.setattr(engine, "Cache", lambda *of: made.append(Cache(*of)) or made[-1])
    for edit in (None, EDITS[name]):
        generate(opened(tiny_llama, edit, "bfloat16"), [list(range(5, 60))] * 2, Sampling(max_tokens=8))
    plain, packed = made
    assert all(isinstance(layer, PackedLayer) for layer in packed.layers.values()) and packed.places == plain.places
    assert packed.bytes == sum(b.numel() * b.element_size() for layer in packed.layers.values() for b in layer.blocks)
    size = 16  # of a head: codes of keys and values, a scale in 16 bits and a zero of 8 for each value
    wanted = (2 * size * EDITS[name].bits / 8 + 3) / (2 * size * 2)
    assert packed.bytes / plain.bytes == pytest.approx(wanted) and packed.bytes / plain.bytes < share + 0.05


def test_an_artifact_keeps_the_ranges(tiny_llama: Path, tmp_path: Path) -> None:
    edit = EDITS["channel"]
    forest = opened(tiny_llama, edit)
    save_artifact(tmp_path / "artifact", forest, [edit], {})
    again, _ = open_artifact(tmp_path / "artifact")
    batch = row(range(5, 40))
    assert torch.equal(forest.hidden(batch), again.hidden(batch))
    assert all(cache.held is not None and not cache.simulates for cache in caches(again.model, edit).values())


def test_what_cannot_be_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(FettleError, match="kv_cache looks at text"):
        EDITS["channel"].apply(opened(tiny_llama).model)
    forest = opened(tiny_llama, EDITS["token"])
    with pytest.raises(FettleError, match="rounded already, by another edit"):
        QAT(grid=Grid(bits=8), cache=Grid(bits=8)).apply(forest.model)
    with pytest.raises(FettleError, match="plain weights cannot hold"):
        EDITS["token"].merge(forest.model)
    paths = load(ModelSpec(path=str(tiny_llama), dtype="float32", attention="paths"))
    with pytest.raises(FettleError, match="does not hand its keys and values"):
        EDITS["token"].apply(paths.model)
    assert not any("fettle_cache" in name for name, _ in paths.model.named_modules())
    broken = opened(tiny_llama)
    with torch.no_grad():
        broken.model.model.layers[1].self_attn.k_proj.weight[0, 0] = torch.nan
    with pytest.raises(FettleError, match="layers.1.*not finite"):
        EDITS["channel"].calibrate(broken.model, Calibration(broken, [row(range(5, 60))]))
