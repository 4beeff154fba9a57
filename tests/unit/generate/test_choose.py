"""The choice of tokens: penalties by hand, the nucleus of a large vocabulary, rows that move."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import TopPLogitsWarper

from fettle.generate import Sampling
from fettle.generate.choose import HEAD, Chooser, nucleus
from fettle.generate.request import Request


def requests(*prompts: list[int]) -> list[Request]:
    return [Request(i, prompt, 100 + i, 5) for i, prompt in enumerate(prompts)]


def test_penalties_by_hand() -> None:
    logits = torch.tensor([[2.0, -1.0, 1.9, 0.0]] * 2)
    chooser = Chooser(Sampling(repetition_penalty=2.0, presence_penalty=0.5), logits, requests([0], [3]))
    chosen, logps = chooser.choose(
        logits, [0, 0]
    )  # 2 / 2 = 1.0 for the prompt's own token, and the other prompt's is 0
    assert chosen.tolist() == [2, 0]
    assert logps.tolist() == pytest.approx(logits[0].log_softmax(-1)[[2, 0]].tolist())  # the model's own
    # what was written counts for both: (1.9 / 2) - 0.5 = 0.45 and 2 / 2 - 0.5 = 0.5
    assert chooser.choose(logits, [1, 1])[0].tolist() == [0, 2]
    assert chooser.choose(logits, [2, 2])[0].tolist() == [0, 0]
    chooser.place(0, requests([1])[0])  # another request forgets what was there
    assert chooser.choose(logits, [0, 3])[0].tolist() == [0, 0]


def test_a_row_takes_along_what_its_choice_depends_on() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 50).expand(3, 50)
    warm = Sampling(temperature=1.5, repetition_penalty=1.5, presence_penalty=0.5)
    whole = Chooser(warm, logits, requests([1], [2], [3]))
    first, _ = whole.choose(logits, [0, 0, 0])
    moved = Chooser(warm, logits, requests([1], [2], [3]))
    assert torch.equal(moved.choose(logits, [0, 0, 0])[0], first)
    moved.move(2, 0)
    for count in range(1, 5):
        one, two = whole.choose(logits, [count] * 3)[0], moved.choose(logits[:2], [count] * 2)[0]
        assert two.tolist() == [int(one[2]), int(one[1])]


@pytest.mark.parametrize("flat", [False, True])
def test_the_nucleus_of_a_large_vocabulary(flat: bool) -> None:
    """Where the likeliest tokens do not reach the share, all are sorted."""
    torch.manual_seed(0)
    scores = torch.randn(4, 3 * HEAD) * (0.1 if flat else 4.0)
    found = nucleus(scores, 0.9)
    assert torch.equal(found, TopPLogitsWarper(0.9)(torch.zeros(4, 1, dtype=torch.long), scores.clone()))
    assert ((found > -torch.inf).sum(1) > HEAD).all() == flat


def test_equal_draws_for_equal_requests_whatever_the_rest() -> None:
    torch.manual_seed(0)
    logits = torch.randn(40, 64)
    warm = Sampling(temperature=1.0)
    together = Chooser(warm, logits, requests(*[[1]] * 40)).choose(logits, [0] * 40)[0]
    for i in (0, 7, 39):
        alone = Chooser(warm, logits[i : i + 1], [Request(0, [1], 100 + i, 9)])
        assert alone.choose(logits[i : i + 1], [0])[0].item() == together[i]


def test_a_draw_is_the_inverse_of_the_cumulated_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]] * 2)
    chooser = Chooser(Sampling(temperature=2.0, seed=9), logits, requests([1], [1]))
    reached = (logits[0] / 2).softmax(-1).double().cumsum(-1).numpy()
    for count in range(5):
        drawn, _ = chooser.choose(logits, [count, 4 - count])
        numbers = [np.random.default_rng([9, 100 + row]).random(5) for row in (0, 1)]
        assert drawn.tolist() == [
            int((numbers[0][count] > reached).sum()),
            int((numbers[1][4 - count] > reached).sum()),
        ]
