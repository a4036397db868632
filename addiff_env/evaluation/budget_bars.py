"""What is asked of one agent for every budget, measured on a finished evaluation.

``addiff world bars runs/final --rules rules.json`` reads a run that has agents at several prices (``agent@.004``, any
number of training seeds as one group), fixed-step methods, best-of-N and the hand-made rules that ``addiff world prices
--rules`` chose for each price on training prompts. Return is success minus the price of each evaluation. Intervals are
95% bootstrap intervals over prompts and training seeds, p is one-sided. The middle price is the middle one of those in
the run. The exit status is 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from addiff_env.evaluation.prices import Chosen, read_rules
from addiff_env.evaluation.run.run_folder import read_items, reported_rows
from addiff_env.evaluation.statistics.bootstrap import Interval, Resampled, interval, resample
from addiff_env.evaluation.statistics.correlation import spearman_test
from addiff_env.evaluation.statistics.families import (
    BEST_OF,
    agent_runs_by_price,
    at_price,
    search_families,
    solver_fronts,
)
from addiff_env.evaluation.statistics.front import MinDifference, above_front
from addiff_env.evaluation.statistics.pairing import costs_of, paired_values, picture_counts, score_of
from addiff_env.tiny.measures.bars import Bar, table
from addiff_env.types import ResultRow, SampleKey

SUCCESS, FLOPS, NFE = range(3)  # the measures, in their order
REFERENCE = "ddim-50"
POINTS = 0.05  # above fixed methods at the middle price
SAVED = 0.15  # of the rule's net FLOPs, at its success
MOST_NFE, MOST_FLOPS = 9.0, 0.2  # of 50-step inference's net FLOPs
MARGIN = 0.02  # of success that counts as none
CORRELATION, SURELY = 0.45, 0.38


@dataclass(frozen=True)
class Budgets:
    """Resampled means of a run: the agent's seeds as one group at each price, and every other method."""

    found: Resampled
    agents: Mapping[float, str]  # price: name of the group
    methods: Sequence[str]  # all others

    @property
    def middle(self) -> float:
        """The middle one of the prices."""
        return sorted(self.agents)[len(self.agents) // 2]

    def fixed(self) -> dict[str, list[str]]:
        """Fixed-step methods by solver, best-of-N, and all of them."""
        fronts = solver_fronts(self.methods)
        best = {BEST_OF: found} if (found := search_families(self.methods).get(BEST_OF)) else {}
        together = fronts | best
        return together | {"all of these": [name for members in together.values() for name in members]}

    def above_fixed(self, price: float) -> MinDifference:
        """How far above the front of all fixed methods and best-of-N at the agent's net FLOPs."""
        return above_front(self.found, self.agents[price], self.fixed()["all of these"])

    def return_of(self, name: str, price: float) -> float:
        """Mean success minus what the evaluations cost."""
        means = self.found.means[name]
        return float(means[SUCCESS] - price * means[NFE])

    def ahead(self, price: float, rule: str) -> Interval:
        """Return of the agent minus that of a rule."""
        return self._of([self.agents[price], rule], lambda ours, theirs: (ours - theirs) @ [1.0, 0.0, -price])

    def saved(self, rule: str) -> Interval:
        """Share of a rule's net FLOPs that the agent spares at the rule's success.

        The agent's cost is that of the cheapest mixture of two of its prices; minus infinity where no price gets there.
        """
        return self._of(
            [rule, *self.agents.values()],
            lambda theirs, *ours: 1 - cheapest_at(np.stack(ours, 1), theirs[:, SUCCESS]) / theirs[:, FLOPS],
        )

    def ratio(self, price: float, other: str) -> Interval:
        """The agent's net FLOPs as a share of another method's."""
        return self._of([self.agents[price], other], lambda ours, theirs: ours[:, FLOPS] / theirs[:, FLOPS])

    def _of(self, names: Sequence[str], value: Callable[..., np.ndarray]) -> Interval:
        """A function of several methods' means (D, measures) each, with its interval."""
        observed = value(*(self.found.means[name][None] for name in names))[0]
        return interval(observed, value(*(self.found.draws[name] for name in names)), self.found.level)


def cheapest_at(points: np.ndarray, success: np.ndarray) -> np.ndarray:
    """Least net FLOPs (D,) at which mixtures of two of ``points`` (D, P, measures) reach a ``success`` (D,)."""
    good, cost = points[..., SUCCESS], points[..., FLOPS]
    wanted = success[:, None]
    alone = np.where(good >= wanted, cost, np.inf).min(1)
    low, high = good[:, :, None], good[:, None, :]  # of every pair
    spans = (low < wanted[..., None]) & (high >= wanted[..., None])
    share = np.divide(wanted[..., None] - low, high - low, out=np.ones(np.broadcast(low, high).shape), where=spans)
    mixed = np.where(spans, cost[:, :, None] * (1 - share) + cost[:, None, :] * share, np.inf)
    return np.asarray(np.minimum(alone, mixed.min((1, 2))))


def read_budgets(rows: Sequence[ResultRow]) -> Budgets:
    """The means of a run's rows.

    Raises:
        ValueError: no agent at a price, or methods that made other pictures than the rest.
    """
    names = list(dict.fromkeys(row.method for row in rows))
    priced: dict[float, list[str]] = {}
    for price, runs in agent_runs_by_price(names).items():
        if price:
            priced.setdefault(float(price), []).extend(runs)  # .004 is 0.004
    if not priced:
        raise ValueError(f"no agent at a price (agent@.004) among the methods {', '.join(names)}")
    agents = {price: at_price("agent", price) for price in sorted(priced)}
    taken = {run for runs in priced.values() for run in runs}
    others = [name for name in names if name not in taken]
    groups = {agents[price]: priced[price] for price in agents} | {name: [name] for name in others}
    values = paired_values(rows, groups, [score_of("success"), costs_of("net_flops"), costs_of("nfe")])
    return Budgets(resample(values, pictures=picture_counts(rows, groups)), agents, others)


# --------------------------------------------------------------------------- bars


def bars(budgets: Budgets, rules: Chosen, adaptivity: Interval) -> list[Bar]:
    """Every bar; ``rules`` of each price by kind, ``adaptivity`` the rank correlation at the middle price.

    Raises:
        ValueError: rules for other prices than the agent's, or rules that are not in the run.
    """
    best = {price: best_rule(budgets, rules, price) for price in budgets.agents}
    middle = budgets.middle
    found = [_above_fixed(budgets, price) for price in budgets.agents]
    ahead = {price: budgets.ahead(price, rule) for price, rule in best.items()}
    for price, one in ahead.items():
        name, p = f"return at {price:g}, agent minus {best[price]}", f"p = {one.p_below(0.0):.2g}"
        found.append(Bar(name, one.estimate, 0.0, unit="", interval=(one.low, one.high), note=p))
    surely = sum(one.low > 0 for one in ahead.values())
    found.append(Bar("prices at which that interval excludes 0", surely, 3, unit="prices"))
    saved = budgets.saved(best[middle])
    found.append(_percent(f"net FLOPs spared at the success of {best[middle]}", saved, least=SAVED))
    found += _efficiency(budgets)
    ends, name = (adaptivity.low, adaptivity.high), "H3: rank correlation of NFE and requirements"
    found.append(Bar(name, adaptivity.estimate, CORRELATION, unit="", interval=ends))
    found.append(Bar(f"{name}, lower end", adaptivity.low, SURELY, unit="", interval=ends))
    return found


def best_rule(budgets: Budgets, rules: Chosen, price: float) -> str:
    """Of the rules that were chosen for a price the one with the highest return in the run.

    That favours the rules: which kind is best is seen on the run's own pictures.
    """
    named = rules.get(price)
    if named is None:
        raise ValueError(
            f"no rules for the price {price:g}; there are some for {', '.join(f'{one:g}' for one in rules)}"
        )
    lacking = [name for name in named.values() if name not in budgets.methods]
    if lacking:
        raise ValueError(f"rules that are not in the run: {', '.join(lacking)}")
    return max(named.values(), key=lambda name: budgets.return_of(name, price))


def _above_fixed(budgets: Budgets, price: float) -> Bar:
    above = budgets.above_fixed(price)
    least = POINTS if price == budgets.middle else 0.0
    name = f"success at {price:g} above fixed methods and best-of-N, equal net FLOPs"
    return Bar(name, above.estimate, least, interval=(above.low, above.high), note=f"p = {above.p_below(0.0):.2g}")


def _percent(name: str, one: Interval, least: float | None = None, most: float | None = None) -> Bar:
    return Bar(name, one.estimate, least, most, interval=(one.low, one.high))


def _efficiency(budgets: Budgets) -> list[Bar]:
    """H1 at the dearest of the prices at which the agent spends no more than `MOST_NFE`, or the dearest of all."""
    if REFERENCE not in budgets.methods:
        return []
    means = budgets.found.means
    frugal = [price for price, name in budgets.agents.items() if means[name][NFE] <= MOST_NFE]
    price = min(frugal or [max(budgets.agents)])
    name = budgets.agents[price]
    behind = budgets.found.difference(name, REFERENCE)
    place = f"H1 at {price:g}"
    return [
        Bar(f"{place}: NFE", float(means[name][NFE]), most=MOST_NFE, unit=""),
        _percent(f"{place}: net FLOPs of {REFERENCE}'s", budgets.ratio(price, REFERENCE), most=MOST_FLOPS),
        Bar(
            f"{place}: success minus {REFERENCE}'s, lower end",
            behind.low,
            -MARGIN,
            interval=(behind.low, behind.high),
        ),
    ]


def adaptivity_of(rows: Sequence[ResultRow], requirements: Mapping[SampleKey, float], price: float) -> Interval:
    """Rank correlation of a prompt's NFE with its number of requirements, over the agent's seeds at a price.

    NaN, which meets no bar, where there is none: of fewer than four prompts, or where one of the two does not vary.
    """
    by_price = agent_runs_by_price(row.method for row in rows)
    runs = [run for text, members in by_price.items() if text and float(text) == price for run in members]
    read = [costs_of("nfe"), lambda row: requirements[row.prompt, row.seed]]
    nfe, levels = paired_values(rows, {"agent": runs}, read)["agent"]
    if nfe.shape[1] < 4 or np.ptp(levels[0]) == 0 or np.ptp(nfe, axis=1).max() == 0:
        return Interval(np.nan, np.nan, np.nan, np.empty(0))
    return spearman_test(levels[0], nfe).rho


def summary(budgets: Budgets, rules: Chosen) -> str:
    """At every price success, NFE, net GFLOPs and return of the agent and of each rule chosen for it."""
    lines = [f"{'price':>6}  {'method':<40}{'success':>8}{'NFE':>7}{'GFLOPs':>8}{'return':>9}"]
    for price, name in budgets.agents.items():
        for method in (name, *rules.get(price, {}).values()):
            success, flops, nfe = budgets.found.means[method]
            value = budgets.return_of(method, price)
            lines.append(f"{price:>6g}  {method:<40}{success:>8.3f}{nfe:>7.2f}{flops / 1e9:>8.2f}{value:>9.4f}")
    return "\n".join(lines)


def describe_bars(folder: Path, rules_file: Path) -> tuple[str, bool]:
    """What methods earn at every price, and the bars, as text; and whether every bar is met."""
    rows, items, rules = reported_rows(folder), read_items(folder), read_rules(rules_file)
    budgets = read_budgets(rows)
    requirements = {(item.prompt, item.seed): float(item.num_requirements) for item in items}
    found = bars(budgets, rules, adaptivity_of(rows, requirements, budgets.middle))
    counted = f"{len(items)} pictures, {len(agent_runs_by_price(row.method for row in rows))} prices"
    text = f"{counted}\n\n{summary(budgets, rules)}\n\n{table(found)}"
    return text, all(bar.passed is not False for bar in found)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the bars; returns the exit status."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="addiff world bars", description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path, help="run folder of addiff evaluate")
    parser.add_argument("--rules", type=Path, required=True, help="what addiff world prices --rules wrote")
    args = parser.parse_args(argv)
    text, passed = describe_bars(args.folder, args.rules)
    print(text)
    return 0 if passed else 1
