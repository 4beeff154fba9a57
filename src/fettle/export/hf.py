"""A merged Hugging Face folder: loads wherever transformers' models do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fettle.core.families import Edit
from fettle.core.files import new_folder
from fettle.export.common import merged, save_tokenizer, write_manifest
from fettle.export.parity import Parity, check, measure, wide_logits
from fettle.export.readback import reading
from fettle.models.experts import restack
from fettle.models.tasks import auto_class
from fettle.quantize.linear import requantizing

if TYPE_CHECKING:
    from fettle.models.forest import Forest


def export_hf(forest: Forest, edits: Sequence[Edit], folder: Path, dtype: torch.dtype | None = None) -> Parity:
    """Write the merged model, its tokenizer and its manifest; FettleError, and no folder, where it reads back differently.

    Its generation config lists every token that ends an answer.
    """

    reference = measure(forest, dtype)
    model, written = merged(forest, edits, reference, dtype)
    costs = requantizing(forest.model, model)
    restack(model)
    with new_folder(folder) as aside:
        model.save_pretrained(aside)  # type: ignore[operator]
        save_tokenizer(forest, aside)
        del model
        with reading(folder, "transformers"):
            reloaded = (
                auto_class(forest.spec.model_copy(update={"task": forest.task}), forest.config)
                .from_pretrained(
                    aside, dtype="auto", local_files_only=True, trust_remote_code=forest.spec.trust_remote_code
                )
                .to(forest.device)
            )
            parity = check(reference, lambda rows: wide_logits(reloaded, rows), str(folder), "transformers", written)
        write_manifest(aside, "hf", forest, edits, parity, costs)
    return parity
