"""What an example is made into for a model that is not a plain causal language model: pairs, labelled texts, tagged words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from fettle.core.batch import Example
from fettle.core.errors import FettleError
from fettle.core.spec import nearest

if TYPE_CHECKING:
    from fettle.data.formats import Sample
    from fettle.data.spec import DataSpec
    from fettle.data.template import Encoded, Encoder
    from fettle.models.forest import Forest

LABELLED = {"labelled": "classify", "tagged": "tag"}  # formats whose rows bring labels, and the task they are for


class Form(Protocol):
    """How samples become examples. A form is a value: its `identity` decides what a cache of its examples is called."""

    @property
    def labels(self) -> bool:
        """Whether examples bring labels, so that a template's second part is one and no answer."""
        ...

    @property
    def longest(self) -> int | None:
        """Tokens of an example that the model can see; None where there is no bound, or each part of it has its own."""
        ...

    def identity(self) -> list[Any]:
        """All that decides what a sample becomes."""
        ...

    def format(self, spec: DataSpec, rows: Sequence[dict[str, Any]]) -> str:
        """The format of a source, by its spec or its first rows; FettleError where this form has no use for it."""
        ...

    def encode(self, encoder: Encoder, samples: Sequence[Sample]) -> list[list[Encoded] | str]:
        """Each sample's examples, or why there are none."""
        ...

    def example(self, encoded: Encoded, stop: int) -> Example:
        """One example as it is packed, its tokens up to `stop`; its name is left to the caller."""
        ...


def form_of(forest: Forest, wanted: str = "text") -> Form | None:
    """The form that examples have for a model and an objective's `form`; None for a causal language model that learns text.

    FettleError where the model cannot see answers below their prompt.
    """
    from fettle.data.labelled import Labelled
    from fettle.data.pairs import Pairs
    from fettle.data.preference import Preference
    from fettle.data.tagged import Tagged

    config = forest.config
    if wanted != "text":
        if config.is_encoder_decoder or forest.sees_ahead:
            raise FettleError(
                f"objective: {type(forest.model).__name__} does not read from left to right, so answers cannot stand below one "
                "prompt; preferences need a causal language model"
            )
        return Preference(wanted == "compared", forest.context)
    if config.is_encoder_decoder:
        return Pairs.of(forest.tokenizer, forest.context)
    if forest.task == "causal":
        return None
    names = tuple(config.id2label[i] for i in sorted(config.id2label))
    causal, bound, end = not forest.sees_ahead, forest.context, last_special(forest.tokenizer)
    if forest.task == "tag":
        return Tagged(names, causal, bound, end)
    typed = forest.sees_ahead and int(getattr(config, "type_vocab_size", 0) or 0) > 1
    many = getattr(config, "problem_type", None) == "multi_label_classification"
    return Labelled(names, many, causal, typed, bound, end)


def last_special(tokenizer: Any) -> int | None:
    """The special token that a tokenizer puts at the end of a text; None where it puts none."""
    last = int(tokenizer("a")["input_ids"][-1])
    return last if last in tokenizer.all_special_ids else None


def label_number(label: Any, names: Sequence[str]) -> int | str:
    """The number of a label given by name or number, or why it is none."""
    if isinstance(label, str) and label in names:
        return names.index(label)
    if isinstance(label, str):
        if not label.strip().isdecimal():
            return f"unknown label '{label[:40]}': {nearest(label, names)}"
        label = int(label)
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, bool):
        label = int(label) if len(names) == 2 else label
    if isinstance(label, bool) or not isinstance(label, int):
        return f"a label must be a name or a number, found {label!r}"[:120]
    if not 0 <= label < len(names):
        return f"label {label}, and there are {len(names)} labels (0 to {len(names) - 1}: {', '.join(names)[:80]})"
    return label


def check_format(
    spec: DataSpec, own: str, rows: Sequence[dict[str, Any]], columns: Sequence[set[str]], extra: tuple[str, ...] = ()
) -> str:
    """`own`, the format of a task's rows, or one of `extra` that the spec names; FettleError where neither is there."""
    if spec.template is not None and "template" in extra:
        return "template"
    if spec.format in (own, *extra):
        return spec.format
    if spec.format != "auto" or spec.template is not None:
        raise FettleError(
            f"{spec.path}: format: {'template' if spec.template is not None else spec.format} has no use with model.task: "
            f"{LABELLED[own]}; its rows are of format: {own}"
        )
    if any(wanted <= row.keys() for row in rows for wanted in columns):
        return own
    found = ", ".join(sorted({str(key) for row in rows for key in row})) or "none"
    raise FettleError(
        f"{spec.path}: model.task: {LABELLED[own]} needs rows with the columns {' and '.join(sorted(columns[0]))}; found {found}"
    )
