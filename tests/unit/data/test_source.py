"""A corpus from end to end: counts that add up, the cache, batches by index, and every kind of bad row."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fettle.core import FettleError
from fettle.core.batch import IGNORE
from fettle.data import DataSpec, build, prepare, read, source
from fettle.data.units import Limit

WORDS = "the baker sells bread in the morning and cakes in the afternoon".split()


def text_of(i: int) -> str:
    return " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 3 + i % 17)) + f" {i}"


def jsonl(path: Path, rows: list) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def texts(path: Path, count: int = 40) -> str:
    return jsonl(path, [{"text": text_of(i)} for i in range(count)])


def talks(path: Path, count: int = 40) -> str:
    return jsonl(path, [{"instruction": f"q {i}", "input": "", "output": text_of(i)} for i in range(count)])


def words(batch, tokenizer) -> list[str]:
    """What each named segment says."""
    return [
        tokenizer.decode(batch.tokens[s.start : s.stop]) for s, n in zip(batch.segments, batch.names, strict=True) if n
    ]


def test_one_epoch_holds_every_row_once(tmp_path: Path, tokenizer) -> None:
    path = texts(tmp_path / "a.jsonl")
    corpus = prepare([DataSpec(path=path)], tokenizer, 128)
    batches = [corpus.batch(i) for i in range(corpus.batches(0))]
    assert sorted(w for b in batches for w in words(b, tokenizer)) == sorted(
        text_of(i) + "<|im_end|>" for i in range(40)
    )
    assert sorted(n for b in batches for n in b.names if n) == sorted(f"{path}:{i + 1}" for i in range(40))
    assert all(len(b.tokens) == 128 for b in batches)
    (counts,) = corpus.counts
    assert (counts.read, counts.kept, counts.set_aside, counts.examples, counts.format) == (40, 40, 0, 40, "text")
    assert counts.learned == sum(int((b.targets != IGNORE).sum()) for b in batches)
    assert counts.tokens == sum(b.useful for b in batches)
    assert corpus.fill(0) > 0.9


def test_batches_are_a_pure_function_of_seed_and_index(tmp_path: Path, tokenizer) -> None:
    specs = [DataSpec(path=texts(tmp_path / "a.jsonl")), DataSpec(path=talks(tmp_path / "b.jsonl"))]
    one, two = (prepare(specs, tokenizer, 128, seed=3, cache=tmp_path / "cache") for _ in range(2))
    n = one.batches(0) + one.batches(1) + 3
    forward = [one.batch(i) for i in range(n)]
    for i in reversed(range(n)):
        again = two.batch(i)
        assert torch.equal(again.tokens, forward[i].tokens) and torch.equal(again.weights, forward[i].weights)
        assert again.names == forward[i].names and again.segments == forward[i].segments
    assert [one.epoch_of(i) for i in (0, one.batches(0) - 1, one.batches(0), n - 1)] == [0, 0, 1, 2]
    other = prepare(specs, tokenizer, 128, seed=4, cache=tmp_path / "cache")
    assert any(not torch.equal(other.batch(i).tokens, forward[i].tokens) for i in range(3))
    assert not torch.equal(forward[0].tokens, forward[one.batches(0)].tokens)


def test_packed_and_unpacked_hold_the_same(tmp_path: Path, tokenizer) -> None:
    path = talks(tmp_path / "a.jsonl")
    packed, single = (prepare([DataSpec(path=path)], tokenizer, 160, packing=p) for p in (True, False))
    assert single.batches(0) == 40 > packed.batches(0)
    both = [sorted(w for i in range(c.batches(0)) for w in words(c.batch(i), tokenizer)) for c in (packed, single)]
    assert both[0] == both[1]
    learned = [sum(c.batch(i).weights.sum().item() for i in range(c.batches(0))) for c in (packed, single)]
    assert learned[0] == learned[1] == packed.counts[0].learned


@pytest.mark.parametrize("length", [2, 3, 16, 17, 1000])
def test_long_texts_lose_nothing(tmp_path: Path, tokenizer, length: int) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": " ".join(text_of(i) for i in range(n))} for n in range(1, 9)])
    corpus = prepare([DataSpec(path=path)], tokenizer, length)
    (counts,) = corpus.counts
    assert counts.read == counts.kept == 8 and counts.cut == 0
    seen: dict[str, dict[int, int]] = {}
    for i in range(corpus.batches(0)):
        batch = corpus.batch(i)
        for segment, name in zip(batch.segments, batch.names, strict=True):
            base, _, start = name.partition("@")
            for at in range(segment.start, segment.stop - 1 if name else segment.start):
                assert batch.targets[at] == batch.tokens[at + 1]
                place = int(start or 0) + at - segment.start + 1
                assert place not in seen.setdefault(base, {}), "each token is learned once"
                seen[base][place] = int(batch.targets[at])
    lengths = [
        len(tokenizer(" ".join(text_of(i) for i in range(n)), add_special_tokens=False)["input_ids"])
        for n in range(1, 9)
    ]
    assert sorted(len(found) for found in seen.values()) == sorted(
        lengths
    )  # all but the first token, and the end token
    assert counts.learned == sum(lengths)


def test_long_conversations_by_policy(tmp_path: Path, tokenizer) -> None:
    rows = [{"instruction": "q", "output": "bread " * n} for n in (1, 2, 60, 70)]
    rows.append({"instruction": "why " * 80, "output": "so"})
    path = jsonl(tmp_path / "a.jsonl", rows)
    dropped = prepare([DataSpec(path=path)], tokenizer, 64, cache=tmp_path / "c")
    (counts,) = dropped.counts
    assert (counts.read, counts.kept, counts.set_aside, counts.too_long, counts.cut) == (5, 2, 3, 3, 0)
    assert any("3 rows are longer than 64 tokens" in note for note in dropped.notes)
    (listed,) = (tmp_path / "c").glob("*.over-64.jsonl")
    assert [json.loads(line)["where"] for line in listed.read_text().splitlines()] == [f"{path}:{i}" for i in (3, 4, 5)]
    (counts,) = prepare([DataSpec(path=path, long="truncate")], tokenizer, 64, cache=tmp_path / "c").counts
    assert (counts.kept, counts.set_aside, counts.too_long, counts.cut) == (4, 1, 1, 2)
    with pytest.raises(
        FettleError, match=r"a.jsonl:3: \d+ tokens are more than 64 tokens; 3 of 5 examples are; raise batch.tokens, or"
    ):
        prepare([DataSpec(path=path, long="error")], tokenizer, 64)
    with pytest.raises(FettleError, match="all of its 5 examples are longer"):
        prepare([DataSpec(path=path)], tokenizer, 8)


@pytest.mark.parametrize(
    ("row", "context", "window"),
    [
        (1024, None, 1024), (1024, 4096, 1024), (1024, 1024, 1024), (2048, 1024, 1024), (1024, 1004, 1004), (1025, 1024, 1024),
        (4096, 4092, 4092), (2048, 412, 409), (1536, 1024, 768), (2048, 5, 5),
    ],
)  # fmt: skip
def test_windows_are_long_and_fill_a_row(row: int, context: int | None, window: int) -> None:
    limit = Limit(row, context)
    assert limit.window == window <= limit.tokens and row // window * window >= 0.9 * row


def test_no_example_is_longer_than_what_the_model_sees(tmp_path: Path, tokenizer) -> None:
    """A row may be longer than the model's context, an example in it may not: texts go on in the next window."""
    talk = jsonl(tmp_path / "a.jsonl", [{"instruction": "q", "output": "bread " * n} for n in (1, 2, 60)])
    text = jsonl(tmp_path / "b.jsonl", [{"text": "bread " * 90}, {"text": text_of(1)}])
    specs = [DataSpec(path=talk), DataSpec(path=text, format="text")]
    corpus, wide = (prepare(specs, tokenizer, 256, cache=tmp_path / "c", context=bound) for bound in (48, None))
    assert {int(corpus.batch(i).positions.max()) + 1 for i in range(4)} == {48}
    assert corpus.counts[1].learned == wide.counts[1].learned and corpus.counts[1].examples > wide.counts[1].examples
    assert corpus.counts[0].too_long == 1 and wide.counts[0].too_long == 0
    assert any("1 rows are longer than 48 tokens, all that the model sees and were left" in n for n in corpus.notes)
    with pytest.raises(
        FettleError, match="are more than 48 tokens, all that the model sees; 1 of 3 examples are; say long"
    ):
        prepare([DataSpec(path=talk, long="error")], tokenizer, 256, context=48)


