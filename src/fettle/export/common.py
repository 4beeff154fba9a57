"""What all exports share: a merged copy, the tokenizer with the template in use, the manifest."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import fettle
from fettle.core import FettleError
from fettle.core.families import Edit
from fettle.core.files import MANIFEST, write_json
from fettle.export.parity import Parity, Reference, facts, plain_logits, wide_logits, widen
from fettle.generate.prompts import prompter
from fettle.generate.sample import end_tokens
from fettle.models.experts import Experts
from fettle.models.load import base_hash, folder_of
from fettle.models.weight import is_adapter
from fettle.quantize.checkpoint import unpacked
from fettle.quantize.linear import quantized

if TYPE_CHECKING:
    from fettle.models.forest import Forest


def merged(
    forest: Forest, edits: Sequence[Edit], reference: Reference, dtype: torch.dtype | None = None
) -> tuple[nn.Module, Tensor]:
    """A copy of the model with every edit folded into plain weights, and its logits on the probes in float32.

    Weights are summed in float32 and rounded once, to what each was in the model, or to `dtype`. FettleError where an edit
    cannot be merged, or where the sum is another model.
    """
    refuse_rounded_inputs(forest.model)
    model = folded(forest, edits)
    reference.agree(plain_logits(model, reference.probes), reference.adapted, "export: merging the edits")
    finish(model, forest, dtype)
    return model, wide_logits(model, reference.probes)


def refuse_rounded_inputs(model: nn.Module) -> None:
    """FettleError where a layer rounds its activations, which weights alone cannot say."""
    for name, layer in quantized(model).items():
        if layer.activations is not None:
            form = "compressed-tensors" if layer.activations.outliers is None else "bitsandbytes"
            raise FettleError(
                f"export: {name} rounds its activations, which a file of weights cannot say; use --to {form}"
            )


def refuse_linear_experts(forest: Forest, form: str) -> None:
    """FettleError where experts are linear layers, which other readers hold stacked and would not find."""
    if any(isinstance(m, Experts) for m in forest.model.modules()):
        raise FettleError(
            f"export: with model.experts: linear its experts are layers of their own, which readers of {form} do not have; use --to hf, "
            "which merges and stacks them, or keep the artifact"
        )


def folded(forest: Forest, edits: Sequence[Edit]) -> Any:
    """A copy of the model, in float32, with every edit folded into plain weights. FettleError where one cannot be."""
    model: Any = copy.deepcopy(forest.model)
    widen(model)
    unpacked(model)
    for edit in edits:  # the first edit lies innermost
        edit.merge(model)
    left = [name for name, module in model.named_modules() if is_adapter(module)]
    if left:
        raise FettleError(
            f"export: {left[0]} still has an adapter after merging; the list of edits lacks the one that put it there"
        )
    return model.requires_grad_(False).eval()


def finish(model: Any, forest: Forest, dtype: torch.dtype | None = None) -> None:
    """Bring weights back to what each was in the forest's model, or to `dtype`, and say so in the configuration.

    Codes and scales of packed layers are left as they are.
    """
    held = {f"{n}.{k}" for n, layer in quantized(model).items() for k, _ in layer.named_buffers() if k != "like"}
    kinds = {_plain(n): t.dtype for n, t in chain(forest.model.named_parameters(), forest.model.named_buffers())}
    own = forest.dtype
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        was = kinds.get(name, own)
        if tensor.is_floating_point() and name not in held:
            tensor.data = tensor.data.to(dtype if dtype is not None and was == own else was)
    model.config.dtype = model.dtype
    ends = sorted(end_tokens(forest))
    if getattr(model, "generation_config", None) is not None and ends:
        model.generation_config.eos_token_id = ends


def _plain(name: str) -> str:
    """A weight's name without the adapters around its layer."""
    return name.replace(".base.", ".")


def save_tokenizer(forest: Forest, folder: Path) -> None:
    """The tokenizer, with the chat template that training used even where it was fettle's default."""
    tokenizer = copy.deepcopy(forest.tokenizer)
    if not tokenizer.chat_template and forest.task == "causal":
        try:
            tokenizer.chat_template = prompter(forest.tokenizer).encoder.template.text
        except FettleError:  # a model for plain text, with which there is no conversation
            pass
    tokenizer.save_pretrained(folder)


def write_manifest(
    folder: Path, form: str, forest: Forest, edits: Sequence[Edit], parity: Parity, costs: dict[str, Any] | None = None,
    **more: Any,
) -> None:  # fmt: skip
    """What was exported, from what, and how exactly; the hashes of the files are added on sealing.

    `costs`: what quantizing the export again would cost, where the base was quantized. `more`: what the format has to say.
    """
    spec = forest.spec
    base: dict[str, Any] = {"path": spec.path, "revision": spec.revision}
    if spec.config is None:
        base["hash"] = base_hash(folder_of(spec.path, spec.revision))
    manifest = {
        "kind": "export", "format": form, "base": base, "fettle": fettle.__version__,
        "edits": [e.model_dump(mode="json") for e in edits], "parity": facts(parity),
    }  # fmt: skip
    if costs:
        manifest["requantizing"] = costs
    write_json(folder / MANIFEST, manifest | more)
