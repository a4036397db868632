"""Methods timed in turns: every method makes pictures of the same sample, round by round, in random order.

`time_methods` needs methods and items alone; `addiff_env.evaluation.run.time_command` times those of a run folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.methods.base import Method
from addiff_env.evaluation.run.machine import wait_for
from addiff_env.evaluation.run.row_maker import made_by
from addiff_env.evaluation.statistics.timings import MethodTiming, Timings

Clock = Callable[[], float]
FAILURES = (ValueError, RuntimeError, OSError, ImportError, ArithmeticError, LookupError)  # out of memory among them


def time_methods(
    methods: Sequence[Method],
    items: Sequence[Item],
    rounds: int = 5,
    *,
    warm_up: int | None = None,
    seed: int = 0,
    clock: Clock = time.perf_counter,
    before: Callable[[], Any] = lambda: None,
    kept: Timings = Timings(),  # noqa: B008 (frozen)
    keep: Callable[[Timings], Any] = lambda found: None,
) -> Timings:
    """Seconds a picture of each method, from ``rounds`` in which every method makes a picture of every item.

    Each method first makes some that do not count; then the methods take turns, in an order that each round draws
    anew. Counted is all that stands between prompts and pictures on the host: texts, network, looks, policy, decode;
    not scores of metrics, nor files. A method that fails is left out of all rounds, and named with the reason.

    Args:
        methods: each with a name of its own.
        items: the sample.
        rounds: in all, those of ``kept`` included.
        warm_up: items of the pictures that do not count, the first of the sample; None: all.
        seed: of the order.
        clock: seconds.
        before: called before each method's turn, and not timed: forgets what only a first look at a prompt costs.
        kept: rounds that were finished before, of the same methods.
        keep: called after every finished round with all that is known.

    Returns:
        Timings with `methods` and `untimed`, whatever else they are being those of ``kept``. Of each method
        ``methods[name].median`` is seconds a picture (of the sample), 1 / that pictures a second.

    Raises:
        ValueError: no items, fewer than one round, two methods of one name, or methods that ``kept`` does not have.
    """
    _check(methods, items, rounds, kept)
    untimed = dict(kept.untimed)
    known = [method for method in methods if method.name not in untimed]
    first = items if warm_up is None else items[: max(1, warm_up)]
    if kept.rounds < rounds:
        for method in list(known):
            before()
            try:
                _make(method, first)
            except FAILURES as error:
                untimed[method.name] = _reason(error)
                known.remove(method)
    found = _without(replace(kept, untimed=untimed), untimed)
    for number in range(found.rounds, rounds):
        turns, failed = _round(known, items, np.random.default_rng([seed, number]), clock, before)
        known = [method for method in known if method.name not in failed]
        if not known:
            return replace(found, methods={}, untimed={**found.untimed, **failed})
        found = _with_round(found, turns, failed)
        keep(found)
    return found


def _check(methods: Sequence[Method], items: Sequence[Item], rounds: int, kept: Timings) -> None:
    names = [method.name for method in methods]
    if not items or rounds < 1:
        raise ValueError(f"timing needs pictures and a round at least, got {len(items)} items and {rounds} rounds")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"methods named more than once: {', '.join(twice)}")
    if kept.rounds and (new := [name for name in names if name not in kept.methods and name not in kept.untimed]):
        raise ValueError(f"{kept.rounds} rounds were timed without {', '.join(new)}: all methods take turns")


def _round(
    methods: Sequence[Method], items: Sequence[Item], rng: np.random.Generator, clock: Clock, before: Callable[[], Any]
) -> tuple[dict[str, MethodTiming], dict[str, str]]:
    """One turn of every method, in random order; and the reasons of those that failed."""
    turns, failed = {}, {}
    for place in rng.permutation(len(methods)).tolist():
        method = methods[place]
        before()
        try:
            turns[method.name] = _turn(method, items, clock)
        except FAILURES as error:
            failed[method.name] = _reason(error)
    return turns, failed


def _turn(method: Method, items: Sequence[Item], clock: Clock) -> MethodTiming:
    device = method.backbone.device
    wait_for(device)
    began = clock()
    made = _make(method, items)
    wait_for(device)
    seconds = (clock() - began) / len(items)
    nfe, net_flops = np.mean([(one.nfe, one.net_flops) for one in made], axis=0).tolist()
    return MethodTiming((seconds,), nfe, net_flops, made_by(method))


def _make(method: Method, items: Sequence[Item]) -> list[Any]:
    made = [one for group in method.make(list(items)) for _, one in group]
    if len(made) != len(items):
        raise ValueError(f"{method.name!r} made {len(made)} pictures of {len(items)}")
    return made


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _with_round(found: Timings, turns: Mapping[str, MethodTiming], failed: Mapping[str, str]) -> Timings:
    """The timings with one round more, without the methods that failed in it."""
    methods = {
        name: replace(turn, seconds=(*(found.methods[name].seconds if name in found.methods else ()), *turn.seconds))
        for name, turn in turns.items()
    }
    ordered = {name: methods[name] for name in dict.fromkeys([*found.methods, *methods]) if name in methods}
    return _without(replace(found, methods=ordered, untimed={**found.untimed, **failed}), failed)


def _without(found: Timings, names: Iterable[str]) -> Timings:
    gone = set(names)
    return replace(found, methods={name: one for name, one in found.methods.items() if name not in gone})
