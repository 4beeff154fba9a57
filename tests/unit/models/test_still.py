"""What is derived from weights is kept while they are still, and no longer."""

from __future__ import annotations

import torch

from fettle.models.still import derived, still


def test_kept_within_and_only_there() -> None:
    made: list[int] = []

    def make() -> int:
        made.append(len(made))
        return made[-1]

    kept: dict = {}
    with torch.no_grad():
        assert (derived("a", make), derived("a", make)) == (0, 1)
        with still(kept):
            assert [derived("a", make), derived("b", make), derived("a", make)] == [2, 3, 2]
        with still(kept):
            assert derived("a", make) == 2
        with still({}):
            assert derived("a", make) == 4
        assert derived("a", make) == 5
    with still(kept):  # what has a gradient is of this pass
        assert derived("a", make) == 6
