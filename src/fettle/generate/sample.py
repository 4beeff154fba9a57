"""Generation: text for prompts of uneven lengths, in batches or as a stream.

Greedy text equals `model.generate` of transformers, and what is sampled for a request depends on its seed alone: not on which
other requests run beside it, nor on how many. (Both up to the last bits of a matrix product, which may differ with the number
of its rows: in 16 bits, where two tokens are equally likely, that can decide.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from fettle.core import FettleError
from fettle.generate import engine, padded
from fettle.generate.memory import Memory
from fettle.generate.request import Completion as Completion
from fettle.generate.request import Limits, Request, check_prompts, limits
from fettle.generate.request import Sampling as Sampling
from fettle.generate.request import end_tokens as end_tokens
from fettle.generate.text import TextOut
from fettle.models.forest import context_length as context_length

if TYPE_CHECKING:
    from fettle.models.forest import Forest


def generate(
    forest: Forest,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | None = None,
    *,
    n: int = 1,
    seeds: Sequence[int] | None = None,
    rows: int = 64,
    batch_tokens: int = 16384,
    progress: Callable[[int], None] | None = None,
) -> list[Completion]:
    """n answers to each prompt (token ids): answer j to prompt i is number i * n + j. Prompts that are alike are read once.

    `seeds` gives each answer a number of its own in place of that. At most `rows` requests run at once, and only so many that
    count x (longest prompt + max_tokens) stays below `batch_tokens`, which bounds the cache. `progress(k)`: k more have ended.
    """
    sampling = sampling or Sampling()
    count = len(prompts) * n
    if n < 1 or seeds is not None and len(seeds) != count:
        raise FettleError(
            f"generate: {len(seeds or ())} seeds for {len(prompts)} prompts and n {n}; n is 1 or more, and each answer takes a seed"
        )
    numbers = range(count) if seeds is None else seeds
    requests = [Request(i, list(prompts[i // n]), numbers[i], sampling.max_tokens) for i in range(count)]
    bounds = limits(forest, sampling)
    done: dict[int, Completion] = {}
    for request in answered(forest, requests, bounds, rows, batch_tokens):
        done[request.index] = bounds.completion(request)
        if progress:
            progress(1)
    return [done[i] for i in range(count)]


def answered(
    forest: Forest, requests: Sequence[Request], bounds: Limits, rows: int = 64, batch_tokens: int = 16384
) -> Iterator[Request]:
    """The requests as they end. The longest prompts begin, so that rows of like length run together."""
    check_prompts(forest, requests)
    waiting = sorted(requests, key=lambda r: len(r.prompt), reverse=True)
    while waiting:
        longest = len(waiting[0].prompt) + max(r.most for r in waiting)
        together = max(1, min(rows, batch_tokens // longest))
        if engine.obstacle(forest) is None:
            yield from engine.run(forest, waiting, bounds, together)
            return
        together = min(together, padded.may_share(forest, [len(r.prompt) for r in waiting], longest))
        group, waiting = waiting[:together], waiting[together:]
        yield from (request for request, _ in padded.run(forest, group, bounds) if request.reason)


def stream(
    forest: Forest,
    prompt: Sequence[int],
    sampling: Sampling | None = None,
    memory: Memory | None = None,
    *,
    number: int = 0,
) -> Iterator[str]:
    """The answer to one prompt, piece by piece; never half a character, never a part of a stop text.

    It draws from (seed, number). With a `memory` of the turns before, only what they did not hold is computed.
    """
    sampling = sampling or Sampling()
    bounds = limits(forest, sampling)
    request = Request(0, list(prompt), number, sampling.max_tokens)
    check_prompts(forest, [request])
    out = TextOut(forest.tokenizer, sampling.stop)
    for _, token in padded.run(forest, [request], bounds, memory):
        if token not in bounds.ends and (piece := out.push(token)):
            yield piece
        if request.reason and (rest := out.finish()):
            yield rest
