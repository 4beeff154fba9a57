"""BitDelta: signs and scale, what is kept whole, its size, many tenants over one base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fettle.core.errors import FettleError
from fettle.models.load import load
from fettle.models.memory import saved_bytes, weight_bytes
from fettle.models.spec import ModelSpec
from fettle.objectives.distill import Distill, Teacher
from fettle.peft import LoRA
from fettle.quantize import NF4, BitDelta
from fettle.quantize.bitdelta import SignedLinear, signs_of
from fettle.quantize.signs import unpack_signs
from fettle.quantize.tenants import TenantLinear
from fettle.stages.artifact import TENSORS, apply_edits, open_artifact, save_artifact
from fettle.stages.deltas import bring
from fettle.stages.teacher import taught
from fettle.stages.tenants import make_delta, open_tenants
from unit.objectives.test_distill import batch_of

TOKENS = torch.arange(4, 24)[None]


def logits(forest: Any, ids: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return forest.model(input_ids=ids).logits  # type: ignore[no-any-return]


def spec(folder: Path) -> ModelSpec:
    return ModelSpec(path=str(folder), dtype="float32")


def fine_tune(base: Path, folder: Path, seed: int, whole: bool = False, size: float = 0.02) -> Path:
    """A model folder whose linear layers have moved; with `whole` its norms and embeddings too."""
    forest = load(spec(base))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in forest.model.named_parameters():
            if whole or name.endswith("proj.weight"):
                p.add_(size * torch.randn(p.shape, generator=generator))
    forest.model.save_pretrained(folder)
    forest.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tuned(tiny_llama: Path, tmp_path: Path) -> Path:
    return fine_tune(tiny_llama, tmp_path / "tuned", 1)


def delta_of(base: Path, tuned: Path, **fields: Any) -> Any:
    forest = load(spec(base))
    edit = BitDelta(tuned=str(tuned), **fields)
    apply_edits(forest, [edit])
    bring(forest, [edit])
    return forest, edit


def test_mean_of_the_sizes_is_the_best_scale() -> None:
    delta = torch.randn(12, 20, dtype=torch.float64)
    packed, scale = signs_of(delta)
    ones = unpack_signs(packed, 20, torch.float64)
    assert torch.allclose(scale, (delta * ones).sum() / ones.square().sum())  # least squares of |delta - s S|
    assert torch.equal(scale, delta.abs().mean())


def test_it_stands_nearer_to_the_fine_tune_than_the_base_does(tiny_llama: Path, tuned: Path) -> None:
    forest, edit = delta_of(tiny_llama, tuned)
    plain, target = load(spec(tiny_llama)), load(spec(tuned))
    for name, layer in ((n, m) for n, m in forest.model.named_modules() if isinstance(m, SignedLinear)):
        left = target.model.get_submodule(name).weight - plain.model.get_submodule(name).weight - layer.delta()
        # of a normal distribution the signs and one scale hold 2 / pi of the energy
        assert float(left.square().mean().detach()) == pytest.approx((1 - 2 / torch.pi) * 0.02**2, rel=0.15)
    near, far = (logits(one) - logits(target) for one in (forest, plain))
    assert near.square().mean() < 0.7 * far.square().mean()
    for module in forest.model.modules():
        if isinstance(module, SignedLinear):
            module.enabled = False
    assert torch.equal(logits(forest), logits(plain))


def test_merged_it_is_the_same(tiny_llama: Path, tuned: Path) -> None:
    forest, edit = delta_of(tiny_llama, tuned)
    found = logits(forest)
    edit.merge(forest.model)
    assert not [m for m in forest.model.modules() if getattr(m, "edit", None) is not None]
    assert torch.allclose(logits(forest), found, atol=1e-5)


def test_of_a_lora_on_a_quantized_base(tiny_llama: Path, tmp_path: Path) -> None:
    """The fine-tune is an artifact, the base of the delta in 4 bits: the signs make up for its rounding too."""
    lora = LoRA(rank=4)
    tuned = apply_edits(load(spec(tiny_llama)), [lora])
    with torch.no_grad():
        for p in tuned.model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    save_artifact(tmp_path / "lora", tuned, [lora], {})
    forest, edit = load(spec(tiny_llama)), BitDelta(tuned=str(tmp_path / "lora"), whole=False)
    apply_edits(forest, [NF4(), edit])
    before = logits(forest)
    bring(forest, [edit])
    near, far = (float((one - logits(tuned)).square().mean()) for one in (logits(forest), before))
    assert near < far


@pytest.mark.parametrize("whole", [False, True])
def test_saved_and_opened_without_the_fine_tune(tiny_llama: Path, tmp_path: Path, whole: bool) -> None:
    import shutil

    folder = fine_tune(tiny_llama, tmp_path / "gone", 3, whole)
    forest, edit = delta_of(tiny_llama, folder)
    rest = {n for n in edit.tensors(forest.model) if not n.endswith((".signs", ".scale"))}
    assert bool(rest) == whole and (not whole or rest == {n for n, _ in load(spec(tiny_llama)).model.named_parameters() if not n.endswith("proj.weight")})  # fmt: skip
    save_artifact(tmp_path / "delta", forest, [edit], {})
    shutil.rmtree(folder)
    opened, _ = open_artifact(tmp_path / "delta")
    assert torch.equal(logits(opened), logits(forest))


def test_packed_it_takes_a_bit_a_weight_on_disk_and_in_memory(tiny_llama: Path, tuned: Path, tmp_path: Path) -> None:
    forest, edit = delta_of(tiny_llama, tuned)
    layers = [m for m in forest.model.modules() if isinstance(m, SignedLinear)]
    count = sum(m.base.weight.numel() for m in layers)
    held = weight_bytes(forest.model) - weight_bytes(load(spec(tiny_llama)).model)
    assert held == count // 8 + 4 * len(layers)
    save_artifact(tmp_path / "delta", forest, [edit], {})
    size = (tmp_path / "delta" / TENSORS).stat().st_size
    assert size < count // 8 + 4 * len(layers) + 200 * len(layers)  # the file's own header


def test_scales_alone_train_towards_the_fine_tune(tiny_llama: Path, tuned: Path) -> None:
    """Scale distillation: the error of the logits falls below what the best scales for the weights give."""
    forest, _ = delta_of(tiny_llama, tuned)
    objective = taught(Distill(divergence="mse", teacher=Teacher(path=str(tuned), dtype="float32")), forest, [])
    batch = batch_of(len(forest.tokenizer))
    trained = [p for p in forest.model.parameters() if p.requires_grad]
    assert len(trained) == 14 and all(p.ndim == 0 for p in trained)
    optimizer = torch.optim.Adam(trained, 1e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = objective(forest, batch)
        loss.sum.backward()
        optimizer.step()
        losses.append(float(loss.sum.detach()))
    assert losses[-1] < 0.95 * losses[0]


def test_the_backward_pass_keeps_no_dense_delta() -> None:
    base = nn.Linear(256, 256, bias=False).requires_grad_(False)
    layer = SignedLinear(base, BitDelta(tuned="x"))
    x = torch.randn(4, 256, requires_grad=True)
    assert saved_bytes(layer, lambda: layer(x).sum()) < 8 * x.numel() * 4


# Tenants.


def test_each_row_has_its_own_tenant_over_one_base(tiny_llama: Path, tmp_path: Path) -> None:
    refs = {}
    for seed, name in enumerate(("ada", "bo", "cy")):
        folder = fine_tune(tiny_llama, tmp_path / f"{name}-tuned", seed)
        make_delta(str(folder), tmp_path / name, base=str(tiny_llama))
        refs[name] = str(tmp_path / name)
    forest, tenants = open_tenants(refs, dtype="float32")
    layers = [m for m in forest.model.modules() if isinstance(m, TenantLinear)]
    plain = load(spec(tiny_llama))
    assert (
        sum(tenants.bytes_of(n) for n in refs) == weight_bytes(forest.model) - weight_bytes(plain.model)
        and len(layers) == 14
    )
    base = logits(forest)
    assert torch.equal(base, logits(plain))
    alone = {}
    for name, ref in refs.items():
        tenants.use(name)
        alone[name] = logits(open_artifact(Path(ref) / "artifact", dtype="float32")[0])
        assert torch.allclose(logits(forest), alone[name], atol=1e-6)
    tenants.route_rows(["bo", None, "ada", "cy", "bo"])
    rows = logits(forest, TOKENS.repeat(5, 1))
    for row, wanted in zip(rows, (alone["bo"], base, alone["ada"], alone["cy"], alone["bo"]), strict=True):
        assert torch.allclose(row, wanted[0], atol=1e-5)
    batch = batch_of(len(forest.tokenizer))
    tenants.route(batch, ["cy", "ada", None])
    together = forest.logits(batch, torch.arange(40))
    for i, name in ((0, "cy"), (1, "ada")):
        tenants.use(name)
        assert torch.allclose(
            together[20 * i : 20 * i + 20], logits(forest, batch.tokens[None, 20 * i : 20 * i + 20])[0], atol=1e-5
        )
    tenants.close()
    assert torch.equal(logits(forest), base) and not [m for m in forest.model.modules() if isinstance(m, TenantLinear)]


def test_refusals_are_sentences(tiny_llama: Path, tmp_path: Path) -> None:
    folder = fine_tune(tiny_llama, tmp_path / "all", 3, whole=True)
    with pytest.raises(FettleError, match="changed model.embed_tokens.weight too and .* set whole: true"):
        delta_of(tiny_llama, folder, whole=False)
    with pytest.raises(FettleError, match="no artifact, so its base is not on record; name the base with --base"):
        make_delta(str(folder), tmp_path / "d")
    made = make_delta(str(folder), tmp_path / "d", base=str(tiny_llama))
    with pytest.raises(FettleError, match="holds an artifact already"):
        make_delta(str(folder), tmp_path / "d", base=str(tiny_llama))
    with pytest.raises(FettleError, match="'one' keeps .* whole and .* open it alone"):
        open_tenants({"one": str(made)})
    with pytest.raises(FettleError, match="there is none called 'x'"):
        forest, tenants = open_tenants(
            {"one": str(make_delta(str(tiny_llama), tmp_path / "same", base=str(tiny_llama)))}
        )
        tenants.use("x")
    forest, edit = load(spec(tiny_llama)), BitDelta(tuned="x")
    apply_edits(forest, [edit])
    damaged = load(spec(tiny_llama)).model
    damaged.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(FettleError, match=r"bitdelta: 'x': model.layers.1.mlp.up_proj: values that are not finite"):
        edit.take(forest.model, damaged)
    odd = load(spec(tiny_llama))
    odd.model.register_parameter("extra", nn.Parameter(torch.zeros(2)))
    with pytest.raises(FettleError, match="has weights that the base has not .extra."):
        edit.take(forest.model, odd.model)
    forest = apply_edits(load(spec(tiny_llama)), [LoRA(rank=2)])
    with pytest.raises(FettleError, match="put bitdelta before it in the list"):
        BitDelta(tuned="x").apply(forest.model)
