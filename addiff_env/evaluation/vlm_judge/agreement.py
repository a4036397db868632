"""What judges' preferences say together: agreement beyond chance (kappa), strengths of methods (Bradley-Terry)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from addiff_env.evaluation.vlm_judge.pairs import Preference

TOLERANCE, STEPS = 1e-8, 10_000  # of Bradley-Terry: largest change of a log-strength, most iterations


def cohens_kappa(one: Sequence[Preference], other: Sequence[Preference]) -> float:
    """Agreement of two judges on the same pairs beyond chance, over a, b and tie (Cohen 1960).

    Pairs that either left unanswered are left out.

    Raises:
        ValueError: other pairs, none answered by both, or both judges always gave one and the same answer, where
            agreement by chance is certain and kappa is undefined.
    """
    if [_place(p) for p in one] != [_place(p) for p in other]:
        raise ValueError("the judges were asked about other pairs, or in another order")
    answered = [(p.winner, q.winner) for p, q in zip(one, other, strict=True) if p.winner and q.winner]
    if not answered:
        raise ValueError(f"none of {len(one)} pairs has an answer of both judges")
    kinds = ("a", "b", "tie")
    table = np.array([[answered.count((r, c)) for c in kinds] for r in kinds]) / len(answered)
    chance = float(table.sum(0) @ table.sum(1))
    if chance >= 1:
        raise ValueError(f"both judges always answered {answered[0][0]!r}: kappa is undefined")
    return (float(np.trace(table)) - chance) / (1 - chance)


def _place(preference: Preference) -> tuple[str, int, str, str]:
    return preference.prompt, preference.seed, preference.method_a, preference.method_b


# --------------------------------------------------------------------------- Bradley-Terry


@dataclass(frozen=True)
class Strength:
    """A method's Bradley-Terry log-strength (the methods' mean is 0) with a 95% bootstrap interval.

    Of a single prompt there is no interval: nothing can be resampled.
    """

    method: str
    estimate: float
    low: float | None
    high: float | None


def bradley_terry(wins: np.ndarray, prior: float = 0.5) -> np.ndarray:
    """Log-strengths (M,) from wins (M, M), row over column, a tie being half a win for each (Hunter 2004, eq. 3).

    Args:
        wins: ``wins[i, j]`` times that i beat j.
        prior: wins added both ways to every pair that met, so that a method that never lost stays finite.

    Raises:
        ValueError: methods that no chain of comparisons connects, or no convergence.
    """
    met = (wins + wins.T) > 0
    _check_connected(met)
    wins = wins + prior * met
    games, own = wins + wins.T, wins.sum(1)
    strength = np.zeros(len(wins))
    for _ in range(STEPS):
        weight = np.exp(strength)
        updated = np.log(own) - np.log((games / (weight[:, None] + weight)).sum(1))
        updated -= updated.mean()
        if np.abs(updated - strength).max() < TOLERANCE:
            return updated
        strength = updated
    raise ValueError(f"Bradley-Terry did not converge in {STEPS} steps")


def _check_connected(met: np.ndarray) -> None:
    reached = np.linalg.matrix_power(met.astype(float) + np.eye(len(met)), len(met))[0] > 0
    if not reached.all():
        raise ValueError(f"methods {np.flatnonzero(~reached).tolist()} never met method 0, not even through others")


def rank_methods(preferences: Sequence[Preference], draws: int = 1000) -> list[Strength]:
    """Methods by Bradley-Terry strength, strongest first; intervals by bootstrap over prompts.

    Unanswered pairs are left out. All pairs of a prompt stay together in the bootstrap.

    Raises:
        ValueError: no answered pair, or methods that never met.
    """
    answered = [p for p in preferences if p.winner]
    if not answered:
        raise ValueError(f"none of {len(preferences)} pairs has an answer")
    names = sorted({name for p in answered for name in (p.method_a, p.method_b)})
    per_prompt = _wins_per_prompt(answered, names)  # (prompts, M, M)
    estimate = bradley_terry(per_prompt.sum(0))
    counts = np.random.default_rng(0).multinomial(
        len(per_prompt), np.full(len(per_prompt), 1 / len(per_prompt)), size=draws
    )
    met = (per_prompt.sum(0) + per_prompt.sum(0).T) > 0
    tables = np.einsum("dp,pij->dij", counts, per_prompt) + 1e-9 * met  # a replicate keeps every pair that met
    low, high = np.quantile([bradley_terry(table) for table in tables], [0.025, 0.975], axis=0).tolist()
    if len(per_prompt) < 2:
        low = high = [None] * len(names)
    found = [Strength(*values) for values in zip(names, estimate.tolist(), low, high, strict=True)]
    return sorted(found, key=lambda strength: -strength.estimate)


def _wins_per_prompt(preferences: Sequence[Preference], names: Sequence[str]) -> np.ndarray:
    prompts = {prompt: k for k, prompt in enumerate(dict.fromkeys(p.prompt for p in preferences))}
    place = {name: k for k, name in enumerate(names)}
    wins = np.zeros((len(prompts), len(names), len(names)))
    for p in preferences:
        a, b = place[p.method_a], place[p.method_b]
        share = {"a": 1.0, "b": 0.0, "tie": 0.5}[str(p.winner)]
        wins[prompts[p.prompt], a, b] += share
        wins[prompts[p.prompt], b, a] += 1 - share
    return wins
