"""Memory: the prediction against the measured peak of a process of its own, and what the rehearsal leaves untouched."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fettle.core import FettleError
from fettle.models import memory
from fettle.models.forest import Forest
from fettle.objectives import SFT
from fettle.peft import Full, LoRA

SIZES = {
    "llama": {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 16_000,
    },
    "gpt2": {"n_embd": 512, "n_layer": 6, "n_head": 8, "vocab_size": 16_000},
    "qwen3": {
        "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32_000,
    },
}  # fmt: skip
MEASURE = """
import json, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from fettle.models import memory
from fettle.models.allocator import keep_pages
from fettle.models.forest import Forest
from fettle.objectives import SFT
from fettle.peft import Full, LoRA
from fettle.train.optim import Masters, OptimSpec, build, norm

kind, sizes, edit, dtype, checkpointing, length = json.loads(sys.argv[1])
keep_pages()
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=getattr(torch, dtype))
if checkpointing:
    model.gradient_checkpointing_enable({"use_reentrant": False})
forest, objective = Forest(model), SFT()
model.requires_grad_(False)
(LoRA(rank=16) if edit == "lora" else Full()).apply(model)
model.train()
batch = memory.worst_batch(length, 4)
plan = memory.predict(forest, batch, lambda m, b: objective(m, b).sum)
memory.reset_peak()
masters = Masters((n, p) for n, p in model.named_parameters() if p.requires_grad)
optimizer = build(OptimSpec(), masters)
for _ in range(3):
    masters.zero()
    objective(forest, batch).sum.backward()
    gradients = masters.gradients()
    torch._foreach_mul_(gradients, 1 / norm(gradients).item())
    optimizer.step()
    masters.publish()
    del gradients
    masters.zero()
print(json.dumps({"measured": memory.measure_peak(), **dict(plan.rows())}))
"""
CASES = [
    ("llama", "lora", "float32", False),
    ("llama", "full", "bfloat16", False),
    pytest.param("gpt2", "full", "float32", False, marks=pytest.mark.slow),
    pytest.param("llama", "full", "float32", True, marks=pytest.mark.slow),
    pytest.param("qwen3", "lora", "bfloat16", False, marks=pytest.mark.slow),
    pytest.param("qwen3", "full", "float32", False, marks=pytest.mark.slow),
]


@pytest.mark.skipif(sys.platform != "linux", reason="a resettable peak is Linux's")
@pytest.mark.parametrize(("kind", "edit", "dtype", "checkpointing"), CASES)
def test_prediction_is_within_15_percent(kind: str, edit: str, dtype: str, checkpointing: bool) -> None:
    case = json.dumps([kind, SIZES[kind], edit, dtype, checkpointing, 1024])
    done = subprocess.run([sys.executable, "-c", MEASURE, case], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print({k: f"{v / 2**20:.0f} MiB" for k, v in found.items()})
    assert found["total"] == pytest.approx(found["measured"], rel=0.15)


def small(layers: int = 2) -> Forest:
    config = AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4, vocab_size=500
    )
    forest = Forest(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    forest.model.requires_grad_(False)
    return forest


def planned(forest: Forest, length: int = 256, **settings: float) -> memory.MemoryPlan:
    return memory.predict(forest, memory.worst_batch(length, 2), lambda m, b: SFT()(m, b).sum, **settings)  # type: ignore[arg-type]


def test_nothing_is_changed() -> None:
    forest = small()
    LoRA(rank=4).apply(forest.model)
    before = {k: v.clone() for k, v in forest.model.state_dict().items()}
    training, state = forest.model.training, torch.get_rng_state()
    planned(forest)
    assert forest.model.training is training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.device.type == "cpu" for p in forest.model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in forest.model.state_dict().items())


def test_static_parts_are_exact() -> None:
    forest = small()
    Full().apply(forest.model)
    count = sum(p.numel() for p in forest.model.parameters())
    plan = planned(forest)
    assert plan.weights == 4 * count + sum(b.numel() * 4 for b in forest.model.buffers())
    assert plan.optimizer == 8 * count
    assert plan.gradients == 4 * count and -plan.gradients <= plan.not_at_once <= 0
    forest.model.bfloat16()
    narrow = planned(forest)
    assert narrow.optimizer == (8 + 4) * count  # float32 masters
    assert narrow.gradients == 4 * count
    assert narrow.weights < plan.weights
    assert plan.total == sum(size for what, size in plan.rows() if what != "total")


def test_a_model_without_memory_predicts_the_same() -> None:
    forest = small()
    LoRA(rank=4).apply(forest.model)
    real = planned(forest)
    forest.model.to("meta")
    empty = planned(forest)
    assert (empty.weights, empty.optimizer, empty.logits) == (real.weights, real.optimizer, real.logits)
    assert empty.activations == pytest.approx(real.activations, rel=0.01)


def test_levers_pull_the_right_way() -> None:
    forest = small(layers=8)
    LoRA(rank=4).apply(forest.model)
    lora = planned(forest)
    assert planned(forest, 512).activations > 1.7 * lora.activations
    forest.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert planned(forest).activations < 0.5 * lora.activations
    full = small()
    Full().apply(full.model)
    assert planned(full, accumulate=4).not_at_once > planned(full).not_at_once  # a first pass leaves its gradients
    assert planned(full, accumulate=4).total > planned(full).total
    assert planned(full, state_bytes=2.0).optimizer < planned(full).optimizer


def test_every_tensor_is_counted() -> None:
    """The rehearsal's count of a function whose saved tensors are known by hand."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from fettle.models.rehearsal import rehearsing

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        weight = torch.empty(100, 100, requires_grad=True)
    with rehearsing(fake, 0) as rehearsal:
        a = weight.exp()  # 40,000 bytes, kept for its own gradient
        b = a.sin()  # another, keeps a
        b.sum().backward()  # cos(a), its product, and the gradient of exp
        assert rehearsal.live.total >= 2 * 40_000 + 40_000
        del a, b
    assert rehearsal.live.total == 40_000  # the gradient is left
    assert 4 * 40_000 <= rehearsal.peak.total <= 6 * 40_000


def test_nothing_trains_is_said() -> None:
    with pytest.raises(FettleError, match="nothing trains"):
        planned(small())


@pytest.mark.skipif(sys.platform != "linux", reason="a resettable peak is Linux's")
def test_peak_is_measured_afresh() -> None:
    def touched(size: int) -> int:  # mapped from the system, since the heap may hold free pages of earlier tests
        with mmap.mmap(-1, size) as block:
            block.write(b"x" * size)
            return memory.resident()

    assert touched(64 << 20) > 64 << 20
    touched(256 << 20)
    memory.reset_peak()
    base = memory.measure_peak()
    assert base < memory.resident() + (32 << 20)  # what was given back is forgotten
    touched(128 << 20)
    assert memory.measure_peak() - base > 100 << 20
    assert memory.available() > 0


def test_saved_bytes_are_those_of_storages_that_the_graph_holds() -> None:
    model = torch.nn.Linear(8, 4, bias=False)
    x, other = torch.randn(16, 8), torch.randn(16, 4)

    def run() -> torch.Tensor:
        (model(torch.randn(512, 8)) ** 2).sum()  # its graph is gone before the end
        y = model(x)  # keeps x
        return (y * other + y[:2].square().sum()).sum()  # keeps other, and y of which it sees a part

    assert memory.saved_bytes(model, run) == 4 * (16 * 8 + 16 * 4 + 16 * 4)
    model.requires_grad_(False)
    assert memory.saved_bytes(model, run) == 0