def test_cut_examples_count_what_is_left(tmp_path: Path, tokenizer) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"instruction": "q", "output": "bread " * 70}])
    corpus = prepare([DataSpec(path=path, long="truncate")], tokenizer, 64)
    batch = corpus.batch(0)
    assert corpus.counts[0].learned == int((batch.targets != IGNORE).sum()) and corpus.counts[0].tokens == 64


class Counted:
    """How often the encoder ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.built = 0
        real = build._build

        def counting(*args):
            self.built += 1
            return real(*args)

        monkeypatch.setattr(build, "_build", counting)


def test_cache(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    path, cache = talks(tmp_path / "a.jsonl"), tmp_path / "cache"

    def made(length=128, **keys) -> int:
        prepare([DataSpec(path=path, **keys)], tokenizer, length, cache=cache)
        return counted.built

    assert made() == 1 and made() == 1 and made(length=64) == 1 and made(weight=2.0) == 1 and made(long="truncate") == 1
    assert made(learn="all") == 2 and made(limit=5) == 3
    os.utime(path)
    assert made() == 3, "the content counts, not the time"
    with open(path, "a") as handle:
        handle.write('{"instruction": "x", "output": "y"}\n')
    assert made() == 4
    tokenizer_template = tokenizer.chat_template
    try:
        tokenizer.chat_template = tokenizer_template.replace("\\n", " \\n")
        assert made() == 5
    finally:
        tokenizer.chat_template = tokenizer_template
    assert made() == 5


@pytest.mark.parametrize("name", ["tokens.bin", "spans.npy", "manifest.json"])
def test_a_damaged_cache_is_made_anew(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    counted = Counted(monkeypatch)
    specs, cache = [DataSpec(path=talks(tmp_path / "a.jsonl"))], tmp_path / "cache"
    before = prepare(specs, tokenizer, 128, cache=cache).batch(0)
    (file,) = cache.glob(f"*/{name}")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    after = prepare(specs, tokenizer, 128, cache=cache).batch(0)
    assert counted.built == 2 and torch.equal(before.tokens, after.tokens)
    assert prepare(specs, tokenizer, 128, cache=cache) and counted.built == 2


def test_a_build_that_fails_leaves_no_store(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    specs, cache = [DataSpec(path=talks(tmp_path / "a.jsonl"))], tmp_path / "cache"
    monkeypatch.setattr(build._Build, "check", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(specs, tokenizer, 128, cache=cache)
    assert not [p for p in cache.iterdir() if p.is_dir()]


def test_without_a_cache_nothing_stays(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "aside"
    monkeypatch.setattr(source.tempfile, "mkdtemp", lambda prefix: str(folder))
    corpus = prepare([DataSpec(path=texts(tmp_path / "a.jsonl"))], tokenizer, 64)
    assert folder.exists()
    del corpus
    assert not folder.exists()


ROOT = Path(__file__).parents[3]
TEMPORARY = """
import os, pathlib, sys
sys.path[:0] = sys.argv[3:]
from conftest import small_tokenizer
from fettle.core import FettleError
from fettle.data import DataSpec, prepare
kept = []
for path in sys.argv[1:3]:
    try:
        kept.append(prepare([DataSpec(path=path, format="text")], small_tokenizer(), 64))
    except FettleError as error:
        print(error)
        named = str(error).rpartition("with reasons: ")[2].split(" (")[0]
        assert "until this process ends" in str(error) and pathlib.Path(named).is_file(), named
