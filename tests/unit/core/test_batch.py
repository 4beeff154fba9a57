"""Packing: what is predicted where, and who sees whom."""

import numpy as np
import pytest
import torch

from fettle.core.batch import IGNORE, Example, Node, Segment, pack, visible
from fettle.core.errors import FettleError


def node(tokens: list[int], weights: list[float], parent: int = -1, causal: bool = True) -> Node:
    return Node(np.array(tokens, np.int32), np.array(weights, np.float32), parent, causal)


def test_targets_are_the_next_learned_token_of_the_same_segment() -> None:
    batch = pack([Example((node([5, 6, 7], [1, 0, 1]),), "a:1"), Example((node([8, 9], [1, 0.5]),), "b:2")], 8, pad=0)
    assert batch.tokens.tolist() == [5, 6, 7, 8, 9, 0, 0, 0]
    assert batch.targets.tolist() == [IGNORE, 7, IGNORE, 9, IGNORE, IGNORE, IGNORE, IGNORE]
    assert batch.weights.tolist() == [0, 1, 0, 0.5, 0, 0, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
    assert batch.names == ("a:1", "b:2", "") and batch.useful == 5


def test_a_child_goes_on_from_its_parent() -> None:
    tree = Example((node([1, 2], [0, 0], causal=False), node([3, 4], [1, 1], parent=0)), "t")
    batch = pack([tree], 4, pad=0)
    assert batch.positions.tolist() == [0, 1, 2, 3]
    assert batch.targets.tolist() == [IGNORE, 3, 4, IGNORE]


def test_two_children_cannot_ask_one_position() -> None:
    tree = Example((node([1, 2], [0, 0]), node([3], [1], 0), node([4], [1], 0)), "t")
    with pytest.raises(FettleError, match="same position"):
        pack([tree], 8, pad=0)


def test_too_long_is_refused_by_name() -> None:
    with pytest.raises(FettleError, match="t:7"):
        pack([Example((node([1] * 9, [1] * 9),), "t:7")], 8, pad=0)


def test_visible_is_ancestors_and_self() -> None:
    segments = (Segment(0, 2, causal=False), Segment(2, 4, 0), Segment(4, 5, 0), Segment(5, 6, 1), Segment(6, 7))
    expected = [
        "1100000",
        "1100000",
        "1110000",
        "1111000",
        "1100100",
        "1111010",
        "0000001",
    ]
    assert visible(segments, 7).int().tolist() == [[int(c) for c in row] for row in expected]
    assert visible(segments, 7).dtype == torch.bool
