"""Loading a model and its tokenizer: safetensors only, checked before anything opens.

What a folder can do to its reader is bounded here: names in an index must stay inside the folder, pickled weights are
refused, code that came with the model runs only with an opt-in and a pinned commit.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch import nn

import fettle
from fettle.core.errors import FettleError
from fettle.core.files import MANIFEST, read_json, sha256
from fettle.models.allocator import keep_pages
from fettle.models.encdec import JOIN
from fettle.models.experts import unstack
from fettle.models.forest import Forest
from fettle.models.lean import make_lean
from fettle.models.parts import left_out, name_body, quiet, split_other_parts
from fettle.models.proof import prove
from fettle.models.spec import EMBEDDED, ModelSpec
from fettle.models.tasks import auto_class, headed, own_problems, resolved

INDEX = "model.safetensors.index.json"
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
BESIDE = [
    "*.json",
    "*.jinja",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
]  # what reads words, and how it writes
_WHAT = {"config.json": "model", "tokenizer_config.json": "tokenizer"}
LONGEST = 400  # characters of a library's message
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def load(spec: ModelSpec) -> Forest:
    """The model that a spec names, on its device, in evaluation mode, nothing frozen."""
    device = pick_device(spec.device)
    dtype = pick_dtype(spec.dtype, device)
    if device.type == "cpu":
        keep_pages()
    else:
        torch.cuda.set_device(device)
    spec = resolved(spec, configuration(spec))
    model = random_model(spec, dtype) if spec.config is not None else pretrained(spec, dtype)
    tokenizer = load_tokenizer(spec)
    check_vocabulary(model, tokenizer)
    if model.config.is_encoder_decoder and not tokenizer.chat_template:  # type: ignore[union-attr]
        tokenizer.chat_template = JOIN
    model.to(device).eval()  # type: ignore[arg-type]
    if spec.experts == "linear":
        unstack(model)
    make_lean(model)
    if spec.gradient_checkpointing:
        checkpoint_layers(model)
    return prove(Forest(model, tokenizer, spec))


def checkpoint_layers(model: Any) -> None:
    """Keep only the input of each layer in a training pass, and compute the layer again in the backward pass."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise FettleError(
            f"model.gradient_checkpointing: {type(model).__name__} has no support for it ({error})"
        ) from None
    # transformers lets the embedding's output ask for a gradient, for the reentrant kind, which would draw the
    # backward pass through layers where nothing trains.
    model.disable_input_require_grads()


def pick_device(name: str) -> torch.device:
    """The device that a spec means; of several processes under torchrun each has the GPU of its number on the machine."""
    asked = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        device = torch.device(asked)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise FettleError(f"model.device: '{name}' is not a device of ours; use auto, cpu, cuda or cuda:<number>")
    if device.type == "cpu":
        return device
    number, there = device.index, torch.cuda.device_count()
    if number is None:  # a launcher may show each process its own alone
        shown = there == 1 and os.environ.get("CUDA_VISIBLE_DEVICES")
        number = 0 if shown else int(os.environ.get("LOCAL_RANK", "0"))
    if number >= there:
        raise FettleError(
            f"model.device: '{name}' means GPU number {number}, and there are {there} here; use auto or cpu, or as many processes as "
            "there are GPUs"
        )
    return torch.device("cuda", number)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that a spec means on a device."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if has_bf16_units() else torch.float32


def has_bf16_units() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def folder_of(path: str, revision: str | None = None, needs: str = "config.json") -> Path:
    """The local folder of a model: embedded, given, or fetched from the hub; `needs` is the file that makes it one."""
    if path == EMBEDDED:
        folder = Path(fettle.__file__).parent / "lab" / "tiny"
        if not (folder / "config.json").is_file():
            raise FettleError(
                f"{folder}: the embedded base is missing from this installation; build it with 'fettle lab base'"
            )
        return folder
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / needs).is_file():
            if (folder / MANIFEST).is_file() and (kind := read_json(folder / MANIFEST).get("format")):
                raise FettleError(
                    f"{folder}: an export to '{kind}', for other tools to load; here give the run or the model that it was made of"
                )
            if any((place / MANIFEST).is_file() for place in (folder, folder / "artifact")):
                raise FettleError(
                    f"{folder}: what a run left, and no model of its own; put the stage behind that run's in one recipe, or merge it first "
                    f"with 'fettle export {folder} --to hf'"
                )
            raise FettleError(f"{folder}: no {needs} in it, so it is not the folder of a {_WHAT[needs]}")
        return folder
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) or path.startswith("."):
        raise FettleError(
            f"model: there is no folder '{path}'; give a folder, a Hugging Face id (name/model) or '{EMBEDDED}'"
        )
    return _fetched(path, revision)


