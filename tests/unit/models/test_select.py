"""Selecting linear layers, and reading their weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from fettle.core.errors import FettleError
from fettle.feedback.rules import compiled
from fettle.models.select import linears, matches, partly_matched
from fettle.models.weight import in_out, is_linear, read_weight, write_weight


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "vocab_size": 40,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1))


def test_all_linear_is_all_but_the_head(llama: nn.Module) -> None:
    assert len(linears(llama)) == 3 * 7
    assert "lm_head" in linears(llama, exclude_head=False)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("q_proj", 3),
        (["q_proj", "v_proj"], 6),
        ("self_attn.q_proj", 3),
        ("model.layers.1.mlp.up_proj", 1),
        (r".*\.layers\.[02]\.mlp\..*", 6),
        (["q_proj", ".*q_proj"], 3),
    ],
)
def test_patterns(llama: nn.Module, targets: str | list[str], count: int) -> None:
    assert len(linears(llama, targets)) == count


def test_a_pattern_that_matches_nothing_names_what_is_near(llama: nn.Module) -> None:
    with pytest.raises(FettleError, match="'q_porj' matches no linear layer; nearest: q_proj"):
        linears(llama, ["v_proj", "q_porj"])
    with pytest.raises(FettleError, match="there are: .*down_proj"):
        linears(llama, "xyz")
    with pytest.raises(FettleError, match="not a regular expression"):
        linears(llama, "(q_proj")
    with pytest.raises(FettleError, match="proj"):
        linears(llama, "proj")  # the end of a name is cut at a dot


def test_layers_left_out_are_told(llama: nn.Module) -> None:
    assert partly_matched(llama, "q_proj") == {}
    for meant in (
        r".*layers\.[01]\..*q_proj",
        "model.layers.0.self_attn.q_proj",
        r".*\.(1|2)\.mlp\..*",
        "1.mlp.up_proj",
    ):
        assert partly_matched(llama, meant) == {}
    ten = nn.ModuleDict(
        {"h": nn.ModuleList(nn.ModuleDict({"fc1": nn.Linear(2, 2), "fc2": nn.Linear(2, 2)}) for _ in range(11))}
    )
    assert partly_matched(ten, "fc1") == {}  # fc2 is no sister of it
    for slip in (r"h\.[0-9]\.fc1", r"h\.\d\.fc1", r"h\..\.fc1", r"h\.\d{1}\.fc1"):
        assert partly_matched(ten, slip) == {slip: ["h.10.fc1"]}


def test_an_adapter_stands_for_its_layer() -> None:
    class Adapter(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base, self.extra = base, nn.Linear(2, 2)

    model = nn.ModuleDict({"up": Adapter(nn.Linear(3, 5)), "down": nn.Linear(5, 3)})
    assert list(linears(model)) == ["up", "down"]
    assert in_out(model["up"]) == (3, 5)
    with pytest.raises(FettleError, match="merge it first"):
        read_weight(model["up"])


def test_both_kinds_of_linear_layer_read_alike() -> None:
    plain, turned = nn.Linear(3, 5), Conv1D(5, 3)
    x = torch.randn(2, 3)
    for module in (plain, turned):
        assert is_linear(module) and in_out(module) == (3, 5) and read_weight(module).shape == (5, 3)
        torch.testing.assert_close(module(x), x @ read_weight(module).t() + module.bias)
    write_weight(turned, read_weight(plain).detach())
    torch.testing.assert_close(read_weight(turned), read_weight(plain))
    with pytest.raises(FettleError, match="does not fit"):
        write_weight(plain, torch.zeros(3, 5))
    with pytest.raises(FettleError, match="not a linear layer"):
        in_out(nn.LayerNorm(3))


def test_gpt2_is_made_of_turned_layers() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20))
    assert len(linears(model)) == 8 and len(linears(model, ["c_attn"])) == 2


@pytest.mark.parametrize("pattern", ["(", "a{99999999999}", "(" * 5000 + ")" * 5000])
def test_what_is_no_pattern_is_said(pattern: str) -> None:
    with pytest.raises(FettleError, match="is not a regular expression"):
        matches(pattern, "a")
    with pytest.raises(ValueError, match="is not a regular expression"):
        compiled(pattern)
