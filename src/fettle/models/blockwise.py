"""Running a model one block at a time, over many batches, with the states between two blocks kept and nothing else.

Every block but one is told to return what it is given, and the one at work is given the states that are kept. All the
rest is the model's own doing: masks, positions, and what it hands to some of its blocks only come from its own forward
pass over the batch, whatever the architecture. It costs an embedding and a norm a pass, and no table of what a block
wants.

A model whose blocks hand on more than their states (T5's position bias), or that has two stacks, is not its blocks in a
row. That is seen in a trial (`obstacle`) before anything is built on it.

States: of each batch a list of tensors, one for each time that the block is called for it (once; more where a model
runs the texts of a batch one by one), in memory or in files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fettle.core.batch import Batch
from fettle.core.errors import FettleError
from fettle.core.files import make_folder, writing
from fettle.models.blocks import blocks, first
from fettle.models.forest import Forest

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the states' spread; 0.05 for narrower types


class Blockwise:
    """The blocks of a model in a row, at work on some batches; `at` is the block that the kept states enter."""

    def __init__(self, forest: Forest, batches: Sequence[Batch], folder: Path | None = None) -> None:
        self.forest, self.batches, self.folder = forest, tuple(batches), folder
        self.names = [block.name for block in blocks(forest.model)]
        self.at = 0
        self._forms: dict[str, int] = {}  # by block, how many things it returns; 0 for a bare tensor
        self._states: list[list[Tensor]] = []

    @property
    def block(self) -> nn.Module:
        """The block at work."""
        return self.forest.model.get_submodule(self.names[self.at])

    @torch.no_grad()
    def obstacle(self) -> str | None:
        """Why the model is not its blocks in a row, shown by a trial over two batches in turn; None where it is."""
        name = type(self.forest.model).__name__
        if self.forest.config.is_encoder_decoder:
            return f"{name} has two stacks of blocks"
        rows = self.batches[:2]
        expected = [state for batch in rows for state in self._plain(batch)]
        if missing := [n for n in self.names if n not in self._forms]:
            return f"{missing[0]} takes no part in a forward pass of {name}"
        states = [self._entering(batch) for batch in rows]
        try:
            for i in range(len(self.names)):
                states = [self._computed(i, batch, own) for batch, own in zip(rows, states, strict=True)]
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            return f"the blocks of {name} do not run alone ({str(error).strip().splitlines()[0]})"
        found = [state for own in states for state in own]
        apart = max(float((a - b).abs().max() / b.std()) for a, b in zip(found, expected, strict=True))
        allowed = TOLERANCE.get(found[0].dtype, 0.05)
        return None if apart <= allowed else f"the blocks of {name} hand on more than their states"

    @torch.no_grad()
    def start(self) -> None:
        """Compute the states that enter the first block."""
        if not self._forms:
            self._plain(self.batches[0])
        self.at, self._states = 0, []
        for j, batch in enumerate(self.batches):
            self._states.append([self._held(state, j, k) for k, state in enumerate(self._entering(batch))])

    def run(self, j: int) -> list[Tensor]:
        """What the block at work returns for batch `j`."""
        return self._computed(self.at, self.batches[j], self._states[j])

    def entering(self, j: int) -> list[Tensor]:
        """The states of batch `j` that enter the block at work."""
        return self._states[j]

    @torch.no_grad()
    def advance(self) -> None:
        """Go on to the next block: what the block at work returns takes the place of what entered it."""
        if self.at + 1 < len(self.names):
            for j in range(len(self.batches)):
                for state, made in zip(self._states[j], self.run(j), strict=True):
                    state.copy_(made)
        self.at += 1

    def bytes(self) -> int:
        """What the states of all batches take, as far as the first tells of a token."""
        if not self._forms:
            self._plain(self.batches[0])
        first_one = sum(s.numel() * s.element_size() for s in self._entering(self.batches[0]))
        return first_one * sum(len(batch.tokens) for batch in self.batches) // len(self.batches[0].tokens)

    # How.

    def _computed(self, at: int, batch: Batch, states: Sequence[Tensor]) -> list[Tensor]:
        with self._alone(at, states) as outputs:
            self.forest.hidden(batch)
        return outputs

    def _held(self, state: Tensor, j: int, k: int) -> Tensor:
        if self.folder is None:
            return state
        path = make_folder(self.folder) / f"{j}-{k}"
        with writing(path):
            kept = torch.from_file(str(path), shared=True, size=state.numel(), dtype=state.dtype)  # type: ignore[call-overload]
        return kept.view(state.shape).copy_(state)  # type: ignore[no-any-return]

    def _plain(self, batch: Batch) -> list[Tensor]:
        """What the last block returns in a plain forward pass; learns what each block returns."""
        last: list[Tensor] = []

        def seen(name: str, out: Any) -> None:
            self._forms[name] = len(out) if isinstance(out, tuple) else 0
            if name == self.names[-1]:
                last.append(first(out).detach())

        handles = [
            self.forest.model.get_submodule(name).register_forward_hook(lambda _, __, out, n=name: seen(n, out))
            for name in self.names
        ]
        try:
            with torch.no_grad():
                self.forest.hidden(batch)
        finally:
            for handle in handles:
                handle.remove()
        return last

    @torch.no_grad()
    def _entering(self, batch: Batch) -> list[Tensor]:
        found: list[Tensor] = []

        def take(state: Tensor) -> Tensor:
            found.append(state.detach().clone())
            return state

        with self._through(lambda name: take if name == self.names[0] else None):
            self.forest.hidden(batch)
        if not found:
            raise FettleError(f"{self.names[0]} was not called in a forward pass over the calibration text")
        return found

    @contextmanager
    def _alone(self, at: int, states: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Within it only block `at` computes: its calls, in order, on `states`. Gives the list of what it returns."""
        outputs: list[Tensor] = []
        module = self.forest.model.get_submodule(self.names[at])
        plain = module.forward

        def work(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = _with(args, kwargs, states[len(outputs)].to(self.forest.device))
            out = plain(*args, **kwargs)
            outputs.append(first(out))
            return out

        with self._through(lambda name: None, but=self.names[at]), _replaced(module, work):
            yield outputs

    @contextmanager
    def _through(self, see: Callable[[str], Callable[[Tensor], Tensor] | None], but: str = "") -> Iterator[None]:
        """Within it all blocks but one return what they are given."""
        with ExitStack() as stack:
            for name in (n for n in self.names if n != but):
                form, eye = self._forms.get(name, 0), see(name)

                def give_back(*args: Any, form: int = form, eye: Any = eye, **kwargs: Any) -> Any:
                    state = args[0] if args else kwargs["hidden_states"]
                    state = eye(state) if eye else state
                    return (state, *[None] * (form - 1)) if form else state

                stack.enter_context(_replaced(self.forest.model.get_submodule(name), give_back))
            yield


def _with(args: tuple[Any, ...], kwargs: dict[str, Any], state: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's arguments with other states."""
    return ((state, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": state})


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within it a module computes something else."""
    own = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]