print(len(list(pathlib.Path(os.environ["TMPDIR"]).glob("fettle-data-*"))))
{end}
"""


@pytest.mark.parametrize("end", ["", "raise RuntimeError('lost')", "sys.exit(3)"])
def test_without_a_cache_nothing_stays_after_the_process(tmp_path: Path, end: str) -> None:
    good, bad = texts(tmp_path / "a.jsonl"), jsonl(tmp_path / "b.jsonl", [{"text": "a"}, "no row", "none"])
    (tmp_path / "temporary").mkdir()
    script = [sys.executable, "-c", TEMPORARY.replace("{end}", end), good, bad, str(ROOT / "tests"), str(ROOT / "src")]
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary")}
    done = subprocess.run(script, check=False, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["2"], done.stderr
    assert not list((tmp_path / "temporary").iterdir())


BAD = [
    '{"text": "a',
    "[]",
    '{"text": null}',
    '{"txt": "a"}',
    '{"text": ""}',
    '{"text": NaN}',
    '{"text": 5}',
    '{"text": "a", "text": "b"}',
    '{"text": "\\ud800"}',
]


def test_bad_rows_are_set_aside(tmp_path: Path, tokenizer) -> None:
    rows: list = [{"text": text_of(i)} for i in range(30)]
    for i, bad in enumerate(BAD):
        rows.insert(3 * i, bad)
    path = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(FettleError) as caught:
        prepare([DataSpec(path=path, format="text")], tokenizer, 64, cache=tmp_path / "c")
    message = str(caught.value)
    assert "9 of 39 rows cannot be used, more than max_bad: 0.01 allows" in message and "max_bad: 0.231" in message
    assert f"{path}:1: not valid JSON" in message and f"{path}:13: 'text' is empty" in message
    aside = Path(message.rpartition("with reasons: ")[2])
    assert len(aside.read_text().splitlines()) == 9
    corpus = prepare([DataSpec(path=path, format="text", max_bad=0.231)], tokenizer, 64, cache=tmp_path / "c")
    (counts,) = corpus.counts
    assert (counts.read, counts.kept, counts.set_aside) == (39, 30, 9)
    (file,) = (tmp_path / "c").glob("*/set_aside.jsonl")
    listed = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["where"] for row in listed] == [f"{path}:{3 * i + 1}" for i in range(9)]
    assert listed[0]["row"] == BAD[0] and listed[4]["row"] == {"text": ""} and all(row["reason"] for row in listed)
    assert any("9 of 39 rows set aside" in note and str(file) in note for note in corpus.notes)


def test_rows_that_the_template_refuses_are_set_aside(tmp_path: Path, tokenizer) -> None:
    strict = deepcopy(tokenizer)
    strict.chat_template = (
        "{% if messages[0].content == 'q 7' %}{{ raise_exception('no sevens') }}{% endif %}" + tokenizer.chat_template
    )
    corpus = prepare([DataSpec(path=talks(tmp_path / "a.jsonl"), max_bad=0.1)], strict, 128)
    assert (corpus.counts[0].kept, corpus.counts[0].set_aside) == (39, 1)
    assert any("a.jsonl:8: the template refuses it: no sevens" in note for note in corpus.notes)


def test_one_object_over_many_lines_is_no_rows(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"text": "one"}]}, indent=1))
    with pytest.raises(FettleError, match=r"a\.json: one JSON object over many lines; rows are read from a list"):
        prepare([DataSpec(path=str(tmp_path / "a.json"))], tokenizer, 64)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "holds no rows|no row can be read"),
        ("nonsense\n", "no row can be read"),
        ('{"a": 1}\n', "columns found .a."),
        ('{"text": 5}\n', "1 of 1 rows cannot"),
    ],
)
def test_useless_files(tmp_path: Path, tokenizer, content: str, reason: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(FettleError, match=reason):
        prepare([DataSpec(path=str(tmp_path / "a.jsonl"))], tokenizer, 64)


def test_own_templates(tmp_path: Path, tokenizer) -> None:
    rows = [{"q": f"why {i}?", "a": text_of(i)} for i in range(10)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    chat = prepare([DataSpec(path=path, template="Say: {{ q }} ||| {{ a }}")], tokenizer, 512)
    assert "<|im_start|>user\nSay: why 3?<|im_end|>\n<|im_start|>assistant\n" + text_of(3) in "".join(
        words(chat.batch(0), tokenizer)
    )
    raw = prepare([DataSpec(path=path, template="{{ q }} ||| {{ a }}", chat=False)], tokenizer, 512)
    assert "why 3?" + text_of(3) + "<|im_end|>" in words(raw.batch(0), tokenizer)
    text = prepare([DataSpec(path=path, template="{{ q }} = {{ a }}")], tokenizer, 8)
    assert text.counts[0].examples > 10 and text.counts[0].kept == 10  # cut into windows, nothing lost
    with pytest.raises(FettleError, match="'b' is undefined"):
        prepare([DataSpec(path=path, template="{{ q }} ||| {{ b }}")], tokenizer, 512)
    with pytest.raises(FettleError, match="not valid Jinja"):
        prepare([DataSpec(path=path, template="{{ q }")], tokenizer, 512)
    with pytest.raises(FettleError, match="part after '|||' is empty"):
        prepare([DataSpec(path=path, template="{{ q }} ||| {{ '' }}")], tokenizer, 512)
    with pytest.raises(FettleError, match="does not end within|memory"):
        prepare([DataSpec(path=path, template="{{ q * 900000000 }}", limit=1)], tokenizer, 512)


def test_mixture_by_weight_and_by_cap(tmp_path: Path, tokenizer) -> None:
    a, b = texts(tmp_path / "a.jsonl", 90), talks(tmp_path / "b.jsonl", 10)
    weighted = prepare([DataSpec(path=a, weight=1.0), DataSpec(path=b, weight=3.0)], tokenizer, 128)
    assert [c.per_epoch for c in weighted.counts] == [25, 75]
    names = [n for i in range(weighted.batches(0)) for n in weighted.batch(i).names if n]
    assert len(names) == 100 and sum(n.startswith(b) for n in names) == 75
    assert sum(c.share for c in weighted.counts) == pytest.approx(1)
    assert not any("its weight" in note for note in weighted.notes)
    rare = prepare([DataSpec(path=a, weight=1.0), DataSpec(path=b, weight=0.001)], tokenizer, 128)
    assert [c.per_epoch for c in rare.counts] == [100, 0] and f"{b}: its weight gives it 0.1 examples" in rare.notes[-1]
    capped = prepare([DataSpec(path=a, cap=20), DataSpec(path=b, cap=20)], tokenizer, 128)
    assert [c.per_epoch for c in capped.counts] == [20, 10]
    assert len(capped.examples(5)) == 5 and {e.name.rpartition(":")[0] for e in capped.examples(2)} == {a, b}


def test_names_tell_the_line(tmp_path: Path, tokenizer) -> None:
    rows = [{"instruction": f"q {i}", "output": text_of(i)} for i in range(20)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, indent=2))
    corpus = prepare([DataSpec(path=str(path))], tokenizer, 256)
    lines = path.read_text().splitlines()
    for example in corpus.examples(20):
        line = int(example.name.rpartition(":")[2])
        number = json.loads("".join(lines[line - 1 : line + 3]).rstrip(","))["instruction"]
        assert number + "<|im_end|>" in tokenizer.decode(example.nodes[0].tokens)


def test_weights_of_rows_reach_the_batch(tmp_path: Path, tokenizer) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "one two", "weight": 0.25}])
    batch = prepare([DataSpec(path=path)], tokenizer, 32).batch(0)
    assert set(batch.weights[batch.targets != IGNORE].tolist()) == {0.25}


def test_folders_and_compression_make_one_source(tmp_path: Path, tokenizer) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    texts(folder / "a.jsonl", 5)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "zipped"}).encode()))
    cache = tmp_path / "cache"
    assert not any(
        "not read" in note for note in prepare([DataSpec(path=str(folder))], tokenizer, 256, cache=cache).notes
    )
    (folder / "README.md").write_text("# A card\n\nNo row.\n")
    corpus = prepare([DataSpec(path=str(folder))], tokenizer, 256, cache=cache)
    assert corpus.counts[0].kept == 6 and len([p for p in cache.iterdir() if p.is_dir()]) == 1
    assert f"{folder}: not read, as a text about the data beside it: README.md" in corpus.notes
    assert {n.rpartition(":")[0] for n in corpus.batch(0).names if n} == {
        str(folder / "a.jsonl"),
        str(folder / "b.jsonl.gz"),
    }


def test_hub_without_its_library(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FettleError, match="pip install"):
        prepare([DataSpec(path="hf://someone/something")], tokenizer, 64)


def test_hub_rows(tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = {}

    def load_dataset(name, config, **keys):
        asked.update(keys, name=name, config=config)

        def rows():
            yield {"text": "one"}
            yield {"text": None}
            yield {"text": "three", "tools": [{"name": "f", "description": None}]}
            raise ValueError("the line is cut")

        return rows()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(build.hub, "commit", lambda spec: "c0ffee")
    spec = DataSpec(path="hf://someone/something", name="en", split="test", revision="v1", max_bad=1)
    with pytest.raises(
        FettleError, match="something:4: the stream fails here.* cannot be told, so max_bad: 0.5 cannot be"
    ):
        prepare([spec.model_copy(update={"max_bad": 0.5})], tokenizer, 64)
    assert [row.value for row in build.hub.rows(spec)][2] == {"text": "three", "tools": [{"name": "f"}]}
    corpus = prepare([spec], tokenizer, 64)
    assert asked == {"name": "someone/something", "config": "en", "split": "test", "revision": "v1", "streaming": True}
    assert (corpus.counts[0].read, corpus.counts[0].kept) == (4, 2)
    assert any("hf://someone/something:4: the stream fails here" in note for note in corpus.notes)


def test_hub_rows_whose_features_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are looked for where the features have them, and only there."""
    datasets = pytest.importorskip("datasets")
    given = [{"tools": [{"name": "f", "x": 1}], "other": [{"a": 1}]}, {"tools": [{"name": "g"}], "other": [{"b": 2}]}]
    found = datasets.Dataset.from_list(given).to_iterable_dataset()
    assert found.features is not None
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **keys: found)
    rows = [row.value for row in build.hub.rows(DataSpec(path="hf://someone/something"))]
    assert [row["tools"] for row in rows] == [row["tools"] for row in given]
    assert [row["other"] for row in rows] == [[{"a": 1, "b": None}], [{"a": None, "b": 2}]]


