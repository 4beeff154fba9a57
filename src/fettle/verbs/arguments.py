"""Arguments that verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipePath = Annotated[Path, typer.Argument(help="a recipe in YAML", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value, as in optim.lr=1e-4 or edits.0.rank=8", show_default=False)
]
ModelName = Annotated[str, typer.Argument(help="a run or artifact folder, a model folder, a hub id, or fettle/tiny")]
ArmsFile = Annotated[
    Path | None, typer.Option(help="a file of arms: what each changes in the recipe; default: every method")
]
OnlyArms = Annotated[list[str] | None, typer.Option(help="only this arm; may be given several times")]
