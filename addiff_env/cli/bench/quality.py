"""Pictures a second at equal quality: what solvers, best-of-N and rules take to be as good as the agent.

All methods make the same pictures, in turns, and those that are judged are those that were timed. A family of methods
takes what its cheapest mixture takes that reaches a quality: tossing a coin between two methods for each picture
reaches every point of their chord.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from addiff_env.cli.bench.rounds import Figure
from addiff_env.cli.bench.subject import Subject
from addiff_env.env.prices import price_at
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.benchmarks.items import Item, load_benchmark
from addiff_env.evaluation.methods.base import Method
from addiff_env.evaluation.methods.policy_method import PolicyMethod
from addiff_env.evaluation.methods.registry import make_method
from addiff_env.evaluation.run.run_folder import reported_rows
from addiff_env.evaluation.run.timing import time_methods
from addiff_env.evaluation.statistics.families import (
    BEST_OF,
    agent_fronts,
    hand_made_rules,
    solver_families,
    solver_fronts,
)
from addiff_env.evaluation.statistics.summary import by_method, headline_metric, score_value
from addiff_env.evaluation.statistics.timings import Timings
from addiff_env.tiny.checker import check_picture
from addiff_env.types import Generated

Point = tuple[np.ndarray, float]  # seconds a picture in each round, and mean quality
BENCHMARK = "tiny-dev"
FAMILIES: dict[str, tuple[str, ...]] = {
    "solvers": ("ddim-5", "ddim-10", "ddim-25"),
    BEST_OF: ("best-of-2:ddim-5", "best-of-3:ddim-10"),
    "rule": ("threshold:5:0", "threshold:10:1"),
}
OWN = "agent"  # the family that the others are compared with
PLACES = (0.0, -0.7)  # of the prices that the agent runs at in its range, whose ends are -1 and 1
ROUNDS = 2  # at most: a round makes every picture with every method


class Judged:
    """A method whose pictures' success is kept while it is timed; judging them is not part of the time."""

    def __init__(self, method: Method) -> None:
        self.method, self.made = method, dict[tuple[str, int], Generated]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def make(self, items: list[Item]) -> Iterator[list[tuple[Item, Generated]]]:
        """As the method's own."""
        for group in self.method.make(items):
            self.made.update({(item.prompt, item.seed): made for item, made in group})
            yield group

    @property
    def success(self) -> float:
        """Share of the pictures that the embedded world's checker passes."""
        return float(np.mean([check_picture(made.picture, made.prompt).satisfied for made in self.made.values()]))


def equal_quality(subject: Subject, number: int, folder: Path | None = None) -> Iterator[Figure]:
    """The agent against each family, timed on ``number`` pictures of the embedded world.

    ``folder`` is a finished evaluation, whose quality of these methods is taken instead of that of so few pictures.

    Raises:
        ValueError: no trained agent to compare with, or an evaluation without one of the families.
    """
    if subject.trained is None:
        raise ValueError("quality is compared on the embedded world, or with an agent of its own: name one by --agent")
    found = {} if folder is None else evaluated(folder)
    families = families_of(found) if found else FAMILIES | {OWN: agent_runs(subject)}
    items, env = load_benchmark(BENCHMARK, number), subject.acting_env(subject.lanes, batch_size=subject.lanes)
    made = {spec: Judged(_method(spec, env, subject, items)) for names in families.values() for spec in names}
    timings = _timed(subject, list(made.values()), items)
    quality = {method.name: found.get(method.name, method.success) for method in made.values()}
    points = {
        family: [
            (np.array(timings.methods[made[spec].name].seconds), quality[made[spec].name])
            for spec in specs
            if made[spec].name in timings.methods
        ]
        for family, specs in families.items()
    }
    for name, timing in timings.methods.items():
        yield Figure("quality", f"{name}, quality", [quality[name]])
        yield Figure("quality", name, [1 / seconds for seconds in timing.seconds], "pictures/s")
    for family in families:
        if family != OWN and points[family] and points[OWN]:
            yield as_good(family, points[family], points[OWN])


def agent_runs(subject: Subject) -> tuple[str, ...]:
    """The agent, at several prices where it acts by them."""
    bounds = subject.agent.price_range
    return ("agent",) if bounds is None else tuple(f"agent@{float(price_at(bounds, at)):.6g}" for at in PLACES)


def evaluated(folder: Path) -> dict[str, float]:
    """Mean quality of each method of a finished evaluation, by its headline metric; ValueError: there is none."""
    rows = reported_rows(folder)
    if not rows:
        raise ValueError(f"no finished evaluation in {str(folder)!r}")
    metric = headline_metric(rows)
    scores = {name: [score_value(row, metric) for row in group] for name, group in by_method(rows).items()}
    return {name: float(np.mean([value for value in values if value is not None])) for name, values in scores.items()}


def families_of(methods: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The families among an evaluation's methods; the agent's first training run stands for all.

    Raises:
        ValueError: no agent, or nothing to compare it with.
    """
    names = list(methods)
    own = next(iter(agent_fronts(names).values()), [])
    found = {
        "solvers": [name for front in solver_fronts(names).values() for name in front],
        BEST_OF: solver_families(names).get(BEST_OF, []),
        "rule": hand_made_rules(names),
    }
    others = {family: tuple(members) for family, members in found.items() if members}
    if not own or not others:
        raise ValueError(f"an evaluation with the agent and another method is needed, there are: {', '.join(names)}")
    return others | {OWN: tuple(own)}


def _method(spec: str, env: DiffusionDenoiseVectorEnv, subject: Subject, items: list[Item]) -> Method:
    """A method on the agent's environment; policies refill their lanes as the pipeline does."""
    method = make_method(spec, env, subject.agent, benchmark=items)
    if isinstance(method, PolicyMethod):
        method.lanes.full_batches = True
    return method


def _timed(subject: Subject, methods: Sequence[Method], items: Sequence[Item]) -> Timings:
    """The methods in turns; Ctrl-C ends it after the last whole round."""
    kept = [Timings()]
    try:
        time_methods(
            methods,
            items,
            min(subject.rounds.number, ROUNDS),
            warm_up=subject.lanes,
            before=partial(_forget, subject),
            keep=kept.append,
        )
    except KeyboardInterrupt:
        subject.rounds.interrupted = True
        if not kept[-1].rounds:
            raise
    return kept[-1]


def as_good(family: str, others: Sequence[Point], own: Sequence[Point]) -> Figure:
    """Pictures a second of the agent over a family's, at the highest quality that both reach."""
    quality = min(max(quality for _, quality in points) for points in (others, own))
    ratio = seconds_at(quality, others) / seconds_at(quality, own)
    return Figure("quality", f"{OWN} / {family}, both at {quality:.3f}", ratio.tolist(), "x pictures/s")


def seconds_at(quality: float, points: Sequence[Point]) -> np.ndarray:
    """Seconds a picture (rounds,) of the cheapest mixture of two methods that reaches a ``quality``.

    Raises:
        ValueError: none does.
    """
    reaching = [point for point in points if point[1] >= quality]
    if not reaching:
        raise ValueError(f"no method reaches {quality:g}, the best {max(of for _, of in points):g}")
    found = [seconds for seconds, _ in reaching]
    for low, below in points:
        for high, above in reaching:
            if below < quality:
                found.append(low + (quality - below) / (above - below) * (high - low))
    return np.min(found, axis=0)


def _forget(subject: Subject) -> None:
    """Texts cost every method what a first look at a prompt costs."""
    subject.acting.backbone.forget_prompts()
    subject.acting.perception.forget_texts()
