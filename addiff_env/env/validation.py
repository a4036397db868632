"""Settings as users pass them: turned into what JSON holds, and checked against the annotations of their dataclass.

A field's annotation says what it takes (``int``, ``float``, ``bool``, ``str``, a mapping, a sequence, None, a union),
and ``Annotated`` what holds of it: ``Annotated[int, at_least(1)] | None``. Nothing is guessed: ``"64"`` is no integer,
``64.0`` neither, and True is no number.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import gymnasium as gym
import torch

import addiff_env

MOST_SHOWN = 200  # characters of a value in a message


class Rule(NamedTuple):
    """What has to hold of a value, and how a message says it."""

    text: str
    holds: Callable[[Any], bool]


def preset_of(env_id: str) -> dict[str, Any]:
    """The settings that an environment of this package is registered with.

    Raises:
        ValueError: no such id, or one of an environment of another kind.
    """
    known = f"known: {', '.join(sorted(addiff_env.PRESETS))}"
    spec = gym.registry.get(env_id)
    if spec is None:
        raise ValueError(f"{env_id!r} is no registered environment; {known}")
    if "model" not in spec.kwargs:
        raise ValueError(f"{env_id!r} is an environment of another kind ({spec.entry_point}): no model; {known}")
    return dict(spec.kwargs)


def at_least(least: float) -> Rule:
    """Not below ``least``."""
    return Rule(f"at least {least}", lambda value: value >= least)


def above(bound: float) -> Rule:
    """Greater than ``bound``."""
    return Rule(f"above {bound}", lambda value: value > bound)


def at_most(most: float) -> Rule:
    """Not above ``most``."""
    return Rule(f"at most {most}", lambda value: value <= most)


def below(bound: float) -> Rule:
    """Less than ``bound``."""
    return Rule(f"below {bound}", lambda value: value < bound)


def multiple_of(number: int) -> Rule:
    """Divisible by ``number``."""
    return Rule(f"divisible by {number}", lambda value: value % number == 0)


def one_of(*known: str) -> Rule:
    """One of the ``known`` names."""
    return Rule(f"one of {', '.join(known)}", lambda value: value in known)


def plain(value: Any) -> Any:
    """``value`` in the form that JSON holds, as far as it is one that users write for it.

    Paths, ``torch.device`` and ``torch.dtype`` become strings; members of enumerations their values; what NumPy, torch
    or pandas hold becomes Python's numbers, strings and lists; mappings and sequences (OmegaConf's, too) dictionaries
    and lists, all the way down. Anything else stays as it is.
    """
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (torch.device, torch.dtype)):
        return str(value).removeprefix("torch.")
    if _is_array(value):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
        return [plain(item) for item in value]
    return value


def _is_array(value: Any) -> bool:
    """Whether NumPy, torch or pandas hold ``value``; a type such as ``np.float32`` is no value."""
    return not isinstance(value, type) and callable(getattr(value, "tolist", None))


def as_list(value: Any) -> list[Any] | None:
    """The items of a sequence, an array or a tensor; None where ``value`` is none of these, or a single thing."""
    if _is_array(value):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
        return list(value)
    return None


def shown(value: Any) -> str:
    """``value`` as a message shows it, shortened."""
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + " ..."


def checked(name: str, value: Any, annotation: Any) -> Any:
    """The `plain` form of ``value``, if ``annotation`` allows it.

    Raises:
        ValueError: it does not; the message names the setting and shows the value.
    """
    found, wanted = plain(value), []
    for kind, rules in _alternatives(annotation):
        word, fits = _KINDS[kind]
        texts = [rule.text for rule in rules]
        if fits(found):
            if all(rule.holds(found) for rule in rules):
                return found
            wanted = [" and ".join(texts)]
            break
        wanted.append(" and ".join([word, *texts]))
    raise ValueError(f"{name} must be {' or '.join(wanted)}, got {shown(value)}")


def check_fields(settings: Any, label: str = "{}") -> None:
    """Put every field of a dataclass in its `plain` form, as `checked`; ``label`` says how a message names one.

    Raises:
        ValueError: as `checked`.
    """
    kind: Any = type(settings)  # which mypy does not take for hashable
    hints = _hints(kind)
    for field in fields(settings):
        value = checked(label.format(field.name), getattr(settings, field.name), hints[field.name])
        object.__setattr__(settings, field.name, value)  # frozen ones, too: they are still being made


def check_seed(value: Any, name: str = "a seed") -> int:
    """Return ``value`` as a Python integer if it is a seed.

    Raises:
        ValueError: not an integer of Python, NumPy or torch in [0, 2**63), which is what all generators here take.
    """
    seed = plain(value)
    if not _is_integer(seed) or not 0 <= seed < 2**63:
        raise ValueError(f"{name} must be a non-negative integer below 2**63, got {shown(value)}")
    return seed


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # True would pass for 1


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    bool: ("True or False", lambda value: isinstance(value, bool)),
    int: ("an integer", _is_integer),
    float: ("a finite number", _is_finite),
    str: ("a string", lambda value: isinstance(value, str)),
    Mapping: ("a mapping", lambda value: isinstance(value, dict)),
    Sequence: ("a sequence", lambda value: isinstance(value, list)),
    NoneType: ("None", lambda value: value is None),
}


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _alternatives(annotation: Any, rules: tuple[Rule, ...] = ()) -> list[tuple[Any, tuple[Rule, ...]]]:
    """What a union is made of, each with its rules."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _alternatives(annotation.__origin__, (*rules, *annotation.__metadata__))
    if origin in (Union, UnionType):
        return [found for part in get_args(annotation) for found in _alternatives(part, rules)]
    return [({dict: Mapping, list: Sequence, tuple: Sequence}.get(origin, origin or annotation), rules)]
