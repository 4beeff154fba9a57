"""Recipes that make no sense are refused, with their line and what to do: by what they say, or on their model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fettle.core.errors import FettleError
from fettle.stages import Recipe, check, load_recipe, run


def recipe(folder: Path, *edits: str, more: str = "") -> Path:
    listed = "".join(f"\n  - {edit}" for edit in edits) or " []"
    (folder / "r.yaml").write_text(
        f"model: fettle/tiny\nedits:{listed}\ndata: [{{path: {folder}/d.jsonl}}]\noutput: {folder}/out\n{more}"
    )
    return folder / "r.yaml"


REFUSED: list[tuple[list[str], int, str]] = [  # the edits, the line of the wrong one, what is said
    (["{kind: full}", "{kind: lora}"], 4, "edits.1: lora and edits.0 (full) would train the same weights twice"),
    (["{kind: lora}", "{kind: full}"], 4, "edits.1: full and edits.0 (lora) would train the same weights twice"),
    (["{kind: norms}", "{kind: lora}", "{kind: full}"], 5, "edits.2: full and edits.0 (norms) would train"),
    (["{kind: full, targets: q_proj}", "{kind: lora, targets: [v_proj, q_proj]}"], 4, "edits.1: lora and edits.0 (full)"),
    (["{kind: full}", "{kind: nf4}"], 4, "edits.1: nf4 would round away what edits.0 (full) trains"),
    (["{kind: lora}", "{kind: rtn}"], 4, "edits.1: rtn would round away what edits.0 (lora) trains"),
    (["{kind: nf4}", "{kind: full}"], 4, "edits.1: full trains every weight, and edits.0 (nf4) holds"),
    (["{kind: prompt_tuning}", "{kind: lora}", "{kind: p_tuning}"], 5, "edits.2: a model takes one soft prompt, and edits.0"),
    (["{kind: freeze, targets: q_proj}", "{kind: full}"], 3, "edits.0: freeze stops nothing here"),
    (["{kind: nf4}"], 2, "edits: nothing trains after nf4; add an edit that trains"),
    ([], 2, "edits: nothing trains; add an edit that trains, as in edits: [{kind: lora}]"),
]  # fmt: skip
ALLOWED = [
    ["{kind: nf4}", "{kind: lora}"],
    ["{kind: lora}", "{kind: lora, rank: 4}"],
    ["{kind: lora}", "{kind: prompt_tuning}", "{kind: norms}"],
    ["{kind: full, targets: lm_head}", "{kind: lora}"],
    ["{kind: full, targets: embed_tokens}", "{kind: nf4}", "{kind: lora}"],
    ["{kind: nf4, targets: up_proj}", "{kind: full, targets: down_proj}"],
    ["{kind: full}", "{kind: freeze, targets: q_proj}", "{kind: lora, targets: q_proj}"],
    ["{kind: new_tokens, tokens: [one]}", "{kind: full}"],
]


@pytest.mark.parametrize(("edits", "line", "what"), REFUSED, ids=lambda value: str(value)[:50])
def test_lists_that_make_no_sense(edits: list[str], line: int, what: str, tmp_path: Path) -> None:
    file = recipe(tmp_path, *edits)
    with pytest.raises(FettleError) as caught:
        load_recipe(file)
    assert str(caught.value).startswith(f"{file}:{line}: {what}"), caught.value


@pytest.mark.parametrize("edits", ALLOWED, ids=" ".join)
def test_lists_that_do(edits: list[str], tmp_path: Path) -> None:
    assert len(load_recipe(recipe(tmp_path, *edits)).stages[0].edits) == len(edits)


def test_the_command_line_is_blamed_for_its_own_edits(tmp_path: Path) -> None:
    with pytest.raises(FettleError, match=r"^override 'edits=\[\]': edits: nothing trains"):
        load_recipe(recipe(tmp_path, "{kind: lora}"), ["edits=[]"])
    with pytest.raises(ValueError, match="the same weights twice"):
        Recipe(edits=[{"kind": "full"}, {"kind": "lora"}], data=[{"path": "d.jsonl"}], output="out")  # type: ignore[arg-type, list-item]


def test_the_objective_fits_the_task(tmp_path: Path) -> None:
    file = recipe(tmp_path, "{kind: lora}", more="objective: {kind: classify}\n")
    with pytest.raises(FettleError, match=r"r.yaml:6: objective: classify does not fit"):
        load_recipe(file, ["model.task=tag"])
    assert load_recipe(file, ["model.task=classify"])


def test_an_adalora_needs_room_for_its_schedule(tmp_path: Path) -> None:
    file = recipe(tmp_path, "{kind: adalora, warmup: 100, final: 100}", more="optim: {steps: 150}\n")
    with pytest.raises(FettleError, match=r"r.yaml:3: edits.0: adalora: 100 steps of 'warmup' and 100 of 'final'"):
        load_recipe(file)


# What only the model shows.


def checked(file: Path, model: Path, *overrides: str, **more: Any) -> list[str]:
    rows = [{"instruction": f"say {i}", "output": "one two"} for i in range(30)]
    (file.parent / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"model={model}", "model.dtype=float32", "batch.tokens=64", *overrides]
    return check(load_recipe(file, settings), 1, **{"time_steps": False, **more})[0].problems


def test_weights_that_two_edits_train(tmp_path: Path, tiny_llama: Path) -> None:
    file = recipe(tmp_path, '{kind: full, targets: "model.layers.0"}', "{kind: lora, targets: [q_proj, v_proj]}")
    (problem,) = checked(file, tiny_llama)
    assert problem.startswith(f"{file}:4: edits.1: lora updates model.layers.0.self_attn.q_proj and 1 more, whose own")
    both = ["{kind: full}", "{kind: freeze, targets: [q_proj]}", "{kind: lora, targets: [q_proj]}"]
    assert not checked(recipe(tmp_path, *both), tiny_llama)


def test_all_that_trained_is_frozen(tmp_path: Path, tiny_llama: Path) -> None:
    file = recipe(tmp_path, "{kind: full, targets: q_proj}", "{kind: freeze, targets: model.layers}")
    with pytest.raises(FettleError, match=r"r.yaml:2: edits: nothing trains after full, freeze"):
        checked(file, tiny_llama)


def test_an_epoch_too_short_for_a_schedule(tmp_path: Path, tiny_llama: Path) -> None:
    file = recipe(tmp_path, "{kind: adalora, rank: 4, target_rank: 2, warmup: 100, final: 100}")
    (problem,) = checked(file, tiny_llama)
    assert problem.startswith(f"{file}:3: edits.0: adalora: 100 steps of 'warmup'") and "optim.steps" in problem
    assert not checked(file, tiny_llama, "optim.steps=300", time_steps=True)  # timed as part of the run's own schedule


def test_what_an_edit_finds_wrong_has_its_key_and_line(tmp_path: Path, tiny_llama: Path) -> None:
    file = recipe(tmp_path, "{kind: nf4}", "{kind: lora, targets: qproj}")
    with pytest.raises(FettleError) as caught:
        checked(file, tiny_llama)
    assert str(caught.value).startswith(f"{file}:4: edits.1.targets: 'qproj' matches no linear layer")
    with pytest.raises(FettleError, match=r"^override 'edits.1.targets=kproj': edits.1.targets: 'kproj' matches"):
        run(load_recipe(file, ["edits.1.targets=kproj", f"model={tiny_llama}"]))
