"""Prompts from rows of every format, and what of a row is kept for a reward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fettle.core.errors import FettleError
from fettle.data import DataSpec, prepare
from fettle.data.preference import Preference
from fettle.data.prompts import Prompts, read_prompts
from fettle.feedback.rewards import LengthReward, NumberReward, SumReward, Term

ASK = {"role": "user", "content": "2 + 2?"}
SAID = {"role": "assistant", "content": "4"}
OPEN = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"


def file(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def only(folder: Path, row: dict[str, Any], tokenizer: Any, **spec: Any) -> tuple[Any, str, Any]:
    """(what is asked, the tokens as text, the answer) of a row."""
    prompts = read_prompts([DataSpec(path=file(folder, [row]), **spec)], tokenizer, 100)
    prompt = prompts.at(0)
    return prompt.asked, tokenizer.decode(prompt.tokens.tolist()), prompt.facts.get("answer")


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"messages": [ASK]}, None),
        ({"messages": [ASK], "answer": ["4", "four"]}, ["4", "four"]),
        ({"messages": [ASK, SAID]}, "4"),
        ({"messages": [ASK, SAID], "answer": "5"}, "5"),
        ({"conversations": [{"from": "human", "value": "2 + 2?"}]}, None),
        ({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}, "4"),
        ({"instruction": "2 + 2?", "output": "4"}, "4"),
        ({"instruction": "2 + 2?"}, None),
        ({"prompt": [ASK], "completion": [SAID]}, "4"),
        ({"prompt": [ASK]}, None),
    ],
)
def test_a_conversation_is_asked_up_to_where_the_model_begins(
    row: dict[str, Any], answer: Any, tmp_path: Path, tokenizer: Any
) -> None:
    assert only(tmp_path, row, tokenizer) == ((ASK,), OPEN, answer)


@pytest.mark.parametrize("answer", [{}, {"completion": "4"}, {"response": "4"}, {"answer": "4"}])
def test_a_text_is_gone_on_from_unless_it_is_a_turn(answer: dict[str, str], tmp_path: Path, tokenizer: Any) -> None:
    row = {"prompt": "2 + 2?", **answer}
    found = "4" if answer else None
    assert only(tmp_path, row, tokenizer) == ("2 + 2?", "2 + 2?", found)
    assert only(tmp_path, row, tokenizer, chat=True) == ((ASK,), OPEN, found)


def test_a_template_says_what_is_asked_and_what_answers(tmp_path: Path, tokenizer: Any) -> None:
    row = {"q": "2 + 2?", "a": "4"}
    assert only(tmp_path, row, tokenizer, template="{{ q }} ||| {{ a }}") == ((ASK,), OPEN, "4")
    assert only(tmp_path, row, tokenizer, template="{{ q }}", chat=False)[0] == "2 + 2?"


def test_turns_before_the_question_stay(tmp_path: Path, tokenizer: Any) -> None:
    talk = [ASK, SAID, {"role": "user", "content": "And 3 + 3?"}, {"role": "assistant", "content": "6"}]
    asked, text, answer = only(tmp_path, {"messages": talk}, tokenizer)
    assert asked == tuple(talk[:3]) and answer == "6" and text.endswith("And 3 + 3?<|im_end|>\n<|im_start|>assistant\n")


OTHER, ADD = {"role": "assistant", "content": "5"}, {"name": "add", "parameters": {}}
ASKING: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # (the prompt, with its answer, what the recipe says)
    "messages": ({"messages": [ASK]}, {"messages": [ASK, SAID]}, {}),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "2 + 2?"}]},
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}, {},
    ),
    "alpaca": ({"instruction": "2 + 2?"}, {"output": "4"}, {}),
    "alpaca, with old turns": ({"instruction": "2 + 2?", "history": [["1 + 1?", "2"]]}, {"output": "4"}, {}),
    "turns": ({"prompt": [ASK]}, {"completion": [SAID]}, {}),
    "texts": ({"prompt": "2 + 2?"}, {"completion": "4"}, {"chat": True}),
}  # fmt: skip
BESIDE: dict[str, dict[str, Any]] = {
    "nothing": {}, "a system turn": {"system": "Be short."}, "tools": {"tools": [{"type": "function", "function": ADD}]},
    "bare tools": {"tools": [ADD]}, "tools as text": {"tools": json.dumps([ADD])}, "functions": {"functions": [ADD]},
    "functions beside no tools": {"functions": json.dumps([ADD]), "tools": None, "system": "Be short."},
}  # fmt: skip


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("form", ASKING)
def test_what_is_asked_is_what_tuning_and_preferences_ask(
    form: str, beside: str, tmp_path: Path, tokenizer: Any
) -> None:
    """The law of all three: a row's prompt is the same tokens, whatever is learned from its answers."""
    (prompt, answer, spec), more = ASKING[form], BESIDE[beside]
    path = lambda row, name: DataSpec(path=file(tmp_path, [row | more], name), **spec)  # noqa: E731
    (asked,) = read_prompts([path(prompt, "rl.jsonl")], tokenizer, 1000).sources[0]
    cut = len(asked.tokens)
    tuned = prepare([path(prompt | answer, "sft.jsonl")], tokenizer, 1024).example(0).nodes[0]
    compared = path(prompt | {"chosen": SAID, "rejected": OTHER}, "dpo.jsonl")
    if form == "texts":
        compared = path(prompt | {"chosen": "4", "rejected": "5"}, "dpo.jsonl")
    shared, *answers = prepare([compared], tokenizer, 1024, form=Preference()).example(0).nodes
    paths = [[*shared.tokens.tolist(), *node.tokens.tolist()] for node in answers]
    for tokens, said in zip([tuned.tokens.tolist(), *paths], ("4", "4", "5"), strict=True):
        assert tokens[:cut] == asked.tokens.tolist() and tokenizer.decode(tokens[cut:]).strip() == f"{said}<|im_end|>"
    text = tokenizer.decode(asked.tokens.tolist())
    assert ("Be short." in text) == ("system" in more) and ("1 + 1?" in text) == ("history" in prompt)
    assert asked.tools == (({"type": "function", "function": ADD},) if "tools" in more or "functions" in more else ())
    assert text.count('{"name":"add","parameters":{}}') == len(asked.tools)


