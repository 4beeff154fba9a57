"""Where the log-probabilities of the reference come from: a word of the objectives that have one."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Reference = Annotated[
    str,
    Field(
        min_length=1,
        description="the model that the policy is held to: 'off', the model with this stage's edits switched off; 'cached', its "
        "log-probabilities from before the first step, kept on disk; 'copy', a second model in memory; an artifact or a model "
        "by its folder, cached likewise; 'auto': off where all that trains can be switched off, else cached",
    ),
]
