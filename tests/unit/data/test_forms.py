"""Rows for encoders with heads and for encoder-decoders: what becomes of them, and every way in which they can be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fettle.core.batch import IGNORE
from fettle.core.errors import FettleError
from fettle.data import DataSpec, prepare
from fettle.data.forms import last_special
from fettle.data.labelled import Labelled
from fettle.data.names import label_names
from fettle.data.pairs import Pairs
from fettle.data.preference import Preference
from fettle.data.tagged import Tagged
from fettle.data.template import Encoder
from fettle.models.encdec import JOIN
from small import byte_level, rows, unigram, wordpiece

NAMES = ("negative", "positive")


def corpus(path: Path, values: list[dict[str, Any]], form: Any, tokenizer: Any, length: int = 64, **spec: Any) -> Any:
    file = rows(path / "data.jsonl", values)
    return prepare([DataSpec(path=str(file), **spec)], tokenizer, length, cache=path / "cache", form=form)


def test_texts_and_pairs_of_texts_are_dressed_as_the_tokenizer_does(tmp_path: Path) -> None:
    words = wordpiece()
    made = corpus(tmp_path, [
        {"text": "the soup was good", "label": "positive"},
        {"text": "the soup", "text_pair": "was bad", "label": 0, "weight": 0.5},
    ], Labelled(NAMES, typed=True), words)  # fmt: skip
    assert made.counts[0].learned == 2 and made.counts[0].format == "labelled"
    batch = made.batch(0)
    found = {
        int(label): (s, w)
        for (label,), s, w in zip(batch.extra["labels"], batch.segments, batch.extra["label_weights"])
    }
    for label, (text, weight) in {1: (("the soup was good",), 1.0), 0: (("the soup", "was bad"), 0.5)}.items():
        segment, w = found[label]
        wanted = words(*text, return_token_type_ids=True)
        assert batch.tokens[segment.start : segment.stop].tolist() == wanted["input_ids"]
        assert batch.extra["types"][segment.start : segment.stop].tolist() == wanted["token_type_ids"]
        assert not segment.causal and float(w) == weight
    assert bool((batch.targets == IGNORE).all())


@pytest.mark.parametrize(
    ("label", "form", "said"),
    [
        ("postive", Labelled(NAMES), "unknown label 'postive': did you mean 'positive'?"),
        ("²", Labelled(NAMES), "unknown label '²'"),
        (2, Labelled(NAMES), "label 2, and there are 2 labels (0 to 1: negative, positive)"),
        (["positive"], Labelled(NAMES), "say model.multi: true"),
        (0.5, Labelled(NAMES), "a label must be a name or a number, found 0.5"),
        ("high", Labelled(("score",)), "must be a number to predict, found 'high'"),
        (["positive", "good"], Labelled(NAMES, multi=True), "unknown label 'good'"),
        (None, Labelled(NAMES), "'label' is null"),
    ],
)
def test_a_bad_label_is_a_sentence_with_its_line(label: Any, form: Labelled, said: str, tmp_path: Path) -> None:
    good = {"text": "fine", "label": 0 if len(form.names) > 1 else 0.25}
    with pytest.raises(FettleError) as error:
        corpus(tmp_path, [good, {"text": "fine", "label": label}], form, wordpiece())
    assert "data.jsonl:2: " in str(error.value) and said in str(error.value)


@pytest.mark.parametrize(("label", "form", "numbers"), [
    ("1", Labelled(NAMES), (1.0,)), (True, Labelled(NAMES), (1.0,)), (1.0, Labelled(NAMES), (1.0,)),
    ("2.5", Labelled(("score",)), (2.5,)), (["positive"], Labelled(NAMES, multi=True), (0.0, 1.0)), ([], Labelled(NAMES, multi=True), (0.0, 0.0)),
])  # fmt: skip
def test_labels_as_numbers(label: Any, form: Labelled, numbers: tuple[float, ...]) -> None:
    assert form.numbers(label) == numbers


@pytest.mark.parametrize("tokenizer", [wordpiece(), byte_level()], ids=["wordpiece", "byte-level"])
def test_only_the_first_piece_of_a_word_is_learned(tokenizer: Any, tmp_path: Path) -> None:
    row = {"tokens": ["Ada", "lives", "in", "Samarkand"], "tags": ["B-PER", "O", "O", "B-LOC"]}
    form = Tagged(("O", "B-LOC", "B-PER"))
    batch = corpus(tmp_path, [row], form, tokenizer).batch(0)
    learned = [(int(t), int(m)) for t, m in zip(batch.tokens, batch.targets, strict=True) if m != IGNORE]
    assert [m for _, m in learned] == [2, 0, 0, 1] and batch.weights.sum() == 4
    text = tokenizer.decode(batch.tokens[: batch.segments[0].stop], skip_special_tokens=True)
    assert text.lower() == "ada lives in samarkand"  # also where the tokenizer keeps the spaces before words
    plain = Encoder(tokenizer).fast.encode("Ada lives in Samarkand", add_special_tokens=True)
    assert batch.tokens[: batch.segments[0].stop].tolist() == plain.ids


@pytest.mark.parametrize(("row", "said"), [
    ({"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens and 1 tags; each token needs one"),
    ({"tokens": ["a"], "tags": ["B-ORG"]}, "tag 1: unknown label 'B-ORG'"),
    ({"tokens": [" "], "tags": ["O"]}, "holds something that is no word"),
    ({"tokens": "a b", "tags": ["O"]}, "'tokens' must be a list, found a text"),
    ({"tokens": [], "tags": []}, "'tokens' is empty"),
])  # fmt: skip
def test_bad_tags_are_sentences(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(FettleError) as error:
        corpus(tmp_path, [{"tokens": ["a"], "tags": ["O"]}, row], Tagged(("O", "B-PER")), wordpiece())
    assert "data.jsonl:2: " in str(error.value) and said in str(error.value)


def test_a_cut_keeps_the_closing_token(tmp_path: Path) -> None:
    words = wordpiece()
    text = {"text": "one two three four five", "label": 1}
    made = corpus(tmp_path, [text], Labelled(NAMES, longest=5, end=last_special(words)), words, long="truncate")
    batch = made.batch(0)
    assert batch.segments[0].stop == 5 and int(batch.tokens[4]) == words.sep_token_id and made.counts[0].cut == 1
    row = {"tokens": ["one", "two", "three"], "tags": [1, 1, 1]}
    (tmp_path / "t").mkdir()
    batch = corpus(tmp_path / "t", [row], Tagged(("O", "X"), longest=3, end=3), words, long="truncate").batch(0)
    assert int(batch.tokens[2]) == 3 and batch.targets[:3].tolist() == [IGNORE, 1, IGNORE]


def test_names_are_collected(tmp_path: Path) -> None:
    def names(values: list[dict[str, Any]], task: str = "classify", multi: bool = False) -> tuple[str, ...]:
        return label_names([DataSpec(path=str(rows(tmp_path / "x.jsonl", values)))], task, multi)

    assert names([{"text": "a", "label": x} for x in ("yes", "no", "yes")]) == ("no", "yes")
    assert names([{"text": "a", "label": x} for x in (0, 2)]) == ("0", "1", "2")
    assert names([{"text": "a", "label": x} for x in (0.5, 2)]) == ("score",)
    assert names([{"text": "a", "labels": ["b", "c"]}, {"text": "a", "labels": []}], multi=True) == ("b", "c")
    assert names([{"tokens": ["a", "b"], "tags": ["B-X", "O"]}], "tag") == ("O", "B-X")
    for values, said in (
        ([{"text": "a", "label": "b"}, {"text": "a", "label": 1}], "some are numbers"),
        ([{"text": "a"}], "no labels were found"),
    ):
        with pytest.raises(FettleError, match=said):
            names(values)


def test_sources_and_targets(tmp_path: Path) -> None:
    words = unigram()
    words.chat_template = JOIN
    talk = [{"role": "user", "content": "count"}, {"role": "assistant", "content": "one"}, {"role": "user", "content": "more"},
            {"role": "assistant", "content": "two"}]  # fmt: skip
    made = corpus(tmp_path, [{"messages": talk}], Pairs.of(words, None), words)
    assert any("no chat template" in note for note in made.notes)
    batch = made.batch(0)
    source, target = batch.segments[:2]
    assert (source.causal, target.causal, target.parent) == (False, True, 0)
    assert batch.tokens[source.start : source.stop].tolist() == words("count\n\none\n\nmore")["input_ids"]
    assert batch.tokens[target.start : target.stop].tolist() == words("two")["input_ids"]
    learned = batch.targets[source.stop - 1 : target.stop - 1]
    assert learned.tolist() == batch.tokens[target.start : target.stop].tolist()
    assert int((batch.targets != IGNORE).sum()) == target.stop - target.start
    assert made.counts[0].learned == target.stop - target.start and made.counts[0].template == "join"


def test_bart_dresses_both_sides(tmp_path: Path) -> None:
    words = byte_level()
    batch = corpus(tmp_path, [{"prompt": "count", "completion": "one two"}], Pairs.of(words, None), words).batch(0)
    for segment, text in zip(batch.segments, ("count", "one two"), strict=False):
        assert batch.tokens[segment.start : segment.stop].tolist() == words(text)["input_ids"]


@pytest.mark.parametrize(("values", "form", "spec", "said"), [
    ([{"text": "a"}], Pairs.of(unigram(), None), {}, "no source and target"),
    ([{"prompt": "a", "completion": "b"}], Pairs.of(unigram(), None), {"learn": "all"}, "learn: all has no meaning"),
    ([{"prompt": " ", "completion": "b"}], Pairs.of(unigram(), None), {}, "the encoder would have nothing to read"),
    ([{"prompt": "one two three", "completion": "b"}], Pairs.of(unigram(), 2), {}, "the model sees 2 at most"),
    ([{"prompt": "a", "completion": "b"}], Labelled(NAMES), {}, "needs rows with the columns label and text; found completion, prompt"),
    ([{"text": "a", "label": 1}], None, {"format": "labelled"}, "are for a model with task: classify"),
])  # fmt: skip
def test_rows_of_another_kind_are_refused(
    values: list[dict[str, Any]], form: Any, spec: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(FettleError, match=said):
        corpus(tmp_path, values, form, unigram(), **spec)


TALK = [{"role": "user", "content": "count"}, {"role": "assistant", "content": "one two"}]


@pytest.mark.parametrize(("row", "form"), [
    ({"text": "one two"}, None),
    ({"prompt": "count", "completion": "one two"}, None),
    ({"messages": TALK}, None),
    ({"prompt": "count", "completion": "one two"}, Pairs.of(wordpiece(), None)),
    ({"messages": TALK}, Pairs.of(wordpiece(), None)),
    ({"text": "one two", "label": 1}, Labelled(NAMES)),
    ({"tokens": ["one", "two"], "tags": [1, 0]}, Tagged(NAMES)),
    ({"prompt": "count", "chosen": "one two", "rejected": "two"}, Preference()),
    ({"prompt": "count", "completion": "one two", "label": True}, Preference(compared=False)),
])  # fmt: skip
def test_a_row_of_weight_0_teaches_nothing(row: dict[str, Any], form: Any, tmp_path: Path) -> None:
    words = wordpiece()
    words.chat_template = JOIN
    values = [row | {"weight": weight} for weight in (0, 0.5, 0)]
    (counts,) = corpus(tmp_path, values, form, words, max_bad=0.7).counts
    assert (counts.read, counts.kept, counts.set_aside) == (3, 1, 2) and counts.learned > 0
    with pytest.raises(FettleError, match="none of its 1 rows can be used|1 of 1 rows cannot be used"):
        corpus(tmp_path, values[:1], form, words)


def test_a_template_gives_text_and_label(tmp_path: Path) -> None:
    made = corpus(
        tmp_path,
        [{"review": "good", "stars": "positive"}],
        Labelled(NAMES),
        wordpiece(),
        template="{{ review }} ||| {{ stars }}",
    )
    assert made.batch(0).extra["labels"].tolist() == [[1.0]]
