"""Soft prompts in PEFT's format, both ways: adapter_config.json and adapter_model.safetensors with one table.

    PROMPT_TUNING, P_TUNING   prompt_embeddings [P, C]          vectors before the text, fixed words among them written out
    PREFIX_TUNING             prompt_embeddings [P, L 2 K D]    keys and values, in the order of our own table

PEFT, too, keeps what its encoders compute and not the encoders, so a P-tuning or a projected prefix is read back plain.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fettle.core import FettleError
from fettle.core.families import Edit
from fettle.core.files import new_folder, read_json, write_json
from fettle.export.common import save_tokenizer, write_manifest
from fettle.export.parity import Parity, check, measure, plain_logits
from fettle.models import prompt
from fettle.models.load import load
from fettle.models.prompt import SoftPrompt
from fettle.peft import PrefixTuning, PromptTuning, PTuning, PTuningV2

if TYPE_CHECKING:
    from fettle.models.forest import Forest

CONFIG, WEIGHTS, TABLE = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"
TYPES = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")


def export_prompt(forest: Forest, edits: Sequence[Edit], folder: Path) -> Parity:
    """Write the model's soft prompt as a PEFT adapter, read it back, compare; FettleError where PEFT has no such thing."""
    front = _only_prompt(forest, edits)
    reference = measure(forest)
    with new_folder(folder) as aside:
        save_file({TABLE: table_of(forest.model, front)}, aside / WEIGHTS, metadata={"format": "pt"})
        write_json(aside / CONFIG, _config(forest, front))
        save_tokenizer(forest, aside)
        model, by, added = _reloaded(forest, aside, front)
        parity = check(reference, lambda rows: _text_logits(model, rows, added), str(folder), by)
        write_manifest(aside, "peft", forest, edits, parity)
    return parity


def _only_prompt(forest: Forest, edits: Sequence[Edit]) -> SoftPrompt:
    front = prompt.find(forest.model)
    others = [e for e in edits if e.tensors(forest.model) and (front is None or e != front.edit)]
    if front is None or others:
        listed = ", ".join(type(e).__name__ for e in edits) or "none"
        raise FettleError(
            f"export: a peft folder holds one soft prompt and nothing else, the edits here are: {listed}; "
            "merge the others first (--to hf with the prompt left out), or keep the artifact"
        )
    if forest.config.is_encoder_decoder or forest.task != "causal":
        raise FettleError(
            "export: a soft prompt is written for causal language models only; keep the artifact, which opens with any model"
        )
    if forest.spec.config is not None:
        raise FettleError(
            "export: a peft adapter needs a base that others can load, and this one began with random weights"
        )
    return front


@torch.no_grad()
def table_of(model: Any, front: SoftPrompt) -> Tensor:
    """[P, C] or [P, L 2 K D], float32: all rows of a soft prompt as they are used, on the CPU."""
    table = front.baked() if front.words is None else front.rows(model.get_input_embeddings())
    return table.float().cpu().contiguous().clone()


def _config(forest: Forest, front: SoftPrompt) -> dict[str, Any]:
    text, edit = forest.config.get_text_config(), front.edit
    layers, heads, size = front.heads or (prompt.layers_of(forest.model), text.num_attention_heads, None)
    config: dict[str, Any] = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(forest.config, "name_or_path", "") or forest.spec.path,
        "revision": forest.spec.revision,
        "inference_mode": True,
        "num_virtual_tokens": front.length,
        "num_transformer_submodules": 1,
        "num_layers": layers,
        "num_attention_heads": heads,
        "token_dim": heads * size if size is not None else table_of(forest.model, front).shape[1],
    }
    if front.heads is not None:
        config |= {"peft_type": "PREFIX_TUNING", "prefix_projection": False, "encoder_hidden_size": config["token_dim"]}
    elif isinstance(edit, PTuning):
        config |= {
            "peft_type": "P_TUNING", "encoder_reparameterization_type": "LSTM", "encoder_num_layers": edit.layers,
            "encoder_dropout": edit.dropout, "encoder_hidden_size": edit.hidden or config["token_dim"] // 2,
        }  # fmt: skip
    else:
        config["prompt_tuning_init"] = "RANDOM"
    return config


def _reloaded(forest: Forest, folder: Path, front: SoftPrompt) -> tuple[nn.Module, str, int]:
    """A fresh model with the adapter; who read it, and how many rows stand before the texts in what it returns."""
    dtype = str(forest.model.dtype).removeprefix("torch.")
    fresh = load(forest.spec.model_copy(update={"dtype": dtype, "device": str(forest.device)}))
    try:
        from peft import PeftModel
    except ImportError:
        load_prompt(fresh, folder)
        return fresh.model, "fettle", 0
    return PeftModel.from_pretrained(fresh.model, folder), "peft", front.length if front.heads is None else 0


def _text_logits(model: nn.Module, rows: tuple[tuple[int, ...], ...], added: int) -> Tensor:
    """[N, V]: PEFT leaves the rows of its virtual tokens in the logits."""
    return plain_logits(model, rows).view(len(rows), added + len(rows[0]), -1)[:, added:].flatten(0, 1)


def read_prompt(folder: Path) -> tuple[Edit, Tensor]:
    """A PEFT folder with a soft prompt as (edit, its table). FettleError where it holds something else."""
    config, file = read_json(folder / CONFIG), folder / WEIGHTS
    kind, tokens = config.get("peft_type"), config.get("num_virtual_tokens")
    if kind not in TYPES or not isinstance(tokens, int) or tokens < 1:
        raise FettleError(
            f"{folder / CONFIG}: holds a {kind} adapter with {tokens!r} virtual tokens; {', '.join(TYPES)} can be read here"
        )
    try:
        table = load_file(file)[TABLE]
    except (OSError, SafetensorError, KeyError) as error:
        raise FettleError(
            f"{file}: no readable table '{TABLE}' in it ({error}); save the adapter with peft as safetensors"
        ) from None
    width = config.get("encoder_hidden_size") or table.shape[1]
    edit: Edit = PromptTuning(tokens=tokens, init="random")
    if kind == "PREFIX_TUNING":
        plain = not config.get("prefix_projection")
        edit = PTuningV2(tokens=tokens, init="random") if plain else PrefixTuning(tokens=tokens, hidden=width)
    elif kind == "P_TUNING":
        layers, dropout = config.get("encoder_num_layers") or 2, config.get("encoder_dropout") or 0.0
        edit = PTuning(tokens=tokens, hidden=width, layers=layers, dropout=dropout)
    return edit, table[:tokens] if kind != "PREFIX_TUNING" else table  # an encoder-decoder's table holds P unused rows


@torch.no_grad()
def load_prompt(forest: Forest, folder: Path) -> Edit:
    """Put a PEFT soft prompt on a base; returns the edit as applied. FettleError where it is another model's."""
    edit, table = read_prompt(folder)
    edit.apply(forest.model)
    edit.settle(forest.model)
    (there,) = edit.tensors(forest.model).values()
    if there.shape != table.shape:
        raise FettleError(
            f"{folder}: the table is {tuple(table.shape)}, the model needs {tuple(there.shape)}; it belongs to another base"
        )
    there.copy_(table)
    return edit
