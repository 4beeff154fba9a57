"""The arithmetic that a benchmark's figures rest on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import Children, Spread, closeness, fastest, fill, in_turn, play_off, ratios, steady, table
from benchmarks.flops import Shape, step_flops


def test_steady_counts_what_follows_the_warm_up() -> None:
    # steps end at 10, 11, 13, 17: after two steps of warm-up, 30 + 50 tokens in 6 seconds
    assert steady([10.0, 11.0, 13.0, 17.0], [1000, 2000, 30, 50], 2) == pytest.approx(80 / 6)


@pytest.mark.parametrize(("marks", "tokens", "warmup"), [([1, 2], [5, 5], 2), ([1, 2], [5, 5], 0), ([1, 2], [5], 1)])
def test_steady_refuses_what_cannot_be_measured(marks: list[float], tokens: list[int], warmup: int) -> None:
    with pytest.raises(ValueError, match="nothing to measure"):
        steady(marks, tokens, warmup)


def test_a_ratio_is_of_neighbours() -> None:
    # the machine is twice as slow in the last pair, for both: the ratios do not see it, a ratio of means would
    assert ratios([10.0, 12.0, 5.0], [2.0, 2.0, 1.0]) == Spread(5.0, 5.0, 6.0)
    with pytest.raises(ValueError):
        ratios([1.0], [1.0, 2.0])


def test_closeness_is_relative_to_the_second() -> None:
    assert closeness([2.0, 3.0], [2.0, 4.0]) == {"mean": 0.125, "largest": 0.25}


def test_arms_take_turns() -> None:
    order: list[str] = []

    def arm(name: str) -> dict:
        order.append(name)
        return {"n": len(order)}

    found = in_turn(2, {"a": lambda: arm("a"), "b": lambda: arm("b")})
    assert order == ["a", "b", "a", "b"]
    assert found == {"a": [{"n": 1}, {"n": 3}], "b": [{"n": 2}, {"n": 4}]}


def test_the_two_fastest_are_timed_once_more() -> None:
    """A noisy moment made the second look slow; what failed, and what was clearly slower, is not tried again."""
    asked: list[Any] = []

    def children(task: str, **job: Any) -> Any:
        asked.append((task, job["settings"]))
        times = {"a": 1.1, "b": 0.8}
        return [{"setting": s, "seconds": times[s["name"]]} for s in job["settings"]]

    times = {"a": 1.0, "b": 1.2, "c": 3.0}
    found: list[dict[str, Any]] = [{"setting": {"name": n}, "seconds": s} for n, s in times.items()]
    found.append({"setting": {"name": "d"}, "error": "out of memory"})
    assert fastest(found) == {"name": "a"}
    assert play_off(children, {}, found) == {"name": "b"}  # type: ignore[arg-type]
    assert asked == [("calibrate", [{"name": "b"}, {"name": "a"}])]
    assert [row.get("seconds") for row in found] == [1.0, 0.8, 3.0, None]
    with pytest.raises(SystemExit):
        fastest(found[3:])


def test_a_place_on_a_page_is_filled_again_and_again(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- x -->\nold\n<!-- /x -->\nafter\n")
    for text in ("one", "two\nlines"):
        fill(page, "x", text)
        assert page.read_text() == f"before\n<!-- x -->\n{text}\n<!-- /x -->\nafter\n"
    with pytest.raises(SystemExit):
        fill(page, "y", "text")


def test_a_table_is_markdown() -> None:
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"


def test_a_child_is_a_process_of_its_own_and_its_failure_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(Path(__file__).parents[3])!r})\nfrom benchmarks.common import serve\n"
        "serve({'double': lambda job: [2 * job['n'], os.environ['OMP_NUM_THREADS'], os.getpid()], 'bad': lambda job: 1 / 0})\n"
    )
    children = Children(script, tmp_path / "work", threads=3)
    first, second = children("double", n=21), children("double", n=4)
    assert first[:2] == [42, "3"] and second[0] == 8 and first[2] != second[2]
    with pytest.raises(SystemExit):
        children("bad")
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_full_flops_are_the_products_that_torch_counts() -> None:
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=64, tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    model, tokens = LlamaForCausalLM(config), torch.arange(24)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    shape = Shape.of(model)
    without_attention = step_flops(shape, True, [24], 24) - 12 * shape.attention * 2 * (24 * 25 // 2)
    attention = 12 * shape.attention * 2 * 24 * 24  # eager attention computes every pair, seen or not
    assert shape.attention == 32 and shape.adapter == 0
    assert counts["aten.mm"] == without_attention
    assert counts["aten.bmm"] == attention


def test_lora_saves_the_gradients_of_frozen_weights() -> None:
    shape = Shape(body=1000, head=500, layers=2, attention=16, adapter=30)
    full, lora = (step_flops(shape, f, [7, 3], 4) for f in (True, False))
    assert full - lora == 2 * (1000 * 10 + 500 * 4)
    assert step_flops(shape, False, [7, 3], 4) == 4 * (1000 * 10 + 500 * 4) + 6 * 30 * 10 + 12 * 16 * 2 * (28 + 6)
