"""The embedded base that ships is whole, and a damaged one is noticed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fettle.core import FettleError
from fettle.core.files import MANIFEST, read_json
from fettle.lab.base import TINY, check_tiny


def test_the_shipped_base_verifies() -> None:
    assert check_tiny() == read_json(TINY / MANIFEST)["hash"]


def test_a_damaged_base_is_noticed(tmp_path: Path) -> None:
    copy = tmp_path / "tiny"
    shutil.copytree(TINY, copy)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(FettleError, match="safetensors"):
        check_tiny(copy)
