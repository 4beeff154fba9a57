"""report.md: one page a run, with its picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fettle.core.files import write_bytes
from fettle.train import rewards
from fettle.train.log import draw_loss, read_metrics

REPORT, PICTURE = "report.md", "loss.png"
FIGURES = ("accuracy", "margin", "kl")


def write_report(folder: Path, facts: dict[str, Any]) -> None:
    """Write `folder`/report.md and loss.png from a run's facts and its metrics."""
    rows = read_metrics(folder)
    draw_loss(rows, folder / PICTURE, facts.get("unit", "token"))
    if rewards.phases(rows):
        rewards.draw(rows, folder / rewards.PICTURE)
    write_bytes(folder / REPORT, page(facts, rows).encode())


def page(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The text of the report, in Markdown."""
    recipe, last = facts["recipe"], facts["last"] or (rows[-1] if rows else {})
    share = 100 * facts["trained"] / facts["parameters"]
    useful = sum(r["tokens"] for r in rows)
    learned = sum(r["learned"] for r in rows)
    seconds = sum(r["seconds"] for r in rows)
    skipped = sum("skipped" in r for r in rows)
    unit = facts.get("unit", "token")  # what the loss is counted in
    lines = [
        f"# {Path(recipe['output']).name}",
        "",
        "![loss](loss.png)",
        "",
        table(
            ["", ""],
            [
                ["base", recipe["model"]["path"] if recipe["model"]["config"] is None else "random weights"],
                ["edits", ", ".join(e["kind"] for e in recipe["edits"])],
                ["objective", recipe["objective"]["kind"]],
                ["trained parameters", f"{facts['trained']:,} of {facts['parameters']:,} ({share:.2f}%)"],
                ["steps", f"{facts['steps']:,}" + (f", {skipped} skipped (not finite)" if skipped else "")],
                ["first and last loss", f"{_loss(rows[0])} -> {_loss(rows[-1])}" if rows else "none"],
                *([["held-out loss", held]] if (held := held_out(rows)) else []),
                *_figures(rows),
                ["useful tokens", f"{useful:,} read" + (f", {learned:,.0f} learned" if unit == "token" else "")],
                *([[f"{unit}s", f"{learned:,.0f}"]] if unit != "token" else []),
                ["useful tokens/s", f"{useful / max(seconds, 1e-9):,.0f}"],
                ["peak memory", f"{facts['peak_bytes'] / 2**30:.2f} GiB" + _predicted(facts)],
                ["time", f"{facts['seconds']:,.0f} s"],
                ["learning rate at the end", f"{last.get('lr', 0):.3g}"],
                ["versions", ", ".join(f"{k} {v}" for k, v in facts["versions"].items())],
            ],
        ),
        *_rewarded(rows),
        "",
        "## Data",
        "",
        _of_dicts(facts["data"]),
    ]
    if facts.get("notes"):
        lines += ["", *(f"- {note}" for note in facts["notes"])]
    if facts.get("evaluation"):
        lines += ["", "## Evaluation", "", _of_dicts(facts["evaluation"])]
    return "\n".join(lines) + "\n"


def _rewarded(rows: list[dict[str, Any]]) -> list[str]:
    """What a run that learned from rewards came to; nothing of others."""
    found = rewards.summary(rows)
    if not found:
        return []
    return [
        "",
        "## Rewards",
        "",
        f"![reward]({rewards.PICTURE})",
        "",
        table(["first -> last phases", ""], [list(row) for row in found]),
    ]


def _figures(rows: list[dict[str, Any]]) -> list[list[str]]:
    """What objectives report beside their loss, in the first step and in the last."""
    both = [key for key in FIGURES if rows and rows[0].get(key) is not None and rows[-1].get(key) is not None]
    return [[f"first and last {key}", f"{rows[0][key]:.4f} -> {rows[-1][key]:.4f}"] for key in both]


def held_out(rows: list[dict[str, Any]]) -> str:
    """The held-out loss: first, last and lowest, each with its step; '' where it was not measured."""
    found = [(row["validation_loss"], row["step"]) for row in rows if row.get("validation_loss") is not None]
    if not found:
        return ""
    first, last, low = (f"{loss:.4f} (step {step})" for loss, step in (found[0], found[-1], min(found)))
    return f"{first} -> {last}, lowest {low}"


def _predicted(facts: dict[str, Any]) -> str:
    size = facts.get("predicted_bytes")
    return f" ({size / 2**30:.2f} GiB predicted)" if size else ""


def _loss(row: dict[str, Any]) -> str:
    """A step's loss; JSON keeps one that is not finite as null."""
    loss = row.get("loss")
    return f"{loss:.4f}" if loss is not None else "not finite"


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    cells = [[str(c).replace("|", "\\|") for c in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *cells])


def _of_dicts(rows: list[dict[str, Any]]) -> str:
    plain = [{k: v for k, v in row.items() if not isinstance(v, (dict, list))} for row in rows]
    heads = list(dict.fromkeys(k for row in plain for k in row))
    return table(heads, [[_short(row.get(h, "")) for h in heads] for row in plain])


def _short(value: Any) -> str:
    if value is None:
        return "n/a"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