@pytest.mark.parametrize("more", [{"system": "Be short."}, {"tools": [ADD]}, {"system": " ", "tools": "[]"}])
def test_what_a_text_has_no_place_for_is_told(more: dict[str, Any], tmp_path: Path, tokenizer: Any) -> None:
    rows = {
        "rl": {"prompt": "2 + 2?"}, "sft": {"prompt": "2 + 2?", "completion": "4"},
        "dpo": {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
    }  # fmt: skip
    specs = {name: DataSpec(path=file(tmp_path, [row | more], f"{name}.jsonl")) for name, row in rows.items()}
    found = read_prompts([specs["rl"]], tokenizer, 100)
    assert tokenizer.decode(found.at(0).tokens.tolist()) == "2 + 2?" and found.at(0).tools == ()
    notes = {
        "rl": found.notes, "sft": prepare([specs["sft"]], tokenizer, 64).notes,
        "dpo": prepare([specs["dpo"]], tokenizer, 64, form=Preference()).notes,
    }  # fmt: skip
    for name, spec in specs.items():
        told = [note for note in notes[name] if note.startswith(f"{spec.path}: 1 rows have 'system' or 'tools' beside")]
        assert len(told) == (more["tools"] != "[]" if "tools" in more else 1)


def test_tools_that_are_none_are_told(tmp_path: Path, tokenizer: Any) -> None:
    row = {"tools": "hammer"}
    specs = [
        DataSpec(path=file(tmp_path, [asked | row], f"{name}.jsonl"), **more)
        for name, asked, more in (
            ("words", {"instruction": "2 + 2?", "output": "4"}, {}), ("texts", {"prompt": "2 + 2?", "completion": "4"}, {"chat": True}),
        )
    ]  # fmt: skip
    for notes in (read_prompts(specs, tokenizer, 100).notes, prepare(specs, tokenizer, 64).notes):
        told = [note for note in notes if "no list of functions, and are not read" in note]
        assert [note.partition(" have")[0] for note in told] == [f"{spec.path}: 1 rows" for spec in specs]


def test_a_call_is_no_answer_of_the_row(tmp_path: Path, tokenizer: Any) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    assert only(tmp_path, {"messages": [ASK, call]}, tokenizer)[2] is None


def test_bad_rows_are_named(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"messages": [ASK]}] * 8 + [
        {"messages": []},
        {"messages": [{"role": "user", "content": "long " * 90}]},
        "{",
    ]
    path = file(tmp_path, rows)
    with pytest.raises(FettleError) as error:
        read_prompts([DataSpec(path=path)], tokenizer, 60)
    said = str(error.value)
    assert f"{path}: 3 of 11 rows cannot be used as prompts" in said
    assert f"{path}:9: 'messages' is empty" in said and f"{path}:11: " in said
    assert "tokens, and there is room for 60 before an answer of rollouts.max_tokens" in said
    kept = read_prompts([DataSpec(path=path, max_bad=0.5)], tokenizer, 60)
    assert (
        kept.per_epoch == 8 and kept.counts[0].set_aside == 3 and any("3 of 11 rows set aside" in n for n in kept.notes)
    )