GOOD = st.sampled_from(
    [
        json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": a}]})
        for a in ("a", "你好 🙂", "{x}")
    ]
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "system", "tool", "bot", None]),
            "content": st.sampled_from(["a", "", None, 5, ["x"]]),
        }
    ),
    max_size=4,
)
ODD = st.one_of(
    TURNS.map(lambda t: json.dumps({"messages": t})),
    st.binary(max_size=30).map(lambda b: b.decode("latin-1").replace("\n", " ").replace("\r", " ")),
    st.sampled_from(BAD),
)


@given(st.lists(st.one_of(GOOD, ODD), min_size=1, max_size=30))
def test_read_is_kept_and_set_aside(tmp_path_factory: pytest.TempPathFactory, tokenizer, rows: list[str]) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "a.jsonl"
    path.write_bytes(
        b"\n".join([b"{}", *(r.encode("latin-1", errors="ignore") if not r.isascii() else r.encode() for r in rows)])
    )
    total = len(list(read(str(path))))
    try:
        corpus = prepare([DataSpec(path=str(path), format="messages", max_bad=1.0)], tokenizer, 4096, cache=folder)
    except FettleError as error:
        assert f"none of its {total} rows can be used" in str(error)
    else:
        (counts,) = corpus.counts
        (aside,) = folder.glob("*/set_aside.jsonl")
        assert counts.read == total == counts.kept + counts.set_aside
        assert len(aside.read_bytes().splitlines()) == counts.set_aside
        names = {n for i in range(corpus.batches(0)) for n in corpus.batch(i).names if n}
        assert len(names) == counts.kept == counts.per_epoch
    finally:
        shutil.rmtree(folder)


