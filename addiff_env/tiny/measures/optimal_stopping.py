"""What could be earned with the verifier's answers: dynamic programming over recorded trajectories, beside plain rules.

``addiff world optimal --record dev.npz`` reads what `addiff world auc --record` kept: pictures
stopped after every step and refined up to three times. A state is what the verifier says in it (stopping, going on) and
the step; continuation values are least-squares regressions of what was realised (Longstaff & Schwartz 2001). What a
refinement leads to is regressed on the state that it left, as it was tried in one state of a trajectory only. Policies
are fitted or tuned on one half of the prompts and judged on the other, both ways round. A picture is worth 1 if the
checker is satisfied, each evaluation costs the price; looks are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from addiff_env.perception.scorers import LatentScorer, load_latent_text_reward
from addiff_env.tiny.measures.calibration import foretold_of_states, probability
from addiff_env.tiny.world import WEIGHTS
from addiff_env.types import Action

PRICES = (0.001, 0.002, 0.004, 0.008, 0.016)
REFINE_K = 2  # evaluations of a refinement
MAX_REFINES = 6
ROUNDS = 4  # of policy improvement
RIDGE = 1.0
KNOTS = (0.25, 0.5, 0.75, 0.9)  # of the probabilities, where a continuation value may bend
REFINED_BY = ("1", "stop", "go_on", "step")  # what the outcome of a refinement is regressed on

Policy = Callable[[np.ndarray, int], np.ndarray]  # features (N, F) and step to actions (N,)


@dataclass
class Walks:
    """M recorded trajectories on one grid of N steps; steps before the first decision are left out."""

    row: np.ndarray  # (M,) prompt
    refines: np.ndarray  # (M,)
    stop: np.ndarray  # (M, N) the verifier's probability for stopping after step k, NaN where there was no decision
    go_on: np.ndarray  # (M, N) for going on
    stopped: np.ndarray  # (M, N) whether the stopped picture is satisfied
    ended: np.ndarray  # (M,) whether the one that ran to the end is
    source: np.ndarray  # (M,) trajectory that was refined, -1
    left_at: np.ndarray  # (M,) after which of its steps
    finish_steps: int = 2
    first: int = 3

    def __len__(self) -> int:
        return len(self.row)

    @property
    def steps(self) -> int:
        """N, of the grid."""
        return self.stop.shape[1]

    def features(self, step: int | np.ndarray, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """What a policy sees after ``step`` steps, (N, F): 1, both probabilities, and functions of them."""
        s, g = self.stop[rows, step], self.go_on[rows, step]
        bends = [np.maximum(0, p - knot) for p in (s, g) for knot in KNOTS]
        return np.stack([np.ones_like(s), s, g, s * g, *bends], 1)

    @classmethod
    def joined(cls, parts: Sequence[Walks], rows: Sequence[int]) -> Walks:
        """Several records as one; ``rows`` are the numbers of their prompts."""
        first_row, first = np.cumsum([0, *rows]), np.cumsum([0, *map(len, parts)])
        arrays = [name for name, value in vars(parts[0]).items() if isinstance(value, np.ndarray)]
        values: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in arrays}
        values["row"] += np.repeat(first_row[:-1], [len(part) for part in parts])
        shift = np.repeat(first[:-1], [len(part) for part in parts])
        values["source"] = np.where(values["source"] >= 0, values["source"] + shift, -1)
        return replace(parts[0], **values)

    def of_prompts(self, rows: np.ndarray) -> Walks:
        """The trajectories of some prompts."""
        keep = np.flatnonzero(np.isin(self.row, rows))
        place = np.full(len(self), -1)
        place[keep] = np.arange(len(keep))
        kept: dict[str, Any] = {
            name: value[keep] for name, value in vars(self).items() if isinstance(value, np.ndarray)
        }
        return replace(self, **kept | {"source": np.where(kept["source"] >= 0, place[kept["source"]], -1)})


def walks_of(table: dict[str, np.ndarray], scorer: LatentScorer) -> Walks:
    """The trajectories of a record, with what ``scorer`` says along them."""
    step, length = table["state_step_index"], int(table["state_step_index"].max())
    left = foretold_of_states(scorer, table, np.asarray(length - step, np.int64))
    stopping = foretold_of_states(scorer, table, np.full(len(step), Walks.finish_steps, np.int64))
    names, which = np.unique(table["state_trajectory"], return_inverse=True)
    blank = np.full((len(names), length), np.nan)
    stop, go_on, stopped = blank.copy(), blank.copy(), blank.copy()
    tried = np.flatnonzero(table["ending_state"] >= 0)
    state = table["ending_state"][tried]
    stop[which[state], step[state]] = probability(stopping[state])
    go_on[which[state], step[state]] = probability(left[state])
    stopped[which[state], step[state]] = table["ending_satisfied"][tried]
    first_state = np.unique(which, return_index=True)[1]
    row, refines = table["state_row"][first_state], table["state_refines"][first_state]
    ended = table["ending_satisfied"][table["state_goes_on"][first_state]]
    by_name = {(r, n): trajectory for trajectory, (r, n) in enumerate(zip(row, refines, strict=True))}
    source = np.array([by_name.get((r, n - 1), -1) for r, n in zip(row, refines, strict=True)])
    left_at, first = table["state_left_at"][first_state], int(step[state].min())
    return Walks(row, refines, stop, go_on, stopped, ended, source, left_at, first=first)


def _fit(features: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Ridge regression of ``values`` (N, ...) on ``features`` (N, F): weights (F, ...)."""
    gram = features.T @ features + RIDGE * np.diag([0.0, *[1.0] * (features.shape[1] - 1)])
    return np.linalg.solve(gram + 1e-9 * np.eye(len(gram)), features.T @ values)


