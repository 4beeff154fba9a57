"""The choice of the next token: penalties, filters, and a draw from each request's own random numbers.

    l <- penalised(l),  p = softmax(filtered(l / temperature)),  token = the first whose cumulated p exceeds u

u is number t of the sequence that belongs to (seed of the sampling, seed of the request), for token t of the answer: it depends
on nothing else, so neighbours, their number and their order change no sample. Rows are independent in every operation here.

Shapes: B rows that choose, R rows that there is room for, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fettle.generate.request import Request, Sampling

HEAD = 1024  # likeliest tokens among which the nucleus is looked for first: a whole vocabulary takes long to sort


class Chooser:
    """Chooses tokens for up to R rows, each of which belongs to a request; keeps for each row what its choice depends on.

    `draws` float64 [R, longest answer] are the request's numbers; `seen` bool [R, V] are the tokens of prompt and answer, `written`
    those of the answer: kept only where a penalty asks for them.
    """

    def __init__(
        self, sampling: Sampling, logits: Tensor, requests: Sequence[Request], most: int | None = None
    ) -> None:
        """Rows 0 .. R - 1 go to the requests. `logits` [R, V] are such as will come; `most`: the longest answer to come."""
        most = max(r.most for r in requests) if most is None else most
        self.sampling = sampling
        self.draws = np.zeros((len(requests), most)) if sampling.temperature else None
        self.seen = torch.zeros_like(logits, dtype=torch.bool) if sampling.repetition_penalty != 1 else None
        self.written = torch.zeros_like(logits, dtype=torch.bool) if sampling.presence_penalty else None
        for row, request in enumerate(requests):
            self.place(row, request)

    def place(self, row: int, request: Request) -> None:
        """Give a row to a request that has no answer yet."""
        if self.draws is not None:
            self.draws[row] = np.random.default_rng([self.sampling.seed, request.seed]).random(self.draws.shape[1])
        if self.seen is not None:
            self.seen[row] = False
            self.seen[row, torch.tensor(request.prompt, device=self.seen.device)] = True
        if self.written is not None:
            self.written[row] = False

    def move(self, source: int, target: int) -> None:
        """Give one row's request the place of another."""
        for kept in (self.draws, self.seen, self.written):
            if kept is not None:
                kept[target] = kept[source]

    def choose(self, logits: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The next token of rows 0 to B - 1, int64 [B], and the model's own log-probability of each, float32 [B].

        logits [B, V]; `counts` [B]: how many tokens each answer has.
        """
        plain = logits.float()
        scores = self._penalised(plain)
        chosen = self._drawn(scores, counts) if self.draws is not None else scores.argmax(-1)
        for marks in (self.seen, self.written):
            if marks is not None:
                marks[: len(chosen)].scatter_(1, chosen[:, None], True)
        return chosen, plain.gather(1, chosen[:, None])[:, 0] - plain.logsumexp(-1)

    def _penalised(self, scores: Tensor) -> Tensor:
        if self.seen is not None:
            scores = repeated(scores, self.seen[: len(scores)], self.sampling.repetition_penalty)
        if self.written is not None:
            scores = scores - self.written[: len(scores)] * self.sampling.presence_penalty
        return scores

    def _drawn(self, scores: Tensor, counts: Sequence[int]) -> Tensor:
        assert self.draws is not None
        reached = filtered(scores / self.sampling.temperature, self.sampling).softmax(-1).double().cumsum(-1)
        u = torch.from_numpy(self.draws[np.arange(len(scores)), counts]).to(scores.device)
        aim = (u * reached[:, -1])[:, None]
        return torch.searchsorted(reached, aim, right=True)[:, 0].clamp_max(scores.shape[-1] - 1)


def repeated(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """CTRL's repetition penalty (arXiv 1909.05858): scores [B, V] of `seen` tokens move towards being less likely."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def filtered(scores: Tensor, sampling: Sampling) -> Tensor:
    """Scores [B, V] with -inf at the tokens that top_k, top_p and min_p drop, in that order; one token always stays."""
    if 0 < sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k, -1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p < 1:
        scores = nucleus(scores, sampling.top_p)
    if sampling.min_p > 0:
        least = scores.amax(-1, keepdim=True) + np.log(sampling.min_p)
        scores = scores.masked_fill(scores < least, -torch.inf)
    return scores


def nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Keep the likeliest tokens of each row up to the one with which they reach `top_p` (Holtzman et al., arXiv 1904.09751).

    Only the likeliest are sorted; the whole vocabulary is where some row's do not reach it.
    """
    total = scores.logsumexp(-1, keepdim=True)
    for width in (min(HEAD, scores.shape[-1]), scores.shape[-1]):
        ordered, index = scores.topk(width, -1)
        share = (ordered - total).exp()
        before = share.cumsum(-1) - share
        if bool((before[:, -1] >= top_p).all()):
            break
    kept = ordered.masked_fill(before >= top_p, -torch.inf)
    return torch.full_like(scores, -torch.inf).scatter_(-1, index, kept)