def test_fifty_thousand_damaged_rows(tmp_path: Path, tokenizer) -> None:
    rng = random.Random(0)
    good = [
        json.dumps(
            {"messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": text_of(i)}]}
        ).encode()
        for i in range(50)
    ]
    tokens = [
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"null",
        b"NaN",
        b"1e999",
        b"\\ud800",
        b"\\u0000",
        b"\x00",
        b"\xff",
        b"\\",
        b"user",
        b'"role"',
    ]
    rows = []
    for _ in range(50_000):
        row = bytearray(rng.choice(good))
        for _ in range(rng.randrange(3)):
            at = rng.randrange(len(row))
            row[at : at + rng.choice((0, 0, 1, 5))] = (
                rng.choice(tokens) if rng.random() < 0.8 else row[: rng.randrange(len(row))]
            )
        rows.append(bytes(row).replace(b"\n", b" "))
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(rows))
    corpus = prepare([DataSpec(path=str(path), format="messages", max_bad=1.0)], tokenizer, 128, cache=tmp_path / "c")
    (counts,) = corpus.counts
    (aside,) = (tmp_path / "c").glob("*/set_aside.jsonl")
    assert counts.read == 50_000 == counts.kept + counts.set_aside
    assert counts.set_aside == len(aside.read_bytes().splitlines()) + counts.too_long
    assert 15_000 < counts.kept < 40_000
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + b",\n".join(rows) + b"]")
    found = list(read(str(path)))
    assert sum(row.value is not None for row in found) >= counts.kept - 1  # the last row is torn by what follows it


