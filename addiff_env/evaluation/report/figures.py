"""What an evaluation says: the table and the plots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # pictures go to files; no display is needed

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from addiff_env.env.trajectories import ACCENT, INK
from addiff_env.evaluation.statistics.families import RULES, agent_fronts, run_and_price, solver_families
from addiff_env.evaluation.statistics.front import front_quality
from addiff_env.evaluation.statistics.summary import (
    COSTS,
    Estimate,
    MethodSummary,
    by_method,
    by_num_requirements,
    counted,
    decision_counts,
    estimate,
    headline_metric,
    share_metrics,
    summarise,
)
from addiff_env.evaluation.statistics.timings import TIMED
from addiff_env.types import ACTIONS, Action, ResultRow

GRID, RULE = "#c9ced6", "#5c6773"  # RULE: hand-made rules
AGENT = "agent"  # what its rows are called, whatever its price
FAMILIES = ("#1c7ed6", "#2b8a3e", "#7048e8", "#c2255c", "#0b7285", "#846800")  # solvers, best-of-N, single methods
ACTION_COLORS = ("#4c8ed9", "#7a8494", "#e8590c")  # continue, stop, refine
_LOOK: dict[Any, Any] = {
    "text.parse_math": False,  # method names are shown as they are
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "font.size": 9.5,
}


# --------------------------------------------------------------------------- plots


@contextmanager
def _figure(width: float, height: float, columns: int = 1) -> Iterator[tuple[Figure, list[Axes]]]:
    """An empty figure in the report's look, inches; its axes share their vertical scale."""
    with plt.rc_context(_LOOK):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, list(figure.subplots(1, columns, sharey=True, squeeze=False)[0])


def plot_quality_against_compute(rows: Sequence[ResultRow], path: Path) -> None:
    """Quality with 95% intervals against mean net FLOPs, mean NFE and timed seconds (if any); solvers form lines."""
    costs = plotted_costs(rows)
    figure = quality_figure(rows, costs, (5.25 * len(costs), 4.8))
    number = len({(row.prompt, row.seed) for row in rows})
    figure.suptitle(f"Quality against compute, {counted(number, 'held-out picture')}, 95% intervals", color=INK)
    figure.savefig(path, dpi=130)


def plotted_costs(rows: Sequence[ResultRow]) -> list[str]:
    """Costs that quality is shown against: net FLOPs, NFE, and seconds where the run was timed."""
    return ["net_flops", "nfe", *([TIMED] if any(row.timed_seconds is not None for row in rows) else [])]


def quality_figure(rows: Sequence[ResultRow], costs: Sequence[str], size: tuple[float, float] = (5.4, 4.4)) -> Figure:
    """The headline metric against each of ``costs``, with the interpolated front of all fixed methods.

    Methods without the metric or the cost have no point. Training seeds of an agent are one point for each price.
    """
    metric, shares = headline_metric(rows), share_metrics(rows)
    scale = 100.0 if metric in shares else 1.0
    seeds = len({found[0] for method in by_method(rows) if (found := run_and_price(method))})
    legend = {AGENT: f"{AGENT}, {seeds} training seeds"} if seeds > 1 else {}
    summaries = {summary.method: summary for summary in summarise(_seeds_together(rows), shares)}
    with _figure(*size, len(costs)) as (figure, axes):
        for axis, name in zip(axes, costs, strict=True):
            cost = next(cost for cost in COSTS if cost.name == name)
            drawn = {
                m: summary for m, summary in summaries.items() if metric in summary.scores and name in summary.costs
            }
            _draw_front(axis, drawn, metric, name, cost.unit, scale)
            for label, members, color, marker in _series(list(summaries)):
                points = [drawn[member] for member in members if member in drawn]
                if points:
                    _draw_points(
                        axis, points, (metric, scale), (name, cost.unit), legend.get(label, label), color, marker
                    )
            if not drawn:
                axis.text(0.5, 0.5, f"no picture has {metric}", transform=axis.transAxes, ha="center", color=INK)
            axis.set_xlabel(f"{cost.label} per picture")
        axes[0].set_ylabel("prompts satisfied (%)" if metric == "success" else metric + (" (%)" if scale > 1 else ""))
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=max(2, int(size[0] / 2)))
    return figure


