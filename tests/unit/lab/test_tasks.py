"""The instruction tasks: right answers by other means, and nothing held out is ever trained on."""

import random
import re
from collections import Counter

import pytest

from fettle.lab import FAMILIES, HELD_OUT, TRAINED, UNSEEN, Family, World, evaluation, instruction, write_lab
from fettle.lab.lexicon import ANIMALS, COLOURS
from fettle.lab.prose import reviews

WORLD = World.build(0)
ROWS = [instruction(WORLD, 0, index) for index in range(6000)]


def items(name: str, n: int = 200):
    rng = random.Random(name)
    return [FAMILIES[name].make(rng, WORLD) for _ in range(n)]


def test_enough_families_clusters_and_wordings():
    assert len(FAMILIES) >= 24 and len({family.cluster for family in FAMILIES.values()}) >= 8
    assert {family.cluster for family in UNSEEN} == set(HELD_OUT)
    for family in FAMILIES.values():
        assert len(family.phrasings) >= 6 and len(set(family.phrasings)) == len(family.phrasings)


def test_wordings_of_two_families_are_never_the_same():
    """But those of the verification families, which ask the same of different claims."""
    texts = Counter(
        text for family in FAMILIES.values() if family.cluster != "verification" for text in family.phrasings
    )
    assert [text for text, n in texts.items() if n > 1] == []


def test_too_few_wordings_are_refused():
    with pytest.raises(ValueError, match="at least 6"):
        Family("x", "y", "en", ("one",), FAMILIES["add"].make)


def test_instruction_is_a_function_of_its_arguments():
    assert ROWS[:300] == [instruction(World.build(0), 0, index) for index in range(300)]
    assert instruction(WORLD, 1, 0) != instruction(WORLD, 2, 0)


def test_held_out_clusters_and_wordings_are_never_trained_on():
    trained = {row["cluster"] for row in ROWS}
    assert trained.isdisjoint(HELD_OUT) and len(trained) >= 8
    asked = [message["content"] for row in ROWS for message in row["messages"] if message["role"] == "user"]
    unseen = [
        re.compile("".join(".+" if part.startswith("{") else re.escape(part) for part in re.split(r"(\{\w+\})", text)))
        for family in TRAINED
        for text in family.phrasings[-2:]
        if family.name in ("sort", "lives_in", "add", "past", "owner_of")
    ]
    assert not [text for text in asked for pattern in unseen if pattern.fullmatch(text)]


def test_evaluated_items_are_never_trained_on():
    asked = {message["content"] for row in ROWS for message in row["messages"]}
    for family in TRAINED:
        for row in evaluation(WORLD, family, 20):
            assert row["messages"][0]["content"] not in asked


