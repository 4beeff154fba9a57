"""lm-eval's tasks on a Forest (EleutherAI's harness, the extra `fettle[eval]`).

scores(forest, ["arc_easy"], shots=0)                 tasks that the harness knows (its data is fetched)
scores(forest, ["mine"], include=Path("my_tasks/"))   tasks of your own, as yaml files beside their data
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fettle.core import FettleError
from fettle.evaluate.likelihood import from_tokens, likelihoods
from fettle.generate.prompts import prompter
from fettle.generate.sample import Sampling, generate
from fettle.generate.text import cut_at

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise FettleError("lm-eval tasks need the extra: pip install 'fettle[eval]'") from error

if TYPE_CHECKING:
    from fettle.models.forest import Forest


class ForestLM(TemplateLM):  # type: ignore[misc]
    """A Forest as the harness sees a model."""

    def __init__(self, forest: Forest, max_tokens: int = 256):
        super().__init__()
        self.forest, self.tokenizer, self.max_tokens = forest, forest.tokenizer, max_tokens
        self.prompter = prompter(forest.tokenizer)
        self.bound = forest.context or 2048

    @property
    def eot_token_id(self) -> int:
        """The end token; it also stands before a text that nothing precedes, where there is no start token."""
        found = self.tokenizer.eos_token_id
        if found is None:
            raise FettleError("lm-eval needs a tokenizer with an end token")
        return int(found)

    @property
    def prefix_token_id(self) -> int:
        """What a text without context follows."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else int(self.tokenizer.bos_token_id)

    @property
    def tokenizer_name(self) -> str:
        """Marks the harness's request cache: the same tokenizer and template, the same requests."""
        return f"{self.forest.spec.path}--{self.prompter.template_hash[:16]}".replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template in use, as the harness records it."""
        return self.prompter.encoder.template.text if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text, by the template that training uses."""
        return self.prompter.encoder.render(chat_history, prompt=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; the start token comes first unless it is turned off or the text brings it."""
        ids, prefix = self.prompter.encoder.ids(string), self.prompter.encoder.prefix
        bare = add_special_tokens is False or (add_special_tokens is None and ids[: len(prefix)] == prefix)
        return ids if bare else [*prefix, *ids]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        asked = []
        for i, (_texts, context, continuation) in enumerate(requests):
            room = self.bound + 1 - len(continuation)  # the last token is predicted, never read
            if room < 1:
                raise FettleError(
                    f"lm-eval: a continuation has {len(continuation)} tokens, the model sees {self.bound} at most"
                )
            asked.append(from_tokens([(context[-room:], continuation)], f"lm-eval request {i}"))
        return [found[0] for found in likelihoods(self.forest, asked, top=True)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in the harness's own windows."""
        texts = []
        for request in requests:
            tokens = self.prompter.encoder.ids(request.args[0])
            pairs = get_rolling_token_windows(tokens, self.prefix_token_id, self.bound, context_len=1)
            texts.append([(None, *make_disjoint_window(pair)) for pair in pairs])
        found = iter(self._loglikelihood_tokens([window for windows in texts for window in windows]))
        return [math.fsum(next(found)[0] for _ in windows) for windows in texts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers up to the first of the stop texts; a prompt that leaves no room loses its beginning, as in the harness."""
        answers: dict[int, str] = {}
        groups: dict[Sampling, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(self._sampling(request.args[1]), []).append(i)
        for sampling, index in groups.items():
            room = self.bound - sampling.max_tokens
            if room < 1:
                raise FettleError(
                    f"lm-eval: max_gen_toks {sampling.max_tokens} leaves no room for a prompt, the model sees {self.bound} tokens "
                    "at most; lower max_gen_toks in the task's generation_kwargs"
                )
            prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in index]
            for i, done in zip(index, generate(self.forest, prompts, sampling, seeds=index), strict=True):
                answers[i] = cut_at(done.text, sampling.stop)
        return [answers[i] for i in range(len(requests))]

    def _sampling(self, options: dict[str, Any]) -> Sampling:
        until = options.get("until") or []
        given = {
            key: options[key]
            for key in ("top_k", "top_p", "min_p", "repetition_penalty")
            if options.get(key) is not None
        }
        most = next(
            (options[k] for k in ("max_gen_toks", "max_new_tokens", "max_tokens") if options.get(k)), self.max_tokens
        )
        warm = float(options.get("temperature") or 0.0)
        if options.get("do_sample") is False:
            warm = 0.0
        stop = (until,) if isinstance(until, str) else tuple(until)
        return Sampling(max_tokens=most, temperature=warm, stop=tuple(s for s in stop if s), **given)


def scores(
    forest: Forest,
    tasks: Sequence[str],
    include: Path | None = None,
    *,
    shots: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    chat: bool = False,
) -> dict[str, Any]:
    """{task: {'acc,none': ..., 'acc_stderr,none': ...}}; with `include`, only the tasks in that folder are known.

    `chat` renders every question with the chat template. What was run (shots, seed, template) is under 'settings'.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(include) if include else None, include_defaults=include is None)
    model = ForestLM(forest)
    unknown = [t for t in tasks if t not in manager.all_tasks]
    if unknown:
        raise FettleError(
            f"lm-eval knows no task '{unknown[0]}'{f' in {include}' if include else ''}; list them with lm-eval ls tasks"
        )
    out = lm_eval.simple_evaluate(
        model=model, tasks=list(tasks), num_fewshot=shots, limit=limit, task_manager=manager, bootstrap_iters=1000,
        random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
        apply_chat_template=chat, fewshot_as_multiturn=chat and bool(shots), log_samples=False,
    )  # fmt: skip
    settings = {
        "shots": out["n-shot"], "seed": seed, "limit": limit, "versions": out["versions"],
        "template_hash": model.prompter.template_hash if chat else None,
    }  # fmt: skip
    return {**out["results"], "settings": settings}
