"""Where the recipes that come with fettle lie."""

from __future__ import annotations

from pathlib import Path

import fettle
from fettle.core.errors import FettleError


def recipe_file(name: str) -> Path:
    """A recipe that comes with fettle: in the checkout, or installed with the package."""
    package = Path(fettle.__file__).parent
    for folder in (package.parents[1] / "recipes", package / "recipes"):
        if (folder / name).is_file():
            return folder / name
    raise FettleError(f"recipe '{name}': not found in {package / 'recipes'}; the installation is incomplete")
