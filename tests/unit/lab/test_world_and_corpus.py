"""The world and its corpus: the same for the same seed, true to the graph, and without a trace of chat."""

import json
import re
from itertools import islice

import pytest

from fettle.lab import World, document, documents, write_corpus
from fettle.lab.corpus import KINDS

WORLD = World.build(0)


def test_world_is_a_function_of_its_seed():
    assert World.build(3).triples == World.build(3).triples
    assert World.build(3).triples != World.build(4).triples


def test_world_has_the_promised_size_and_unambiguous_names():
    assert (len(WORLD.people), len(WORLD.towns), len(WORLD.objects), len(WORLD.jobs)) == (150, 40, 60, 24)
    pairs = [(e.en, e.zh) for group in (WORLD.people, WORLD.towns, WORLD.countries) for e in group] + list(
        WORLD.glossary()
    )
    for side in zip(*pairs):
        assert len(set(side)) == len(side)
    assert [triple.id for triple in WORLD.triples] == list(range(len(WORLD.triples)))


def test_relations_hold_both_ways():
    for triple in WORLD.triples:
        assert WORLD.of(triple.relation, triple.subject) == triple.object
        assert triple.subject in WORLD.who(triple.relation, triple.object)
    for thing in WORLD.objects:
        assert len(WORLD.who("owns", thing)) == 1
    for country in WORLD.countries:
        (capital,) = WORLD.who("capital_of", country)
        assert WORLD.of("located_in", capital) == country
    for person in WORLD.people:
        friend = WORLD.of("friend_of", person)
        assert friend != person and WORLD.of("friend_of", friend) == person


def test_unknown_name_is_named():
    with pytest.raises(KeyError, match="Atlantis"):
        WORLD.named("Atlantis")
    assert WORLD.named("安娜") == WORLD.named("Anna")


def test_documents_are_a_function_of_their_index():
    again = World.build(0)
    assert [document(WORLD, 7, i) for i in range(200)] == [document(again, 7, i) for i in range(200)]
    assert list(islice(documents(WORLD, 7, start=50), 20)) == [document(WORLD, 7, i) for i in range(50, 70)]
    assert document(WORLD, 7, 1) != document(WORLD, 8, 1)


def test_documents_have_no_chat_in_them_and_no_open_template():
    for text in islice(documents(WORLD, 1), 5000):
        assert "<|" not in text and "{" not in text and "None" not in text
        assert not re.search(r"\b(user|assistant|Question|Answer|Instruction|Input|Output|Q|A):", text)
        assert text == text.strip() and 20 <= len(text) <= 8000


def test_a_quarter_is_chinese_and_documents_differ():
    texts = list(islice(documents(WORLD, 2), 4000))
    chinese = sum(len(re.findall(r"[\u4e00-\u9fff]", text)) > 0.4 * len(text) for text in texts)
    assert 0.2 < chinese / len(texts) < 0.33
    assert len(set(texts)) > 0.99 * len(texts)
    assert len(KINDS) >= 25


def test_sums_and_statements_of_the_corpus_are_right():
    sums = 0
    for text in islice(documents(WORLD, 3), 5000):
        for a, op, b, c in re.findall(r"(?<![+\d] )\b(\d+) ([+x-]) (\d+) = (\d+)(?!\d)", text):
            assert int(c) == {"+": int(a) + int(b), "-": int(a) - int(b), "x": int(a) * int(b)}[op], text
            sums += 1
        for low, high in re.findall(r"\b(\d+) is smaller than (\d+)\.", text):
            assert int(low) < int(high)
    assert sums > 1000


def test_homes_told_in_plain_prose_are_those_of_the_graph():
    told = 0
    for text in islice(documents(WORLD, 4), 5000):
        for name, town in re.findall(r"(?:^|[.] )([A-Z][a-z]+) lives in ([A-Z][a-z]+)\.(?! This)", text):
            if name in ("He", "She") or f"{name} lives in {town}. Wrong" in text:
                continue
            assert WORLD.of("lives_in", WORLD.named(name)).en == town, text
            told += 1
    assert told > 200


def test_written_corpus_is_the_same_bytes(tmp_path):
    assert write_corpus(tmp_path / "a.jsonl", WORLD, 0, 300) == 300
    write_corpus(tmp_path / "b.jsonl", World.build(0), 0, 300)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text("utf-8").splitlines()]
    assert rows[5] == {"text": document(WORLD, 0, 5)}
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "b.jsonl"}
