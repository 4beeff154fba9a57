"""The lab's data as files: the corpus, the instructions and the evaluations, the same bytes for the same seed."""

from __future__ import annotations

from pathlib import Path

from .alignment import write_alignment
from .corpus import write_corpus
from .rows import write_rows
from .tasks import TRAINED, UNSEEN, evaluation, instruction
from .world import World

HELD_OUT_SEED = 1_000_003  # added to the seed for rows that are not trained on


def write_instructions(path: str | Path, world: World, seed: int = 0, size: int = 10_000) -> int:
    """Write the first `size` instructions as OpenAI messages, one a line; return the number of rows."""
    return write_rows(path, (instruction(world, seed, index) for index in range(size)))


def write_tasks(folder: str | Path, world: World, seed: int = 0, each: int = 20) -> dict[str, int]:
    """Write the evaluations, at most `each` items a family, into `folder`; return the number of rows of each file.

    ``trained.jsonl`` has new items of trained families, ``wordings.jsonl`` the same families in wordings never trained on,
    ``heldout.jsonl`` the families of the held-out clusters.
    """
    folder = Path(folder)
    files = {"trained": (TRAINED, False), "wordings": (TRAINED, True), "heldout": (UNSEEN, False)}
    return {
        name: write_rows(
            folder / f"{name}.jsonl",
            (row for family in families for row in evaluation(world, family, each, seed, unseen)),
        )
        for name, (families, unseen) in files.items()
    }


def write_lab(
    folder: str | Path,
    seed: int = 0,
    documents: int = 100_000,
    instructions: int = 10_000,
    heldout: int = 500,
    each: int = 20,
    preferences: int = 6_000,
) -> dict[str, int]:
    """Write everything the lab trains and measures on into `folder`; return the number of rows of each file.

    Args:
        documents: documents of ``corpus.jsonl`` (about 200 tokens each); 0 leaves the file out.
        instructions: rows of ``instructions.jsonl``.
        heldout: rows of ``heldout.jsonl``, instructions of trained families about items never trained on, for the loss.
        each: items a family in ``tasks/trained.jsonl``, ``tasks/wordings.jsonl`` and ``tasks/heldout.jsonl``.
        preferences: rows of each file that models are aligned by, see alignment.py.
    """
    folder, world = Path(folder), World.build(seed)
    written = {"corpus": write_corpus(folder / "corpus.jsonl", world, seed, documents)} if documents else {}
    written["instructions"] = write_instructions(folder / "instructions.jsonl", world, seed, instructions)
    rows = (instruction(world, seed + HELD_OUT_SEED, index, evaluated=True) for index in range(heldout))
    written["heldout"] = write_rows(folder / "heldout.jsonl", rows)
    written |= {f"tasks/{name}": count for name, count in write_tasks(folder / "tasks", world, seed, each).items()}
    aligned = write_alignment(folder / "alignment", world, seed, preferences)
    return written | {f"alignment/{name}": count for name, count in aligned.items()}
