"""Llama's original format: consolidated.00.pth and params.json (github.com/meta-llama/llama-models).

The format is a pickle of tensors, so `torch.save` writes it; nothing here reads one without `weights_only`.

Meta rotates neighbours (x0, x1), (x2, x3), ..., transformers rotates halves (x0, xD/2), ...: the rows of q and k are permuted
to match. Shapes: C width, H heads, D head size, T tokens.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fettle.core import FettleError
from fettle.core.families import Edit
from fettle.core.files import new_folder, read_json, write_json
from fettle.export.common import merged, save_tokenizer, write_manifest
from fettle.export.parity import Parity, check, measure
from fettle.models.load import folder_of

if TYPE_CHECKING:
    from fettle.models.forest import Forest

WEIGHTS, PARAMS = "consolidated.00.pth", "params.json"
TOP = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER = {
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}


def export_llama(forest: Forest, edits: Sequence[Edit], folder: Path, dtype: torch.dtype | None = None) -> Parity:
    """Write the merged model as Meta's code reads it, run it in Meta's convention, compare; FettleError for other architectures."""
    params = params_of(forest.config)
    reference = measure(forest, dtype)
    model, expected = merged(forest, edits, reference, dtype)
    tensors = to_meta(model, forest.config)
    with new_folder(folder) as aside:
        torch.save(tensors, aside / WEIGHTS)
        write_json(aside / PARAMS, params)
        _save_tokenizer(forest, aside)
        written = torch.load(aside / WEIGHTS, weights_only=True, map_location="cpu", mmap=True)
        said = read_json(aside / PARAMS)
        wide = {name: tensor.float() for name, tensor in written.items()}
        parity = check(
            reference, lambda rows: torch.cat([forward(said, wide, torch.tensor(row)) for row in rows]), str(folder), "llama",
            expected,
        )  # fmt: skip
        write_manifest(aside, "llama", forest, edits, parity)
    return parity


def params_of(config: Any) -> dict[str, Any]:
    """params.json; FettleError where the architecture is not one that Meta's code has."""
    if config.model_type != "llama":
        raise FettleError(
            f"export: the llama format is for Llama models, this one is '{config.model_type}'; use --to hf"
        )
    heads, width = config.num_attention_heads, config.hidden_size
    head_size = getattr(config, "head_dim", None) or width // heads
    if head_size * heads != width:
        raise FettleError(
            f"export: heads of {head_size} x {heads} are not the width {width}, which the llama format cannot say; use --to hf"
        )
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        raise FettleError("export: the model has biases, which the llama format does not; use --to hf")
    if config.hidden_act != "silu":
        raise FettleError(
            f"export: the activation is '{config.hidden_act}', the llama format knows silu alone; use --to hf"
        )
    multiple, multiplier = feed_forward_rule(width, config.intermediate_size)
    params = {
        "dim": width, "n_layers": config.num_hidden_layers, "n_heads": heads, "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size, "norm_eps": config.rms_norm_eps, "multiple_of": multiple,
    }  # fmt: skip
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    return params | _rope(dict(getattr(config, "rope_parameters", None) or {}), config)


