"""fettle adapts pretrained language models: a list of edits, an objective over batches, an artifact.

    import fettle
    recipe = fettle.Recipe(model="fettle/tiny", edits=[fettle.LoRA(rank=16)], data=[...], output="runs/mine")
    folder = fettle.run(recipe)

Names are looked up when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "AdamW": ("fettle.train", "OptimSpec"),
    "Batch": ("fettle.core.batch", "Batch"),
    "Classify": ("fettle.objectives", "Classify"),
    "DataSpec": ("fettle.data", "DataSpec"),
    "EvalSpec": ("fettle.evaluate", "EvalSpec"),
    "FettleError": ("fettle.core", "FettleError"),
    "Forest": ("fettle.models.forest", "Forest"),
    "Freeze": ("fettle.peft", "Freeze"),
    "Full": ("fettle.peft", "Full"),
    "LoRA": ("fettle.peft", "LoRA"),
    "AWQ": ("fettle.quantize", "AWQ"),
    "GPTQ": ("fettle.quantize", "GPTQ"),
    "NF4": ("fettle.quantize", "NF4"),
    "Quantize": ("fettle.stages", "Quantize"),
    "ModelSpec": ("fettle.models.spec", "ModelSpec"),
    "Recipe": ("fettle.stages", "Recipe"),
    "SFT": ("fettle.objectives", "SFT"),
    "Sampling": ("fettle.generate", "Sampling"),
    "Tag": ("fettle.objectives", "Tag"),
    "TaskHead": ("fettle.peft", "TaskHead"),
    "check": ("fettle.stages", "check"),
    "evaluate_tasks": ("fettle.evaluate", "evaluate"),
    "load_recipe": ("fettle.stages", "load_recipe"),
    "open_model": ("fettle.stages", "open_model"),
    "run": ("fettle.stages", "run"),
}

__all__ = ["__version__", *_HOME]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fettle' has no attribute '{name}'")
    module, attribute = _HOME[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
