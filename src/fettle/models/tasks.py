"""What a model is for: a language model, or one with a head that gives labels to texts or to words.

A head is all of a model outside of its body, and a pooler where the checkpoint brings none. What a checkpoint lacks is drawn
at random, by the spec's seed, and listed on the model as `fettle_new`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import nn

from fettle.core.errors import FettleError
from fettle.models.spec import ModelSpec

Task = Literal["causal", "classify", "tag"]
CLASSES: dict[str, str] = {
    "causal": "AutoModelForCausalLM", "pairs": "AutoModelForSeq2SeqLM", "classify": "AutoModelForSequenceClassification",
    "tag": "AutoModelForTokenClassification",
}  # fmt: skip
ENDINGS: dict[str, Task] = {"ForSequenceClassification": "classify", "ForTokenClassification": "tag"}
NEW = "fettle_new"
PROBLEMS = {"one": "single_label_classification", "many": "multi_label_classification", "number": "regression"}


def task_of(model: Any) -> Task:
    """What a transformers model is for, by its class."""
    return _by_name(type(model).__name__)


def _by_name(name: str) -> Task:
    return next((task for ending, task in ENDINGS.items() if name.endswith(ending)), "causal")


def is_encoder(config: Any) -> bool:
    """Whether a model sees its whole text both ways: the architectures pretrained to fill in masked words."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if config.is_encoder_decoder or getattr(config, "is_decoder", False):
        return False
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def resolved(spec: ModelSpec, config: Any) -> ModelSpec:
    """The spec with its task and label names as they are, from the checkpoint's configuration where it says nothing.

    FettleError where there are no names, or where they are the checkpoint's own in another order.
    """
    own = _by_name(next(iter(config.architectures or ()), ""))
    task = own if spec.task == "auto" else spec.task
    if task == "causal":
        return spec.model_copy(update={"task": task})
    if config.is_encoder_decoder:
        raise FettleError(
            f"model.task: {task} needs an encoder or a decoder, and '{config.model_type}' is an encoder-decoder; let it write "
            "the label instead, from rows with prompt and completion"
        )
    names = tuple(config.id2label[i] for i in sorted(config.id2label)) if own == task else ()
    labels = spec.labels or names
    if not labels:
        raise FettleError(
            f"model.labels: the checkpoint has no head for task: {task}; name its labels, as in [no, yes]"
        )
    if spec.labels and names != spec.labels and set(names) == set(spec.labels):
        raise FettleError(
            f"model.labels: the checkpoint's head has these labels in another order ({', '.join(names)}), so each would be "
            "taken for another; write them in that order, or leave them out"
        )
    multi = spec.multi or own == task and getattr(config, "problem_type", None) == PROBLEMS["many"]
    return spec.model_copy(update={"task": task, "labels": labels, "multi": multi})


def lacks_labels(spec: ModelSpec, config: Any) -> bool:
    """Whether a spec asks for a head whose labels neither it nor the checkpoint names."""
    own = _by_name(next(iter(config.architectures or ()), ""))
    return spec.task in ENDINGS.values() and spec.labels is None and own != spec.task


def headed(config: Any, spec: ModelSpec) -> Any:
    """A configuration with the labels of a resolved spec."""
    if spec.task == "causal" or not spec.labels:
        return config
    config.id2label = dict(enumerate(spec.labels))
    config.label2id = {name: i for i, name in enumerate(spec.labels)}
    if spec.task == "classify":
        config.problem_type = PROBLEMS["many" if spec.multi else "one" if len(spec.labels) > 1 else "number"]
    return config


def auto_class(spec: ModelSpec, config: Any) -> Any:
    """The transformers class that builds a model of a resolved spec."""
    import transformers

    kind = "pairs" if spec.task == "causal" and config.is_encoder_decoder else spec.task
    return getattr(transformers, CLASSES[kind])


def own_problems(model: Any, report: dict[str, Any]) -> dict[str, list[str]]:
    """A loading report without what may differ in a model with a head, which is listed on the model as new."""
    names = {
        key: sorted(_key(k) for k in report.get(key) or ())
        for key in ("missing_keys", "mismatched_keys", "unexpected_keys")
    }
    if task_of(model) == "causal":
        return names
    prefix = f"{model.base_model_prefix}."

    def outside(name: str) -> bool:
        return not name.startswith(prefix) or name.startswith(f"{prefix}pooler.")

    new = {name for key in ("missing_keys", "mismatched_keys") for name in names[key] if outside(name)}
    setattr(model, NEW, frozenset(new))
    return {key: [name for name in found if not outside(name)] for key, found in names.items()}


def _key(entry: Any) -> str:
    return str(entry[0] if isinstance(entry, tuple) else entry)


def head_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model's head by name; none for a language model, whose head is its output embedding."""
    if task_of(model) == "causal":
        return {}
    prefix = f"{model.base_model_prefix}."
    new: frozenset[str] = getattr(model, NEW, frozenset())
    return {
        name: p for name, p in model.named_parameters()
        if name in new or not name.startswith((prefix, "fettle_"))
    }  # fmt: skip


def head_note(model: nn.Module, spec: ModelSpec) -> str | None:
    """A line about a head that was drawn at random; None where the checkpoint brought it."""
    new = sorted(getattr(model, NEW, ()))
    if not new:
        return None
    return (
        f"{Path(spec.path).name}: has no head for these labels ({', '.join(spec.labels or ())}); {', '.join(new)} begin at random "
        f"(seed {spec.seed}) and train"
    )