def test_share_of_conversations():
    turns = Counter(len(row["messages"]) for row in ROWS)
    assert set(turns) == {2, 4, 6} and 0.12 < 1 - turns[2] / len(ROWS) < 0.18
    for row in ROWS:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * (len(row["messages"]) // 2)
        assert all(message["content"].strip() and "{" not in message["content"] for message in row["messages"])


def test_one_phrasing_and_one_family():
    rows = [instruction(WORLD, 0, i, families=[FAMILIES["double"]], phrasings=1) for i in range(200)]
    assert all(message["content"].startswith("Double the number") for row in rows for message in row["messages"][::2])


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_evaluation(name):
    family = FAMILIES[name]
    rows = evaluation(WORLD, family, 12, seed=5)
    assert rows == evaluation(WORLD, family, 12, seed=5) and rows
    assert len({row["messages"][0]["content"] for row in rows}) == len(rows) <= 12
    for row in rows:
        assert set(row) == {"messages", "answer", "family", "cluster", "metric"} and row["metric"] == "exact"
        assert row["answer"] == row["answer"].strip() and len(row["answer"].split()) <= 12
    assert evaluation(WORLD, family, 3, unseen_wording=True)


@pytest.mark.parametrize("name,answer", [
    ("add", lambda s: int(s["a"]) + int(s["b"])), ("subtract", lambda s: int(s["a"]) - int(s["b"])), ("double", lambda s: int(s["a"]) * 2),
    ("times", lambda s: int(s["a"]) * int(s["b"])), ("larger", lambda s: max(int(s["a"]), int(s["b"]))), ("smaller", lambda s: min(int(s["a"]), int(s["b"]))),
    ("greater", lambda s: "yes" if int(s["a"]) > int(s["b"]) else "no"), ("parity", lambda s: ("even", "odd")[int(s["a"]) % 2]), ("zh_add", lambda s: int(s["a"]) + int(s["b"])),
    ("sort", lambda s: ", ".join(sorted(s["list"].split(", ")))), ("reverse", lambda s: ", ".join(reversed(s["list"].split(", ")))),
    ("count", lambda s: s["list"].count(",") + 1), ("zh_count", lambda s: s["list"].count("、") + 1), ("first", lambda s: s["list"].split(", ")[0]),
    ("last", lambda s: s["list"].split(", ")[-1]), ("second", lambda s: s["list"].split(", ")[1]), ("zh_first", lambda s: s["list"].split("、")[0]),
    ("zh_last", lambda s: s["list"].split("、")[-1]), ("contains", lambda s: "yes" if s["word"] in s["list"].split(", ") else "no"),
    ("uppercase", lambda s: s["word"].upper()), ("repeat", lambda s: " ".join([s["word"]] * int(s["n"]))),
    ("to_chinese", lambda s: dict(WORLD.glossary())[s["word"]]), ("to_english", lambda s: {zh: en for en, zh in WORLD.glossary()}[s["word"]]),
    ("name_to_chinese", lambda s: WORLD.named(s["name"]).zh), ("language", lambda s: "English" if s["name"].isascii() else "Chinese"),
    ("true_sum", lambda s: "yes" if eval(s["claim"].replace("=", "==")) else "no"),
    ("find_color", lambda s: next(c.en for c in COLOURS if f" {c.en} " in s["text"])), ("find_number", lambda s: re.search(r"\d+", s["text"]).group()),
    ("find_person", lambda s: next(p.en for p in WORLD.people if re.search(rf"\b{p.en}\b", s["text"]))),
    ("find_place", lambda s: next(t.en for t in WORLD.towns if t.en in s["text"])),
    ("kind_of_word", lambda s: "animal" if s["name"] in [a.en for a in ANIMALS] else "food"),
    ("kind_of_name", lambda s: {"town": "place"}.get(WORLD.named(s["name"]).kind, WORLD.named(s["name"]).kind)),
])  # fmt: skip
def test_answers_are_right(name, answer):
    for slots, given in items(name):
        assert given == str(answer(slots)), slots


@pytest.mark.parametrize(
    "relation", ["lives_in", "born_in", "works_as", "keeps", "friend_of", "color_of", "made_of", "located_in"]
)
def test_facts_are_those_of_the_graph(relation):
    for slots, given in items(relation):
        assert WORLD.of(relation, WORLD.named(slots["s"])).en in given.rstrip(".").split()


def test_facts_backward_and_in_chinese():
    for slots, given in items("owner_of"):
        assert given == f"{WORLD.who('owns', WORLD.named(slots['s']))[0].en} owns the {slots['s']}."
    for slots, given in items("capital_of"):
        assert WORLD.of("capital_of", WORLD.named(given.split()[-1].rstrip("."))).en == slots["s"]
    for name, relation in (("zh_lives_in", "lives_in"), ("zh_works_as", "works_as"), ("zh_color_of", "color_of")):
        for slots, given in items(name):
            assert WORLD.of(relation, WORLD.named(slots["s"])).zh in given


def test_claims_are_judged_by_the_graph():
    seen = Counter()
    for slots, given in items("true_person", 500):
        if match := re.fullmatch(r"(\w+) lives in (\w+)", slots["claim"]):
            assert (WORLD.of("lives_in", WORLD.named(match[1])).en == match[2]) == (given == "yes")
            seen[given] += 1
    assert min(seen.values()) > 10


def test_sentiment_agrees_with_the_words_of_the_review():
    bad = [text.lower() for text in (*reviews.BAD, *reviews.BAD_FOOD, *reviews.BAD_VISIT)]
    for slots, given in items("sentiment"):
        assert any(text in slots["text"].lower() for text in bad) == (given == "negative")


def test_stories_name_their_people():
    for name in ("who_has", "who_gave", "not_there"):
        for slots, given in items(name):
            assert len(re.findall(rf"\b{given}\b", slots["text"])) >= 1
    for slots, given in items("who_has"):
        assert f"gave {given}" in slots["text"] or f"to {given}." in slots["text"] or f"{given} took" in slots["text"]


def test_swapped_and_past_sentences():
    for slots, given in items("swap_names"):
        left, verb, right = slots["text"].rstrip(".").split()
        assert given == f"{right} {verb} {left}."
    for slots, given in items("past"):
        assert given.split()[0] == slots["text"].split()[0] and given.split()[1] != slots["text"].split()[1]


@pytest.mark.parametrize(
    "name",
    ["greater", "contains", "happy", "sentiment", "better_review", "true_person", "true_sum", "zh_review", "parity"],
)
def test_choices_are_balanced(name):
    shares = Counter(answer for _, answer in items(name, 600))
    assert len(shares) == 2 and min(shares.values()) > 200


def test_written_lab_is_the_same_bytes(tmp_path):
    written = write_lab(tmp_path / "a", 0, documents=50, instructions=80, heldout=20, each=3, preferences=30)
    write_lab(tmp_path / "b", 0, documents=50, instructions=80, heldout=20, each=3, preferences=30)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert sorted(str(file.with_suffix("")) for file in files) == sorted(written)
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert written["heldout"] == 20 and written["tasks/heldout"] == 3 * len(UNSEEN)
