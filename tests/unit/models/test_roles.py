"""Roles: which edits are on, and what cannot be switched off."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from fettle.core.batch import Batch, Example, Node, pack
from fettle.core.errors import FettleError
from fettle.models import roles
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.spec import ModelSpec
from fettle.peft import IA3, BitFit, Full, LoRA, NewTokens, PromptTuning
from fettle.stages.artifact import add_edit, apply_edits


@pytest.fixture
def forest(tiny_llama: Path) -> Forest:
    return load(ModelSpec(path=str(tiny_llama), dtype="float32", device="cpu"))


def batch() -> Batch:
    tokens = np.arange(5, 25, dtype=np.int32)
    return pack([Example((Node(tokens, np.ones(20, np.float32)),), "row")], 32, 0)


def stir(forest: Forest) -> None:
    """Move all that trains away from its start."""
    torch.manual_seed(0)
    for p in forest.model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)


def logps(forest: Forest) -> torch.Tensor:
    with torch.no_grad():
        return forest.logps(batch())


def test_each_choice_of_edits_is_a_role(forest: Forest) -> None:
    base = logps(forest)
    one, other = LoRA(rank=2), LoRA(rank=2)  # equal, and two all the same
    apply_edits(forest, (one, other), 0)
    stir(forest)
    both = logps(forest)
    with roles.only(forest.model, [one]):
        first = logps(forest)
        with roles.without(forest.model, [one]):
            torch.testing.assert_close(logps(forest), base)
    with roles.without(forest.model, [other]):
        torch.testing.assert_close(logps(forest), first)
    with roles.only(forest.model, []):
        torch.testing.assert_close(logps(forest), base)
    torch.testing.assert_close(logps(forest), both)
    assert not torch.allclose(first, both) and not torch.allclose(first, base)


def test_switches_are_put_back_after_an_error(forest: Forest) -> None:
    apply_edits(forest, (LoRA(rank=2),), 0)
    with pytest.raises(ZeroDivisionError), forest.reference():
        raise ZeroDivisionError
    assert all(m.enabled for m in roles.switches(forest.model))


@pytest.mark.parametrize(
    "edits", [(LoRA(rank=2),), (BitFit(),), (IA3(),), (LoRA(rank=2), IA3()), (PromptTuning(tokens=3),)]
)
def test_the_reference_is_the_model_from_before(edits: tuple, forest: Forest) -> None:
    """Also of a policy that carries an adapter: the adapter stays on, what this stage trains goes off."""
    carried = LoRA(rank=3)
    apply_edits(forest, (carried,), 0)
    stir(forest)
    forest.model.requires_grad_(False)
    before = logps(forest)
    for i, edit in enumerate(edits):
        add_edit(forest, edit, 0, 1 + i)
    stir(forest)
    forest.model.train()
    assert roles.obstacle(forest.model) is None
    assert set(map(id, roles.trained(forest.model))) == set(map(id, edits))
    with forest.reference() as same:
        assert same is forest and not torch.is_grad_enabled() and not any(m.training for m in forest.model.modules())
        torch.testing.assert_close(forest.logps(batch()), before)
    assert all(m.training for m in forest.model.modules()), "the mode of training comes back"
    assert not torch.allclose(logps(forest), before)


def test_a_mixed_mode_comes_back_as_it_was(forest: Forest) -> None:
    apply_edits(forest, (LoRA(rank=2),), 0)
    forest.model.train()
    still = forest.model.model.layers[0]
    still.eval()
    with forest.reference():
        pass
    assert not still.training and forest.model.training


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (Full(), "trains in place"),
        (Full(targets="norm"), "trains in place"),
        (NewTokens(tokens=("<new>",)), "does not work without it"),
    ],
)
def test_what_cannot_be_switched_off_is_told(edit: object, why: str, forest: Forest) -> None:
    apply_edits(forest, (edit,), 0)  # type: ignore[arg-type]
    assert why in str(roles.obstacle(forest.model))
    with pytest.raises(FettleError, match="reference: cached"), forest.reference():
        pass
    with pytest.raises(FettleError, match="cannot be switched off"), roles.without(forest.model, [edit]):  # type: ignore[list-item]
        pass


def test_a_start_that_holds_a_part_of_the_base_cannot_be_switched_off() -> None:
    assert not LoRA(init="loftq").detachable and LoRA().detachable


def test_a_copy_of_a_model_has_switches_of_its_own(forest: Forest) -> None:
    edit = LoRA(rank=2)
    apply_edits(forest, (edit,), 0)
    twin = copy.deepcopy(forest.model)
    with roles.without(twin, [edit]):
        assert all(m.enabled for m in roles.switches(forest.model)) and not any(m.enabled for m in roles.switches(twin))
