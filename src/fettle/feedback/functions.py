"""Reward functions by name: those registered here or by the user's own code, and any function of a file or module."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from inspect import signature
from pathlib import Path
from traceback import extract_tb
from typing import Any

import orjson

from fettle.core.errors import FettleError
from fettle.core.spec import nearest
from fettle.evaluate.metrics import WORD

Function = Callable[..., Sequence[float]]  # (prompts, answers, **columns) -> a number for each answer
FUNCTIONS: dict[str, Function] = {}


def reward_function(name: str) -> Callable[[Function], Function]:
    """Register `f(prompts, answers, **columns)`, which gives a number for each answer, under a name for recipes."""

    def register(function: Function) -> Function:
        if FUNCTIONS.setdefault(name, function) is not function:
            raise FettleError(f"reward function '{name}': the name is taken; choose another")
        return function

    return register


@reward_function("json")
def is_json(prompts: Sequence[Any], answers: Sequence[str], **columns: Any) -> list[float]:
    """1 where the whole answer is JSON."""
    return [float(_is_json(answer)) for answer in answers]


def _is_json(text: str) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True


@reward_function("varied")
def varied(prompts: Sequence[Any], answers: Sequence[str], **columns: Any) -> list[float]:
    """The share of an answer's runs of three words that are not repeats; 1 where there are fewer than three words."""
    return [_varied(WORD.findall(answer.casefold())) for answer in answers]


def _varied(words: list[str]) -> float:
    runs = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(runs)) / len(runs) if runs else 1.0


def find_function(name: str) -> Function:
    """A reward function: a registered name, `package.module:function` or `file.py:function`; FettleError where there is none."""
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    home, colon, attribute = name.rpartition(":")
    if not colon:
        raise FettleError(
            f"reward function '{name}': no such name, and a function of your own is written as file.py:function; {nearest(name, FUNCTIONS)}"
        )
    try:
        module = _module_of_file(Path(home)) if home.endswith(".py") else import_module(home)
    except Exception as error:  # whatever the user's file does while it is read
        raise FettleError(
            f"reward function '{name}': '{home}' cannot be imported ({type(error).__name__}: {error})"
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        defined = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise FettleError(
            f"reward function '{name}': '{home}' has no function '{attribute}': {nearest(attribute, defined)}"
        )
    return FUNCTIONS.setdefault(name, found)


def call(name: str, prompts: Sequence[Any], answers: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> Any:
    """What a reward function gives. FettleError where it cannot be called so, or fails: with the line of its file."""
    function = find_function(name)
    try:
        signature(function).bind(prompts, answers, **columns)
    except (TypeError, ValueError) as error:
        raise FettleError(
            f"reward function '{name}': it is called with prompts, answers and the data's columns by name, and does not take them "
            f"({error}); write it as def {name.rpartition(':')[2]}(prompts, answers, **columns)"
        ) from error
    try:
        return function(list(prompts), list(answers), **columns)
    except FettleError:
        raise
    except Exception as error:  # whatever the user's function does
        last = extract_tb(error.__traceback__)[-1]
        raise FettleError(
            f"reward function '{name}': {last.filename}:{last.lineno}: {type(error).__name__}: {error}"
        ) from error


def _module_of_file(path: Path) -> Any:
    spec = spec_from_file_location(f"fettle_reward_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError("no such file")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where a dataclass of the file looks for its own module
    spec.loader.exec_module(module)
    return module
