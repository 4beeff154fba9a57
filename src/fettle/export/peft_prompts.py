"""Soft prompts in PEFT's format, both ways: adapter_config.json and adapter_model.safetensors with one table.

    PROMPT_TUNING, P_TUNING   prompt_embeddings [P, C]          vectors before the text, fixed words among them written out
    PREFIX_TUNING             prompt_embeddings [P, L 2 K D]    keys and values, in the order of our own table

PEFT, too, keeps what its encoders compute and not the encoders, so a P-tuning or a projected prefix is read back plain.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fettle.core import FettleError
from fettle.core.families import Edit
from fettle.export.peft_lora import CONFIG, WEIGHTS
from fettle.models import prompt
from fettle.models.prompt import SoftPrompt
from fettle.models.tasks import task_of
from fettle.peft import PrefixTuning, PromptTuning, PTuning, PTuningV2

TABLE = "prompt_embeddings"


@torch.no_grad()
def write(model: Any, edit: Edit) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(settings, tensors). FettleError where the model is not of the kind whose prompts PEFT lays out as we do."""
    front = prompt.find(model, edit)
    if front is None:
        raise FettleError(f"export: the model has no soft prompt of this {type(edit).__name__}; apply it first")
    if model.config.is_encoder_decoder or task_of(model) != "causal":
        raise FettleError(
            "export: a soft prompt is written for causal language models only; keep the artifact, which opens with any model"
        )
    table = table_of(model, front)
    layers, heads, size = front.heads or (
        prompt.layers_of(model),
        model.config.get_text_config().num_attention_heads,
        None,
    )
    width = heads * size if size is not None else table.shape[1]
    settings: dict[str, Any] = {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": front.length,
        "num_transformer_submodules": 1,
        "num_layers": layers,
        "num_attention_heads": heads,
        "token_dim": width,
    }
    if front.heads is not None:
        settings |= {"peft_type": "PREFIX_TUNING", "prefix_projection": False, "encoder_hidden_size": width}
    elif isinstance(edit, PTuning):
        settings |= {
            "peft_type": "P_TUNING", "encoder_reparameterization_type": "LSTM", "encoder_num_layers": edit.layers,
            "encoder_dropout": edit.dropout, "encoder_hidden_size": edit.hidden or width // 2,
        }  # fmt: skip
    else:
        settings["prompt_tuning_init"] = "RANDOM"
    return settings, {TABLE: table}


@torch.no_grad()
def table_of(model: Any, front: SoftPrompt) -> Tensor:
    """[P, C] or [P, L 2 K D], float32: all rows of a soft prompt as they are used, on the CPU."""
    table = front.baked() if front.words is None else front.rows(model.get_input_embeddings())
    return table.float().cpu().contiguous().clone()


def read(config: dict[str, Any], weights: dict[str, Tensor], folder: Path) -> tuple[Edit, dict[str, Tensor]]:
    """(edit, its table under our name)."""
    kind, tokens, table = config["peft_type"], config.get("num_virtual_tokens"), weights.get(TABLE)
    if not isinstance(tokens, int) or tokens < 1:
        raise FettleError(f"{folder / CONFIG}: 'num_virtual_tokens' is {tokens!r}; expected a positive number")
    if table is None:
        raise FettleError(f"{folder / WEIGHTS}: no table '{TABLE}' in it; save the adapter with peft as safetensors")
    width = config.get("encoder_hidden_size") or table.shape[1]
    edit: Edit = PromptTuning(tokens=tokens, init="random")
    if kind == "PREFIX_TUNING":
        plain = not config.get("prefix_projection")
        edit = PTuningV2(tokens=tokens, init="random") if plain else PrefixTuning(tokens=tokens, hidden=width)
    elif kind == "P_TUNING":
        layers, dropout = config.get("encoder_num_layers") or 2, config.get("encoder_dropout") or 0.0
        edit = PTuning(tokens=tokens, hidden=width, layers=layers, dropout=dropout)
    used = table if kind == "PREFIX_TUNING" else table[:tokens]  # an encoder-decoder's holds P unused rows
    return edit, {f"{prompt.NAME}.plain": used}


def fit(model: nn.Module, edit: Edit, tensors: dict[str, Tensor], folder: Path) -> Edit:
    """The edit as it is: a table's shape says whether it is this model's."""
    return edit