def test_rows_in_one_line_are_counted_each(tmp_path: Path, tokenizer) -> None:
    """As `json.dump` writes a list."""
    rows = [{"instruction": f"q {i}", "output": "bread " * (1 if i % 4 else 60)} for i in range(20)]
    (tmp_path / "a.json").write_text(json.dumps([*rows, {"instruction": 5}]))
    corpus = prepare([DataSpec(path=str(tmp_path / "a.json"), max_bad=0.1)], tokenizer, 64, cache=tmp_path / "c")
    (counts,) = corpus.counts
    assert (counts.read, counts.kept, counts.set_aside, counts.too_long, counts.examples) == (21, 15, 6, 5, 15)
    (listed,) = (tmp_path / "c").glob("*.over-64.jsonl")
    names = [json.loads(line)["where"] for line in listed.read_text().splitlines()]
    assert names[0] == f"{tmp_path / 'a.json'}:1" and len(set(names)) == 5
    line = (tmp_path / "a.json").read_text()
    for name, row in zip(names[1:], rows[4::4], strict=True):
        assert json.JSONDecoder().raw_decode(line[int(name.rpartition(":")[2]) - 1 :])[0] == row


@pytest.mark.parametrize("max_bad", [0.99, 1])
def test_a_file_that_ends_in_the_middle_needs_consent(tmp_path: Path, tokenizer, max_bad: float) -> None:
    """Of half a file there is one bad row, so no share of them says how much is lost."""
    rows = [{"instruction": f"q {i}", "output": text_of(i)} for i in range(500)]
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    spec = DataSpec(path=str(tmp_path / "a.jsonl.gz"), max_bad=max_bad)
    if max_bad < 1:
        with pytest.raises(FettleError, match=r"a.jsonl.gz:\d+: the gzip stream ends early.*say max_bad: 1"):
            prepare([spec], tokenizer, 256)
        assert len(prepare([spec.model_copy(update={"limit": 50})], tokenizer, 256).examples(99)) == 50  # not reached
        return
    corpus = prepare([spec], tokenizer, 256)
    (counts,) = corpus.counts
    assert counts.read == counts.kept + counts.set_aside < 500
    assert any("the gzip stream ends early" in note for note in corpus.notes)


def test_stored_arrays_are_mapped(tmp_path: Path, tokenizer) -> None:
    corpus = prepare([DataSpec(path=texts(tmp_path / "a.jsonl"))], tokenizer, 64, cache=tmp_path / "c")
    store = corpus.sources[0].store
    assert (
        isinstance(store.tokens, np.memmap) and store.tokens.dtype == np.uint16 and isinstance(store.offsets, np.memmap)
    )