def _rope(rope: dict[str, Any], config: Any) -> dict[str, Any]:
    theta = float(rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return {"rope_theta": theta}
    fixed = (rope.get("low_freq_factor"), rope.get("high_freq_factor"), rope.get("original_max_position_embeddings"))
    if kind != "llama3" or fixed != (1.0, 4.0, 8192):
        raise FettleError(
            f"export: positions are scaled by '{kind}' {rope}, the llama format knows Llama 3's scaling alone; use --to hf"
        )
    return {"rope_theta": theta, "use_scaled_rope": True, "rope_scaling_factor": float(rope["factor"])}


def feed_forward_size(width: int, multiple: int, multiplier: float | None) -> int:
    """Meta's rule: two thirds of four widths, times the multiplier, rounded up to a multiple."""
    size = int(2 * 4 * width / 3)
    if multiplier is not None:
        size = int(multiplier * size)
    return multiple * ((size + multiple - 1) // multiple)


def feed_forward_rule(width: int, wanted: int) -> tuple[int, float | None]:
    """(multiple_of, ffn_dim_multiplier) for which the rule gives the size that the model has."""
    multiples = [m for m in (4096, 1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1) if wanted % m == 0]
    for multiple in multiples:
        if feed_forward_size(width, multiple, None) == wanted:
            return multiple, None
    ratio = wanted / int(2 * 4 * width / 3)
    for multiple in multiples:
        for digits in range(1, 16):
            if feed_forward_size(width, multiple, round(ratio, digits)) == wanted:
                return multiple, round(ratio, digits)
    raise FettleError(f"export: no multiple_of gives a feed-forward size of {wanted} at width {width}; use --to hf")


def to_meta(model: nn.Module, config: Any) -> dict[str, Tensor]:
    """The weights under Meta's names, q and k permuted, in the dtype they have; the head is written even where it is tied."""
    tensors = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        value = parameter.detach().cpu()
        if name in TOP:
            tensors[TOP[name]] = value.clone()
            continue
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        if not name.startswith("model.layers.") or rest not in LAYER:
            raise FettleError(f"export: the model has a weight '{name}', which the llama format does not; use --to hf")
        if rest.startswith(("self_attn.q_proj", "self_attn.k_proj")):
            heads = config.num_attention_heads if "q_proj" in rest else config.num_key_value_heads
            value = neighbours(value, heads)
        tensors[f"layers.{layer}.{LAYER[rest]}"] = value.contiguous().clone()
    return tensors


def neighbours(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from (first half, second half) to pairs of neighbours. [H D, C] -> [H D, C]."""
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)


def _save_tokenizer(forest: Forest, folder: Path) -> None:
    save_tokenizer(forest, folder)
    spec = forest.spec
    source = folder_of(spec.tokenizer or spec.path, None if spec.tokenizer else spec.revision)
    for file in [source / "tokenizer.model", source / "original" / "tokenizer.model"]:
        if file.is_file():
            shutil.copyfile(file, folder / "tokenizer.model")
            break


def frequencies(params: dict[str, Any]) -> Tensor:
    """Rotation frequencies [D/2], with Llama 3.1's scaling where the params ask for it."""
    size = params["dim"] // params["n_heads"]
    found = 1.0 / params["rope_theta"] ** (torch.arange(0, size, 2).double() / size)
    if not params.get("use_scaled_rope"):
        return found
    factor, length = params.get("rope_scaling_factor", 8.0), 2 * math.pi / found
    smooth = ((8192 / length - 1.0) / (4.0 - 1.0)).clamp(0, 1)  # 0 at wavelengths over 8192, 1 below 2048
    return found * (smooth + (1 - smooth) / factor)


@torch.no_grad()
def forward(params: dict[str, Any], tensors: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits [T, V], float32, of a Llama in Meta's format: the reader that an export is checked with. Tokens int64 [T]."""
    heads, groups, size = params["n_heads"], params["n_kv_heads"], params["dim"] // params["n_heads"]
    angles = torch.outer(torch.arange(len(tokens)).double(), frequencies(params))
    turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)[:, None]  # [T, 1, D/2]

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + params["norm_eps"]) * tensors[name].float()

    def rotated(x: Tensor) -> Tensor:  # [T, H, D]
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * turn).flatten(2)

    x = tensors["tok_embeddings.weight"][tokens].float()
    for i in range(params["n_layers"]):
        layer = {name: tensors[f"layers.{i}.{name}"].float() for name in LAYER.values()}
        h = norm(x, f"layers.{i}.attention_norm.weight")
        q = rotated((h @ layer["attention.wq.weight"].T).view(-1, heads, size))
        k = rotated((h @ layer["attention.wk.weight"].T).view(-1, groups, size)).repeat_interleave(heads // groups, 1)
        v = (h @ layer["attention.wv.weight"].T).view(-1, groups, size).repeat_interleave(heads // groups, 1)
        mixed = F.scaled_dot_product_attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True)
        x = x + mixed.transpose(0, 1).flatten(1) @ layer["attention.wo.weight"].T
        h = norm(x, f"layers.{i}.ffn_norm.weight")
        gate = F.silu(h @ layer["feed_forward.w1.weight"].T) * (h @ layer["feed_forward.w3.weight"].T)
        x = x + gate @ layer["feed_forward.w2.weight"].T
    return norm(x, "norm.weight") @ tensors["output.weight"].float().T
