"""Comparing arms: what a file of arms may say, what a summary of outcomes says."""

from __future__ import annotations

import io
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from fettle.core.errors import FettleError
from fettle.core.files import write_json
from fettle.stages.compare import Outcome, compare, draw, pick, place_of, read_arms, summary, table
from fettle.stages.labels import label
from fettle.stages.pipeline import load_recipe
from fettle.stages.recipes import recipe_file

ONE = Outcome("lora", 0, 10, 100, 2**20, 0.5, 2.0, 1.1, 1.0, {"held.jsonl": (0.4, 0.3, 0.5)})


def test_arms_become_overrides(tmp_path: Path) -> None:
    file = tmp_path / "arms.yaml"
    file.write_text("a: {edits: [{kind: full}], optim: {lr: 1.0e-3}}\nb: {seed: 3}\n")
    assert read_arms(file) == {"a": ('edits=[{"kind":"full"}]', "optim.lr=0.001"), "b": ("seed=3",)}


def test_every_arm_that_ships_is_a_recipe() -> None:
    arms = read_arms(recipe_file("peft.yaml"))
    for changes in arms.values():
        load_recipe(recipe_file("quickstart.yaml"), changes)
    kinds = {edit.kind for changes in arms.values() for edit in load_recipe(recipe_file("quickstart.yaml"), changes).stages[0].edits}  # fmt: skip
    assert len(arms) >= 20 and {"lora", "nf4", "adapter", "prefix_tuning", "bitfit", "tinytl"} <= kinds


def test_what_is_no_arm_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "arms.yaml"
    file.write_text("a: {seed: 1}\nb: 3\n")
    with pytest.raises(FettleError, match=r"arms.yaml:2: b: .* found 3"):
        read_arms(file)
    file.write_text("- a\n")
    with pytest.raises(FettleError, match="expected arms by name, found list"):
        read_arms(file)


def test_a_wrong_name_is_told_with_the_nearest() -> None:
    assert list(pick({"lora": [], "full": []}, ["full"])) == ["full"]
    with pytest.raises(FettleError, match="no arm 'lroa'.*lora"):
        pick({"lora": [], "full": []}, ["lroa"])


def test_a_summary_has_the_interval_of_one_run_and_the_span_of_several() -> None:
    alone = summary([ONE])["lora"]
    assert alone["scores"]["held.jsonl"] == (0.4, 0.3, 0.5) and alone["merged_latency"] == 1.0
    other = replace(ONE, seed=1, step_seconds=0.7, merged_latency=None, scores={"held.jsonl": (0.6, 0.1, 0.9)})
    both = summary([ONE, other])["lora"]
    assert both["scores"]["held.jsonl"] == (0.5, 0.4, 0.6) and both["step_seconds"] == pytest.approx(0.6)
    assert both["merged_latency"] == 1.0


def test_a_picture_is_drawn_with_and_without_scores(tmp_path: Path) -> None:
    draw([ONE, replace(ONE, arm="full", trained=100)], tmp_path / "with.png")
    draw([replace(ONE, scores={})], tmp_path / "without.png")
    same = [replace(ONE, seed=seed, scores={"held.jsonl": (0.22627737226277372, 0.1, 0.3)}) for seed in range(3)]
    draw(same, tmp_path / "same.png")  # whose mean is not quite their least
    assert (tmp_path / "with.png").stat().st_size > 5000 and (tmp_path / "without.png").stat().st_size > 5000


def test_names_beside_points_do_not_cover_each_other(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.text import Text

    figure, axis = plt.subplots(figsize=(5, 4), layout="constrained")
    points = [(10.0, 0.5, f"an arm {i}") for i in range(6)] + [
        (0.0, 0.5, "not on a log axis"),
        (1000.0, 0.5, "at the right edge"),
    ]
    axis.plot([x for x, *_ in points], [y for _, y, _ in points], "o")
    axis.set(xscale="log")
    label(axis, points)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axis.texts]  # without their lines
    assert [text.get_text() for text in axis.texts].count("not on a log axis") == 0 and len(boxes) == 7
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(box.x1 <= figure.bbox.x1 + 1 for box in boxes)
    plt.close(figure)


def test_a_run_that_ended_is_read_again_only_for_its_own_recipe(tmp_path: Path) -> None:
    recipe, place = recipe_file("quickstart.yaml"), place_of(tmp_path, "lora", 1000)
    plan = ["optim.lr=0.1", "seed=1000", f"output={place}"]
    made = load_recipe(recipe, plan).stages[0].model_dump(mode="json")
    write_json(place / "artifact" / "manifest.json", {"recipe": made})
    write_json(place / "findings.json", asdict(replace(ONE, seed=1000)))
    console = Console(file=io.StringIO())
    (found,) = compare(recipe, {"lora": ["optim.lr=0.1"]}, tmp_path, seeds=1, first=1000, console=console)
    assert found == replace(ONE, seed=1000)
    with pytest.raises(FettleError, match="seed-1000: was written by another recipe .optim.lr: 0.1 then, 0.2 now"):
        compare(recipe, {"lora": ["optim.lr=0.2"]}, tmp_path, seeds=1, first=1000, console=console)


@pytest.mark.parametrize(
    ("names", "heads"),
    [
        (["x/t.jsonl", "y/t.jsonl"], ["x/t", "y/t"]),
        (["t.jsonl, shots 0", "t.jsonl, shots 2"], ["t, shots 0", "t, shots 2"]),
        (["t.jsonl, temperature 0.7", "a.txt", "b.c.json"], ["t, temperature 0.7", "a", "b.c"]),
        (["t.jsonl", "t.txt"], ["t.jsonl", "t.txt"]),
    ],
)
def test_heads_and_axes_tell_evaluations_apart(tmp_path: Path, monkeypatch, names: list, heads: list) -> None:
    import matplotlib.pyplot as plt

    outcomes = [replace(ONE, scores=dict.fromkeys(names, (0.4, 0.3, 0.5)))]
    assert [column.header for column in table(outcomes).columns][5:-2] == heads
    close, drawn = plt.close, list[str]()
    monkeypatch.setattr(plt, "close", lambda figure: (drawn.extend(a.get_ylabel() for a in figure.axes), close(figure)))
    draw(outcomes, tmp_path / "p.png")
    assert drawn[:-1] == [f"score on {head}" for head in heads]
