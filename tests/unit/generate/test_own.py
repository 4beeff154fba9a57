"""A model's own texts: a row is a function of the recipe and its number, and a stopped run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fettle.core.errors import FettleError
from fettle.data.build import encoded
from fettle.data.spec import DataSpec
from fettle.data.template import Encoder
from fettle.generate import own
from fettle.generate.own import OwnText, own_texts, start_tokens, write_own
from fettle.models.forest import Forest
from fettle.models.load import load
from fettle.models.spec import ModelSpec

SPEC = OwnText(rows=13, length=16, seed=3)


@pytest.fixture(scope="module")
def forest(tiny_llama: Path) -> Forest:
    return load(ModelSpec(path=str(tiny_llama), dtype="float32"))


def test_a_start_token_a_few_likeliest_then_sampled(forest: Forest) -> None:
    texts = own_texts(forest, SPEC, range(20))
    starts = start_tokens(forest, SPEC.seed)
    assert len(set(starts)) == len(starts) > 200 and not set(starts) & set(forest.tokenizer.all_special_ids)
    shorter = own_texts(forest, OwnText(rows=13, length=4, greedy=(3, 3), seed=3), range(20))
    for i, text in enumerate(shorter):
        ids = [starts[i]]
        for _ in range(3):
            with torch.no_grad():
                ids.append(int(forest.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert text == forest.tokenizer.decode(ids, skip_special_tokens=True).rstrip("�")
    assert len(set(texts)) == 20 and own_texts(forest, SPEC.model_copy(update={"seed": 4}), range(20)) != texts


def test_a_row_does_not_depend_on_which_others_are_made_with_it(forest: Forest) -> None:
    assert own_texts(forest, SPEC, range(8)) == [own_texts(forest, SPEC, range(i, i + 1))[0] for i in range(8)]


def test_the_file_holds_its_recipe_and_reads_as_text(forest: Forest, tmp_path: Path) -> None:
    counted: list[int] = []
    write_own(forest, tmp_path / "own.jsonl", SPEC, "tiny", counted.append)
    rows = [json.loads(line) for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(13)) and sum(counted) == 13
    assert rows[0]["recipe"] == {"model": "tiny", **SPEC.model_dump(mode="json")} and "recipe" not in rows[1]
    store = encoded(DataSpec(path=str(tmp_path / "own.jsonl")), Encoder(forest.tokenizer), tmp_path)
    assert store.manifest["format"] == "text" and store.manifest["kept"] == 13
    with pytest.raises(FettleError, match="is there already"):
        write_own(forest, tmp_path / "own.jsonl", SPEC, "tiny")


@pytest.mark.parametrize("cut", [0, 100, 700])
def test_stopped_it_goes_on_byte_for_byte(
    forest: Forest, tmp_path: Path, cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own, "AT_ONCE", 5)
    write_own(forest, tmp_path / "whole.jsonl", SPEC, "tiny")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    (tmp_path / "a.jsonl.part").write_bytes(whole[:cut])
    write_own(forest, tmp_path / "a.jsonl", SPEC, "tiny")
    assert (tmp_path / "a.jsonl").read_bytes() == whole and not (tmp_path / "a.jsonl.part").exists()
    if whole[:cut].count(b"\n"):
        (tmp_path / "b.jsonl.part").write_bytes(whole[:cut])
        with pytest.raises(FettleError, match="begun with another recipe .seed: 3 then, 4 now"):
            write_own(forest, tmp_path / "b.jsonl", SPEC.model_copy(update={"seed": 4}), "tiny")
