"""The fine-tunes that a stage's bitdelta edits name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fettle.core.errors import FettleError
from fettle.core.families import Edit
from fettle.models.forest import Forest
from fettle.quantize.bitdelta import BitDelta
from fettle.stages.artifact import open_model
from fettle.stages.reference import other_identity


def bring(forest: Forest, edits: Sequence[Edit]) -> None:
    """Fill a stage's own bitdelta edits from the fine-tunes that they name. FettleError where one is of another base."""
    for edit in edits:
        if not isinstance(edit, BitDelta):
            continue
        tuned, theirs = open_model(edit.tuned, device=str(forest.device), dtype="float32")
        for other in theirs:
            other.merge(tuned.model)
        if tuned.tokenizer.get_vocab() != forest.tokenizer.get_vocab():
            raise FettleError(
                f"bitdelta: '{edit.tuned}' has another tokenizer than the base; a delta has no place for new words"
            )
        edit.take(forest.model, tuned.model)


def tuned_identity(edits: Sequence[Edit]) -> dict[str, Any]:
    """What decides what a stage's fine-tunes are."""
    found = [other_identity(edit.tuned) for edit in edits if isinstance(edit, BitDelta)]
    return {"tuned": found} if found else {}
