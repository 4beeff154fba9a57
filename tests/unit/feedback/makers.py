"""Records and items for the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fettle.feedback.records import Record, to_record

TIME = "2026-11-21T10:00:00Z"


def about(prompt: str = "p1", labeler: str = "ada", **more: Any) -> dict[str, Any]:
    """What every record says."""
    return {"prompt_id": prompt, "prompt": f"text of {prompt}", "labeler": labeler, "time": TIME, **more}


def ranking(places: list[int], prompt: str = "p1", labeler: str = "ada", **more: Any) -> dict[str, Any]:
    """A ranking of answers a, b, ... of models A, B, ..."""
    answers = [{"text": f"answer {'abcdefghi'[i]}", "source": "ABCDEFGHI"[i]} for i in range(len(places) or 2)]
    return {"kind": "ranking", **about(prompt, labeler), "answers": answers, "ranks": places, **more}


def question(said: Any, prompt: str = "p1", labeler: str = "ada", answer: str = "a", **more: Any) -> dict[str, Any]:
    """An answer to 'Helpful?'."""
    given = {
        "answer": {"text": f"answer {answer}", "source": answer.upper()},
        "question": {"ask": "Helpful?"},
        "value": said,
    }
    return {"kind": "question", **about(prompt, labeler), **given, **more}


def verdict(
    said: str, prompt: str = "p1", labeler: str = "ada", answer: str = "a", rule: str = "No insults."
) -> dict[str, Any]:
    """A verdict on a rule."""
    given = {"answer": {"text": f"answer {answer}", "source": answer.upper()}, "rule": rule, "verdict": said}
    return {"kind": "rule", **about(prompt, labeler), **given}


def records(*rows: dict[str, Any]) -> list[Record]:
    """Rows as records."""
    return [to_record(row, f"row {i}") for i, row in enumerate(rows, 1)]


def write(path: Path, *rows: Any) -> Path:
    """Rows as JSONL; a text stands for itself."""
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path
