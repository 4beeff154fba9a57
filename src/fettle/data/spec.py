"""What a recipe says about one source of data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fettle.core.spec import Spec

Format = Literal[
    "auto", "alpaca", "sharegpt", "messages", "completion", "text", "template", "labelled", "tagged", "preference"
]  # fmt: skip
Learn = Literal["assistant", "last", "all"]
Long = Literal["drop", "truncate", "error"]
Documents = Literal["auto", "line", "block", "file"]


class DataSpec(Spec):
    """One source: where it lies, how its rows read, how much of it is used, and what is learned from it."""

    path: str = Field(description="a file, a folder, a glob, or hf://owner/name (needs the extra fettle[hub])")
    format: Format = Field(
        "auto", description="how a row reads; 'auto' looks at the first rows and prints what it found"
    )
    template: str | None = Field(
        None, description="Jinja over the row's columns, for any other columns; '|||' stands between input and answer"
    )
    chat: bool | None = Field(
        None,
        description="whether a prompt and its completion are rendered by the chat template as a user's and an "
        "assistant's turn; left out: yes for 'template', no for 'completion'",
    )
    learn: Learn = Field("assistant", description="every assistant turn, the last assistant turn only, or every token")
    documents: Documents = Field(
        "auto",
        description="plain text only: one document a line, a block between blank lines, or a file; 'auto' takes "
        "blocks where the first MiB of the file holds a blank line between two others, else lines",
    )
    weight: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="this source's share of an epoch's examples"
    )
    cap: int | None = Field(
        None, gt=0, description="at most this many examples an epoch (examples-proportional mixing)"
    )
    limit: int | None = Field(None, gt=0, description="read at most this many rows")
    long: Long = Field("drop", description="what happens to a conversation longer than a row of the batch")
    max_bad: float = Field(0.01, ge=0, le=1, description="the share of bad rows above which the run ends")
    name: str | None = Field(None, description="hub only: the configuration")
    split: str = Field("train", description="hub only: the split")
    revision: str | None = Field(None, description="hub only: the commit, branch or tag")

    @model_validator(mode="after")
    def _agree(self) -> DataSpec:
        if self.template is not None and self.format not in ("auto", "template"):
            raise ValueError(f"'template' goes with format: template, not with format: {self.format}")
        if self.format == "template" and self.template is None:
            raise ValueError(
                "format: template needs the key 'template', a Jinja text such as '{{ question }} ||| {{ answer }}'"
            )
        if self.weight is not None and self.cap is not None:
            raise ValueError("'weight' and 'cap' are two rules of mixing; give one of them")
        return self

    @property
    def is_hub(self) -> bool:
        """Whether the rows come from the Hugging Face hub."""
        return self.path.startswith("hf://")
