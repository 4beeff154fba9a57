"""ModelSpec: which model, at which precision, on which device, with which attention."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from fettle.core.spec import Spec

EMBEDDED = "fettle/tiny"


def _as_tuple(value: Any) -> Any:
    """What the validator below hands on is no longer JSON, where a list stands for a tuple."""
    return tuple(value) if isinstance(value, list) else value


class ModelSpec(Spec):
    """A model of `transformers`. In a recipe a plain string stands for `path`."""

    plain: ClassVar[str | None] = "path"

    path: str = Field(EMBEDDED, description="'fettle/tiny' (the embedded base), a folder, or a Hugging Face id")
    revision: str | None = Field(None, description="branch, tag or commit of a Hugging Face id")
    trust_remote_code: bool = Field(
        False, description="run code that came with the model; needs a full commit as revision"
    )
    task: Literal["auto", "causal", "classify", "tag"] = Field(
        "auto",
        description="causal: a language model (or encoder-decoder), classify: labels for texts, tag: labels for words; auto: "
        "what the checkpoint's architecture says",
    )
    labels: Annotated[tuple[str, ...] | None, BeforeValidator(_as_tuple)] = Field(
        None, min_length=1, description="names of the labels, in order; one name alone is a number to predict"
    )
    multi: bool = Field(False, description="classify only: a text may have several labels, or none")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 on a GPU and on a CPU with bfloat16 units, else float32"
    )
    attention: Literal["auto", "dense", "segments", "flex", "varlen", "paths"] = "auto"
    experts: Literal["stacked", "linear"] = Field(
        "stacked",
        description="of a mixture; linear: three linear layers an expert, which quantizers and adapters reach",
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    gradient_checkpointing: bool = False
    config: dict[str, Any] | None = Field(
        None,
        description="a transformers configuration (with model_type) to start from random weights instead of `path`",
    )
    tokenizer: str | None = Field(None, description="folder or id of the tokenizer; default: the model's own")
    seed: int = Field(0, ge=0, description="seed of the random weights, where `config` is given")

    @model_validator(mode="before")
    @classmethod
    def _plain_string(cls, data: Any) -> Any:
        return {cls.plain: data} if isinstance(data, str) else data

    @model_serializer(mode="wrap")
    def _without_path(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `path` where `config` stands for it, so that what a manifest says can be read again."""
        found: dict[str, Any] = plain(self)
        if self.config is not None:
            found.pop("path", None)
        return found

    @model_validator(mode="after")
    def _consistent(self) -> ModelSpec:
        if self.labels is not None:
            if self.task not in ("classify", "tag"):
                raise ValueError("'labels' go with task: classify or task: tag")
            if len(set(self.labels)) < len(self.labels):
                raise ValueError(f"labels: a name stands twice in {list(self.labels)}")
        if self.multi and self.task != "classify":
            raise ValueError("'multi' goes with task: classify")
        if self.trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            raise ValueError(
                f"trust_remote_code runs code from the internet and needs 'revision' to be a full commit "
                f"(40 hex digits), found {self.revision!r}"
            )
        if self.config is not None:
            if "model_type" not in self.config:
                raise ValueError("config: the key 'model_type' is missing, as in {model_type: llama, hidden_size: 256}")
            if "path" in self.model_fields_set:
                raise ValueError(
                    "'path' and 'config' exclude each other: the first loads weights, the second draws them"
                )
            if self.tokenizer is None:
                raise ValueError("a model from 'config' needs 'tokenizer': a folder or a Hugging Face id")
        return self
