"""The text part of a checkpoint that also sees or hears: what of it a language model has no place for, and may leave out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

TEXT = ("language_model", "text_model")  # what checkpoints of several parts call the language model among them


def is_part(model: Any, config: Any) -> bool:
    """Whether a model was built from the text configuration inside a checkpoint's `config`, which has others beside it."""
    return bool(config.sub_configs) and model.config.model_type != config.model_type


def split_other_parts(model: Any, config: Any, unexpected: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of weights that a model did not take, as (those that nothing explains, those of the checkpoint's other parts).

    Another part is a module beside the text model and its body's own modules: one more layer, or one more weight of a module
    that is there, is none.
    """
    if not is_part(model, config):
        return list(unexpected), []
    own = {*TEXT, *dict(model.named_children()), *dict(model.base_model.named_children())}
    other = [name for name in unexpected if _part(name) not in own]
    return [name for name in unexpected if _part(name) in own], other


def _part(name: str) -> str:
    """The module that a weight belongs to: the first step of its name that is no mere wrapper."""
    return next((step for step in name.split(".") if step != "model"), name)


def left_out(names: Sequence[str]) -> str:
    """The other parts in one line: `vision_model (34 tensors), multi_modal_projector (2)`."""
    parts = Counter(_part(name) for name in names)
    (first, count), *more = parts.most_common()
    return ", ".join([f"{first} ({count} tensors)", *(f"{name} ({n})" for name, n in more)])


def name_body(model: Any) -> None:
    """Let `base_model` be the body where the class names an attribute that it lacks, as those of text parts may."""
    if not hasattr(model, model.base_model_prefix):
        bodies = [name for name, child in model.named_children() if hasattr(child, "base_model_prefix")]
        model.base_model_prefix = bodies[0] if len(bodies) == 1 else ""


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own report of a load, of which every line is either an error here or said in one line."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
