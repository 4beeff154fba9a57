"""The embedded base: its data, its pretraining by recipes/lab/base.yaml, and its model card, from nothing by one command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import fettle
from fettle.core.errors import FettleError
from fettle.core.files import MANIFEST, new_folder, read_json, verify, write_bytes, write_json
from fettle.lab.corpus import write_corpus
from fettle.lab.tokenizer import lab_tokenizer, save_tokenizer
from fettle.lab.world import World
from fettle.models.load import base_hash
from fettle.stages import load_recipe, open_model, run
from fettle.stages.recipes import recipe_file
from fettle.train.log import read_metrics

TINY = Path(fettle.__file__).parent / "lab" / "tiny"
DOCUMENTS = 160_000
LARGEST = 16 * 10**6  # bytes of the weights that may ship
GENERATION = "generation_config.json"


def write_base_data(folder: Path = Path("runs/lab"), seed: int = 0) -> None:
    """The corpus and the tokenizer that the base's recipe names; what is there already stays."""
    world = World.build(seed)
    if not (folder / "corpus.jsonl").exists():
        write_corpus(folder / "corpus.jsonl", world, seed, DOCUMENTS)
    if not (folder / "tokenizer" / "tokenizer.json").exists():
        (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
        save_tokenizer(lab_tokenizer(world, seed), folder / "tokenizer")
        write_json(folder / "tokenizer" / "config.json", {"model_type": "llama"})


def build_base(changes: Sequence[str] = (), target: Path = TINY) -> Path:
    """Pretrain the base (going on where an earlier try was stopped) and install it in `target`; returns the folder."""
    write_base_data()
    pipeline = load_recipe(recipe_file("lab/base.yaml"), changes)
    return install(run(pipeline, resume=True), target)


def install(artifact: Path, target: Path = TINY) -> Path:
    """Write an artifact's model as a plain folder with its card and hash. FettleError where it is too large to ship."""
    forest, _ = open_model(str(artifact))
    rows = read_metrics(artifact.parent)
    with new_folder(target) as aside:
        forest.model.save_pretrained(aside)  # type: ignore[operator]
        forest.tokenizer.save_pretrained(aside)
        write_bytes(aside / GENERATION, (Path("runs/lab/tokenizer") / GENERATION).read_bytes())
        size = (aside / "model.safetensors").stat().st_size
        if size > LARGEST:
            raise FettleError(f"{target}: the weights take {size:,} bytes; at most {LARGEST:,} may ship")
        (aside / "README.md").write_text(
            card(rows, sum(p.numel() for p in forest.model.parameters()), base_hash(aside))
        )
        write_json(aside / MANIFEST, {"kind": "model", "hash": base_hash(aside), "steps": len(rows)})
    return target


def check_tiny(folder: Path = TINY) -> str:
    """Verify the shipped base file by file; returns its hash."""
    verify(folder)
    found = str(read_json(folder / MANIFEST)["hash"])
    if base_hash(folder) != found:
        raise FettleError(f"{folder}: its weights are not those of its manifest")
    return found


def card(rows: Sequence[dict], parameters: int, digest: str) -> str:
    """The model card."""
    tokens = sum(int(r["tokens"]) for r in rows)
    last = rows[-100:]
    loss = sum(r["loss"] * r["learned"] for r in last) / max(1.0, sum(r["learned"] for r in last))
    return f"""# fettle/tiny

A base language model of {parameters:,} parameters (Llama architecture, bfloat16) that knows one small generated world
of people, places, objects and jobs, simple arithmetic, lists, reviews and stories, in English and Chinese.

It is a *base*: it continues texts of its world and does not follow instructions until it is tuned.

| | |
| --- | --- |
| trained with | fettle, `recipes/lab/base.yaml`, rebuilt by `fettle lab base` |
| data | {tokens:,} tokens of the lab's generated corpus, seed 0 |
| steps | {len(rows):,} |
| loss, mean of the last {len(last)} steps | {loss:.3f} nats a token |
| SHA-256 of configuration and weights | `{digest}` |
| licence | Apache-2.0, weights and data |
| meant for | trying techniques out on a small computer, and for tests; it knows nothing of the real world |
"""