def _fetched(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=WANTED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FettleError(
            f"model: '{name}' is neither a folder here nor could it be fetched from the Hugging Face hub ({reason}); "
            f"check the spelling and the network, sign in with 'hf auth login' if it is gated, or use '{EMBEDDED}'"
        ) from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, every name checked to stay inside it."""
    if (folder / INDEX).is_file():
        listed = read_json(folder / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise FettleError(f"{folder / INDEX}: no 'weight_map' in it")
        for tensor, name in listed.items():
            if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
                raise FettleError(
                    f"{folder / INDEX}: the file of '{tensor}' is {name!r}; expected a plain *.safetensors name"
                )
        files = [folder / name for name in sorted(set(listed.values()))]
    else:
        files = [folder / "model.safetensors"]
    missing = [file for file in files if not file.is_file()]
    if missing:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLED)
        if pickled and not (folder / INDEX).is_file():
            raise FettleError(
                f"{folder}: the weights are pickled ({pickled[0]}), and unpickling runs code; convert them to safetensors first"
            )
        raise FettleError(f"{missing[0]}: no such file; the model folder is incomplete")
    return files


def base_hash(folder: Path) -> str:
    """One SHA-256 over the configuration and the weights of a model folder."""
    digest = hashlib.sha256()
    for file in [folder / "config.json", *weight_files(folder)]:
        digest.update(f"{file.name} {sha256(file)}\n".encode())
    return digest.hexdigest()


def identity_of_base(spec: ModelSpec) -> list[str | None]:
    """Hashes of what a spec names: the weights with their configuration (None for random ones), and all beside the tokenizer."""
    folder, digest = _folder_of_tokenizer(spec), hashlib.sha256()
    for file in sorted({file for name in BESIDE for file in folder.glob(name) if file.is_file()}):
        digest.update(f"{file.name} {sha256(file)}\n".encode())
    weights = base_hash(folder_of(spec.path, spec.revision)) if spec.config is None else None
    return [weights, digest.hexdigest()]


def pretrained(spec: ModelSpec, dtype: torch.dtype) -> nn.Module:
    """The pretrained model; FettleError where the folder does not hold exactly its weights."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # of a load that takes a second; what takes minutes has a bar of ours
    folder = folder_of(spec.path, spec.revision)
    weight_files(folder)
    config = headed(configuration(spec), spec)
    packed = _packed(folder, config)
    try:
        with torch.random.fork_rng(devices=[]), quiet(), packed.opening(config) if packed else nullcontext():
            torch.manual_seed(spec.seed)  # of a head that the checkpoint does not have
            model, report = auto_class(spec, config).from_pretrained(
                folder, config=config, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True,
                trust_remote_code=spec.trust_remote_code, ignore_mismatched_sizes=True,  # they are in the report
            )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise FettleError(f"{_damaged(folder) or folder}: the model cannot be loaded: {_whole(error)}") from error
    name_body(model)
    found = own_problems(model, report)
    if packed:
        found["unexpected_keys"] = packed.held(found["unexpected_keys"])
    found["unexpected_keys"], other = split_other_parts(model, config, found["unexpected_keys"])
    if other:
        said = f"{folder}: only the text part is loaded; left out: {left_out(other)}"
        Console(stderr=True, highlight=False).print(said, soft_wrap=True)
    for key, what in (
        ("missing_keys", "lacks"),
        ("mismatched_keys", "has in another shape"),
        ("unexpected_keys", "has, unasked,"),
    ):
        if names := found[key]:
            raise FettleError(
                f"{folder}: the checkpoint {what} {len(names)} of the weights of {type(model).__name__} ({', '.join(names[:3])}"
                f"{', ...' if len(names) > 3 else ''}); it belongs to another architecture or is damaged"
            )
    if packed:
        packed.fill(model)
    return model


class PackedCheckpoint(Protocol):
    """A checkpoint that holds some of its layers packed."""

    def opening(self, config: Any) -> AbstractContextManager[None]:
        """Within it, transformers builds a model of `config` with places for the packed layers."""

    def held(self, names: list[str]) -> list[str]:
        """Of the weights that transformers did not ask for, those that are no part of a packed layer."""

    def fill(self, model: nn.Module) -> None:
        """Put the packed layers in their places."""


# By the `quant_method` of a configuration: what reads such a folder. fettle.quantize adds what it reads.
packed_checkpoints: dict[str, Callable[[Path, dict[str, Any]], PackedCheckpoint]] = {}


def _packed(folder: Path, config: Any) -> PackedCheckpoint | None:
    """The reader of a folder whose configuration says that its weights are quantized; None for a dense one."""
    said = getattr(config, "quantization_config", None)
    if not said:
        return None
    method = said.get("quant_method")
    if method not in packed_checkpoints:
        known = ", ".join(packed_checkpoints)
        raise FettleError(
            f"{folder}: its weights are quantized by '{method}'; {known} can be read, others must be dequantized first"
        )
    return packed_checkpoints[method](folder, said)


def random_model(spec: ModelSpec, dtype: torch.dtype) -> nn.Module:
    """A model of `spec.config` with random weights, the same for the same seed; the vocabulary follows the tokenizer."""
    config = headed(configuration(spec), spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = auto_class(spec, config).from_config(config, dtype=torch.float32)
    kept = model.state_dict(keep_vars=True)
    for tensor in kept.values():  # others, as rotary frequencies, are float32 in a model that is read from a file too
        tensor.data = tensor.data.to(dtype) if tensor.is_floating_point() else tensor.data
    return model  # type: ignore[no-any-return]


def configuration(spec: ModelSpec) -> Any:
    """The transformers configuration that a spec means; FettleError where there is none."""
    from transformers import AutoConfig

    if spec.config is not None:
        settings = dict(spec.config)
        try:
            return AutoConfig.for_model(settings.pop("model_type"), **settings)
        except (ValueError, TypeError, KeyError) as error:
            raise FettleError(f"model.config: {_whole(error)}") from None
    folder = folder_of(spec.path, spec.revision)
    check_code(folder, spec.trust_remote_code)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FettleError(f"{folder}: the model cannot be loaded: {_whole(error)}") from error


def _whole(error: Exception) -> str:
    """What a library says, in one line and not without end."""
    said = " ".join(str(error).split())
    return said if len(said) <= LONGEST else f"{said[:LONGEST]} ..."


def _damaged(folder: Path) -> Path | None:
    """The first file of weights that cannot be opened."""
    for file in weight_files(folder):
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError):
            return file
    return None


def check_code(folder: Path, trusted: bool) -> None:
    """FettleError where a model needs code of its own and may not run it, or names code in another repository."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    config = read_json(folder / "config.json")
    auto, kind = config.get("auto_map"), config.get("model_type")
    if not auto:
        return
    if kind not in CONFIG_MAPPING_NAMES and not trusted:
        raise FettleError(
            f"{folder}: '{kind}' is no architecture of transformers and brings its own code; read that code, then set "
            f"trust_remote_code: true and revision: <the full commit that you read>"
        )
    elsewhere = [value for value in _strings(auto) if "--" in value]
    if elsewhere and trusted:
        raise FettleError(
            f"{folder / 'config.json'}: auto_map names code of another repository ('{elsewhere[0]}'), which is not pinned"
        )


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [s for v in inner for s in _strings(v)]


def load_tokenizer(spec: ModelSpec) -> Any:
    """The tokenizer that goes with a model."""
    from transformers import AutoTokenizer

    folder = _folder_of_tokenizer(spec)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FettleError(
            f"{folder}: the tokenizer cannot be loaded: {_whole(error)}; put its files there, or name another folder in "
            "model.tokenizer"
        ) from error


def _folder_of_tokenizer(spec: ModelSpec) -> Path:
    if spec.tokenizer:
        return folder_of(spec.tokenizer, needs="tokenizer_config.json")
    return folder_of(spec.path, spec.revision)


def check_vocabulary(model: nn.Module, tokenizer: Any) -> None:
    """FettleError where the tokenizer can produce an id that the embedding does not have."""
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= rows:
        raise FettleError(
            f"the tokenizer has ids up to {highest} but the model's embedding has {rows} rows; "
            f"this is another model's tokenizer, or the vocabulary was enlarged without the model"
        )