def _seeds_together(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """The rows, those of ``agent-s0@0.004``, ``agent-s1@0.004``, ... under one name, ``agent@0.004``."""
    runs = {method: found[0] for method in by_method(rows) if (found := run_and_price(method))}
    names = {method: AGENT + method.removeprefix(run) for method, run in runs.items()}
    return [replace(row, method=names.get(row.method, row.method)) for row in rows]


def _series(methods: list[str]) -> list[tuple[str, list[str], str, str]]:
    """Label, methods, colour and marker of each line or point: solver families first, the agent, by price, last."""
    families = solver_families(methods)
    single = [name for name in methods if name not in sum(families.values(), [])]
    fronts = {run: members for run, members in agent_fronts(single).items() if len(members) > 1}
    single = [name for name in single if name not in sum(fronts.values(), [])]
    colors = [FAMILIES[k % len(FAMILIES)] for k in range(len(families) + len(single))]
    found = [(label, members, colors[k], "o-") for k, (label, members) in enumerate(families.items())]
    for k, name in enumerate(name for name in single if name != AGENT):
        color = RULE if name.startswith(RULES) else colors[len(families) + k]
        found.append((name, [name], color, "sDv^P"[k % 5]))
    found += [(run, members, ACCENT, "*-") for run, members in fronts.items()]
    return found + [(AGENT, [AGENT], ACCENT, "*")] * (AGENT in single)


def _draw_points(
    axis: Axes,
    points: Sequence[MethodSummary],
    quality: tuple[str, float],
    cost: tuple[str, float],
    label: str,
    color: str,
    marker: str,
) -> None:
    """Means with both intervals, in the order of their cost; members of a family carry what tells them apart."""
    (metric, scale), (name, unit) = quality, cost
    points = sorted(points, key=lambda point: point.costs[name].mean)
    x = [point.costs[name].mean / unit for point in points]
    y = [point.scores[metric].mean * scale for point in points]
    bounds: dict[str, Any] = {
        "xerr": _lengths([point.costs[name] for point in points], 1 / unit),
        "yerr": _lengths([point.scores[metric] for point in points], scale),
    }
    size = {"*": 13, "*-": 9}.get(marker, 5)
    thin: dict[str, Any] = {"capsize": 2.5, "linewidth": 0.8, "elinewidth": 0.9}
    axis.errorbar(x, y, fmt=marker, color=color, label=label, markersize=size, **thin, **bounds)
    for k, (point, px, py) in enumerate(zip(points, x, y, strict=True)):
        told = marker == "o-" or (marker == "*-" and k in (0, len(points) - 1))  # prices lie close together
        mark = _mark(point.method) if told else ""
        axis.annotate(mark, (px, py), textcoords="offset points", xytext=(5, 5), fontsize=8.5, color=color)


def _mark(method: str) -> str:
    """What tells members of a family apart: the number of steps, evaluations, pictures or particles, or the price."""
    if agent := run_and_price(method):
        return f"@{agent[1]}" if agent[1] else ""
    head, _, tail = method.partition(":")
    kind, _, number = head.rpartition("-")
    return f"×{number}" if tail and kind in ("best-of", "fk") else number


def _lengths(found: Sequence[Estimate], scale: float) -> list[list[float]]:
    """Lengths of error bars, below and above; none where there is no interval."""
    ends = [(e.mean - e.low, e.high - e.mean) if e.low is not None and e.high is not None else (0, 0) for e in found]
    return [[max(0.0, scale * end[side]) for end in ends] for side in (0, 1)]


def _draw_front(
    axis: Axes, summaries: Mapping[str, MethodSummary], metric: str, cost: str, unit: float, scale: float
) -> None:
    """What inference without a policy reaches at each cost, tossing coins between methods: H2's and H2+'s rivals."""
    fixed = sum(solver_families(list(summaries)).values(), [])
    if len(fixed) < 2:
        return
    costs = np.array([summaries[name].costs[cost].mean for name in fixed])
    values = np.array([summaries[name].scores[metric].mean for name in fixed])
    at = np.linspace(costs.min(), costs.max(), 200)
    shape = (at.size, costs.size)
    front = front_quality(np.broadcast_to(costs, shape), np.broadcast_to(values, shape), at)
    axis.plot(
        at / unit, scale * front, "--", color=INK, linewidth=1.2, zorder=3, label="front of methods without a policy"
    )


def actions_figure(rows: Sequence[ResultRow]) -> Figure:
    """Share of all pictures that took each action at their first, second, ... decision; what is left has ended."""
    counts = decision_counts(rows)  # (decisions, 3)
    at = np.arange(1, len(counts) + 1)
    below = np.zeros(len(counts))
    with _figure(5.4, 3.6) as (figure, (axis,)):
        for action in (Action.CONTINUE, Action.REFINE, Action.STOP):
            share = 100 * counts[:, action] / len(rows)
            axis.bar(at, share, bottom=below, width=0.9, color=ACTION_COLORS[action], label=ACTIONS[action])
            below += share
        axis.set(xlabel="decision", ylabel="pictures (%)", ylim=(0, 100))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside lower center", ncols=3)
    return figure


def complexity_figure(rows: Sequence[ResultRow], num_requirements: Mapping[tuple[str, int], int]) -> Figure:
    """NFE against what a picture must get right: discs sized by the number of pictures, means with 95% intervals."""
    levels = by_num_requirements(rows, num_requirements)
    spent = {level: [row.nfe for row in group] for level, group in levels.items()}
    found = [estimate(spent[level], [row.prompt for row in group]) for level, group in levels.items()]
    discs = [(level, nfe, values.count(nfe)) for level, values in spent.items() for nfe in sorted(set(values))]
    x, y, number = (np.array(column, float) for column in zip(*discs, strict=True))
    with _figure(5.4, 3.6) as (figure, (axis,)):
        area = 12 + 260 * number / number.max()
        axis.scatter(x, y, s=area, color=FAMILIES[0], alpha=0.35, linewidths=0, label="pictures")
        means = [e.mean for e in found]
        axis.errorbar(list(levels), means, yerr=_lengths(found, 1), fmt="o-", color=ACCENT, capsize=2.5, label="mean")
        axis.set(xlabel="requirements that the prompt states", ylabel="NFE")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside lower center", ncols=2, markerscale=0.6)
    return figure