def test_rows_that_a_reward_cannot_serve_are_named_before_any_answer_is_written(tmp_path: Path, tokenizer: Any) -> None:
    given: list[Any] = [4, ["4", "four"], None, "four"]
    rows = [{"prompt": "2 + 2 =", "answer": answer} for answer in given]
    path = file(tmp_path, rows)
    reward = SumReward(terms=(Term(reward=LengthReward()), Term(reward=NumberReward())))
    with pytest.raises(FettleError) as error:
        read_prompts([DataSpec(path=path)], tokenizer, 60, 0, reward.lack)
    said = str(error.value)
    assert "3 of 4 rows cannot be used as prompts" in said
    assert f"{path}:2: reward 'number': 'answer' has no number in 'four'" in said
    assert f"{path}:3: reward 'number': the row has no 'answer'" in said
    assert reward.lack({"answer": []}) == "reward 'number': the row has no 'answer'"
    with pytest.raises(FettleError, match="needs the column 'anwser' of the data: did you mean 'answer'"):
        read_prompts([DataSpec(path=path)], tokenizer, 60, 0, NumberReward(column="anwser").lack)


@pytest.mark.parametrize(("rows", "said"), [([], "holds no rows"), ([{"text": "a"}], "holds no prompts")])
def test_a_source_without_prompts_is_refused(rows: list[Any], said: str, tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(FettleError, match=said):
        read_prompts([DataSpec(path=file(tmp_path, rows))], tokenizer, 60)


def prompts_of(folder: Path, tokenizer: Any, seed: int = 0, **spec: Any) -> Prompts:
    one = file(folder, [{"prompt": f"a{i}"} for i in range(5)], "one.jsonl")
    two = file(folder, [{"prompt": f"b{i}"} for i in range(3)], "two.jsonl")
    return read_prompts([DataSpec(path=one, **spec), DataSpec(path=two, **spec)], tokenizer, 60, seed)


def test_the_order_is_a_function_of_seed_and_place(tmp_path: Path, tokenizer: Any) -> None:
    prompts, again, other = (prompts_of(tmp_path, tokenizer, seed) for seed in (0, 0, 1))
    order = [prompts.at(i).asked for i in range(24)]
    assert [again.at(i).asked for i in (23, 0, 9, 8)] == [order[i] for i in (23, 0, 9, 8)]
    assert [other.at(i).asked for i in range(24)] != order
    every = {f"a{i}" for i in range(5)} | {f"b{i}" for i in range(3)}
    assert all({*order[i : i + 8]} == every for i in (0, 8, 16)) and order[:8] != order[8:16]


def test_a_cap_bounds_an_epoch(tmp_path: Path, tokenizer: Any) -> None:
    prompts = prompts_of(tmp_path, tokenizer, cap=2)
    assert prompts.per_epoch == 4 and [c.per_epoch for c in prompts.counts] == [2, 2]
    assert "one.jsonl" in str(prompts.describe()) and prompts.longest() <= 3


def test_files_that_are_not_read_are_a_note(tmp_path: Path, tokenizer: Any) -> None:
    file(tmp_path, [{"prompt": "a"}])
    (tmp_path / "more.jsonl.xz").write_bytes(b"packed")
    (note,) = read_prompts([DataSpec(path=str(tmp_path))], tokenizer, 60).notes
    assert note == f"{tmp_path}: not read, since the ending is not known: more.jsonl.xz"


def test_a_source_that_is_never_asked_in_the_first_epoch_is_a_note(tmp_path: Path, tokenizer: Any) -> None:
    one, two = (file(tmp_path, [{"prompt": "a"}] * 9, f"{name}.jsonl") for name in ("one", "two"))
    sources = [DataSpec(path=one, weight=1.0), DataSpec(path=two, weight=0.02)]
    (note,) = (n for n in read_prompts(sources, tokenizer, 60).notes if "its weight" in n)
    assert note.startswith(f"{two}: its weight gives it 0.35 examples an epoch")