@dataclass
class Refinement:
    """What refining leads to, by the state it leaves: success and further evaluations, (2,) of features and step."""

    weights: np.ndarray = field(default_factory=lambda: np.zeros((len(REFINED_BY), 2)))

    def __call__(self, features: np.ndarray, step: int) -> np.ndarray:
        """(N, 2): chance of success, and evaluations, of a lane that refines here and follows the policy."""
        outcome = self._inputs(features, np.full(len(features), step)) @ self.weights
        return np.stack([outcome[:, 0].clip(0, 1), outcome[:, 1].clip(REFINE_K, None)], 1)

    @classmethod
    def of(cls, walks: Walks, outcomes: np.ndarray) -> Refinement:
        """Fitted to what followed, (M, 2), in the trajectories that were refined."""
        refined = np.flatnonzero(walks.source >= 0)
        left = walks.left_at[refined]
        inputs = cls._inputs(walks.features(left, walks.source[refined]), left)
        return cls(_fit(inputs, outcomes[refined] + [0, REFINE_K]))

    @staticmethod
    def _inputs(features: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """What is regressed on: few are refined, so a plane in both probabilities and the step."""
        return np.concatenate([features[:, : len(REFINED_BY) - 1], steps[:, None] / 10], 1)


def follow(walks: Walks, policy: Policy, refinement: Refinement) -> np.ndarray:
    """Success and evaluations (M, 2) from each trajectory's first decision on, the evaluations before it left out."""
    outcome = np.stack([walks.ended.astype(float), np.full(len(walks), float(walks.steps - walks.first))], 1)
    running = np.ones(len(walks), bool)
    for step in range(walks.first, walks.steps):
        rows = np.flatnonzero(running & ~np.isnan(walks.stop[:, step]))
        features = walks.features(step, rows)
        actions, spent = policy(features, step), step - walks.first
        stopping, refining = actions == Action.STOP, actions == Action.REFINE
        outcome[rows[stopping], 0] = walks.stopped[rows[stopping], step]
        outcome[rows[stopping], 1] = spent + walks.finish_steps
        outcome[rows[refining]] = refinement(features[refining], step) + [0, spent]
        running[rows[actions != Action.CONTINUE]] = False
    return outcome


def refinement_under(walks: Walks, policy: Policy) -> Refinement:
    """What refining leads to if ``policy`` is followed afterwards, too."""
    refinement = Refinement.of(walks, follow(walks, _never_refine(policy), Refinement()))
    for _ in range(min(ROUNDS, MAX_REFINES) - 1):
        refinement = Refinement.of(walks, follow(walks, policy, refinement))
    return refinement


def _never_refine(policy: Policy) -> Policy:
    def chosen(features: np.ndarray, step: int) -> np.ndarray:
        actions = policy(features, step)
        return np.where(actions == Action.REFINE, Action.CONTINUE, actions)

    return chosen


def improve(walks: Walks, price: float, refine: bool = True) -> Policy:
    """The policy that dynamic programming finds on ``walks`` at a ``price``."""
    refinement: Refinement | None = None
    for _ in range(ROUNDS if refine else 1):
        policy = _greedy(walks, price, refinement)
        refinement = refinement_under(walks, policy) if refine else None
    return policy


def _greedy(walks: Walks, price: float, refinement: Refinement | None) -> Policy:
    """Backward induction: in every state the best of stopping, going on and, where it is known, refining."""
    stop_at: dict[int, np.ndarray] = {}
    continue_at: dict[int, np.ndarray] = {}
    value = walks.ended.astype(float)

    def values(features: np.ndarray, step: int) -> np.ndarray:
        """(N, 3) by action."""
        going, stopping = features @ continue_at[step], features @ stop_at[step] - price * walks.finish_steps
        if refinement is None:
            return np.stack([going, stopping, np.full(len(going), -np.inf)], 1)
        success, evaluations = refinement(features, step).T
        return np.stack([going, stopping, success - price * evaluations], 1)

    for step in range(walks.steps - 1, walks.first - 1, -1):
        features = walks.features(step)
        continue_at[step] = _fit(features, value - price)
        stop_at[step] = _fit(features, walks.stopped[:, step])
        chosen = values(features, step)
        best = chosen.argmax(1)
        realised = np.stack(
            [value - price, walks.stopped[:, step] - price * walks.finish_steps, chosen[:, Action.REFINE]], 1
        )
        value = realised[np.arange(len(walks)), best]
    return lambda features, step: values(features, step).argmax(1)


# --------------------------------------------------------------------------- rules


def fixed(after: int) -> Policy:
    """Stop after a number of steps; from the grid's length on: never."""
    return lambda features, step: np.full(len(features), Action.STOP if step == after else Action.CONTINUE)


def threshold(first: int, least: float) -> Policy:
    """From step ``first`` on, refine while the chance of going on is below ``least``."""
    return lambda features, step: np.where((features[:, 2] < least) & (step >= first), Action.REFINE, Action.CONTINUE)


def refine_or_stop(first: int, least: float) -> Policy:
    """From step ``first`` on, refine while the chance of stopping is below ``least``, else stop."""

    def chosen(features: np.ndarray, step: int) -> np.ndarray:
        looking = np.where(features[:, 1] < least, Action.REFINE, Action.STOP)
        return looking if step >= first else np.full(len(features), Action.CONTINUE)

    return chosen


def two_step(early: float, late: float, turn: int, enough: float) -> Policy:
    """Refine below ``early`` before step ``turn`` and below ``late`` from it on; stop at a chance above ``enough``."""

    def chosen(features: np.ndarray, step: int) -> np.ndarray:
        doomed = features[:, 2] < (early if step < turn else late)
        return np.where(doomed, Action.REFINE, np.where(features[:, 1] > enough, Action.STOP, Action.CONTINUE))

    return chosen


def families(walks: Walks) -> dict[str, list[Policy]]:
    """Every rule that is tried, by kind."""
    chances, enough = (0.2, 0.35, 0.5, 0.65), (0.9, 0.97, 2.0)  # 2: never
    return {
        "fixed step": [fixed(step) for step in range(walks.first, walks.steps + 1)],
        "threshold": [threshold(first, least) for first, least in product((3, 4, 5, 6, 7), chances)],
        "two-step": [two_step(*values) for values in product((0.0, 0.2, 0.4), chances, (4, 6), enough)],
    }


def mean_outcome(walks: Walks, policy: Policy, refinement: Refinement) -> np.ndarray:
    """Mean success and evaluations, warm-up included, (2,) of the plain trajectories of ``walks``."""
    outcome = follow(walks, policy, refinement)[walks.refines == 0]
    return outcome.mean(0) + [0, walks.first]


def compare(walks: Walks, price: float) -> dict[str, np.ndarray]:
    """Mean success and evaluations (2,) of every kind of policy at a ``price``, out of sample."""
    prompts = np.unique(walks.row)
    halves = [walks.of_prompts(prompts[side::2]) for side in (0, 1)]
    found: dict[str, list[np.ndarray]] = {}
    for fitted, held in (halves, halves[::-1]):
        policies = {
            name: max(rules, key=lambda rule: _worth(fitted, rule, price)) for name, rules in families(walks).items()
        }
        policies["dynamic programming, no refining"] = improve(fitted, price, refine=False)
        policies["dynamic programming"] = improve(fitted, price)
        for name, policy in policies.items():
            found.setdefault(name, []).append(mean_outcome(held, policy, refinement_under(fitted, policy)))
    return {name: np.mean(values, 0) for name, values in found.items()}


def _worth(walks: Walks, policy: Policy, price: float) -> float:
    success, evaluations = mean_outcome(walks, policy, refinement_under(walks, policy))
    return float(success - price * evaluations)


def table(walks: Walks, prices: Sequence[float] = PRICES) -> str:
    """All policies at all prices in words."""
    number = int((walks.refines == 0).sum())
    lines = [f"{number} prompts; out of sample", f"{'price':>6}  {'policy':<34}{'return':>8}{'success':>9}{'NFE':>7}"]
    for price in prices:
        for name, (success, evaluations) in compare(walks, price).items():
            worth = success - price * evaluations
            lines.append(f"{price:>6g}  {name:<34}{worth:>8.4f}{success:>9.3f}{evaluations:>7.2f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(prog="addiff world optimal", description=__doc__, formatter_class=defaults)
    parser.add_argument("--record", type=Path, required=True, help="file that addiff world auc --record wrote")
    parser.add_argument("--verifier", type=Path, default=WEIGHTS / "verifier")
    parser.add_argument("--prices", type=float, nargs="+", default=list(PRICES))
    args = parser.parse_args(argv)
    with np.load(args.record) as archive:
        record = dict(archive)
    print(table(walks_of(record, load_latent_text_reward(str(args.verifier))), args.prices))
    return 0
