"""How large an effect a test finds, and how many prompts or training runs it takes to decide."""

from __future__ import annotations

import math

from scipy import stats


def minimum_detectable_effect(spread: float, prompts: int, alpha: float = 0.05, run_error: float = 0.0) -> float:
    """Smallest true mean difference that a two-sided paired test finds with a power of 0.8.

    Args:
        spread: standard deviation of the per-prompt differences.
        prompts: number of prompts.
        alpha: level of the test.
        run_error: what training runs add to the standard error, see `required_prompts`.
    """
    error = math.hypot(spread / math.sqrt(prompts), run_error)
    return float((stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(0.8)) * error)


def required_prompts(
    gap: float, standard_error: float, prompts: int, alpha: float = 0.05, power: float = 0.8, run_error: float = 0.0
) -> int | None:
    """Prompts that a one-sided test needs to tell a value from a bound ``gap`` away; None where no number would do.

    Args:
        gap: distance of the true value from the bound, positive.
        standard_error: of the estimate from ``prompts`` prompts; it falls with their square root.
        prompts: number of prompts measured.
        alpha: level of the test.
        power: chance of finding it.
        run_error: the part of ``standard_error`` that does not fall: what training runs differ by. More runs are
            needed where it alone is too large, see `required_runs`.
    """
    wanted = _wanted_error(gap, alpha, power)
    room = wanted**2 - run_error**2  # 0.0 also where the squares are too small for a float
    if wanted <= run_error or room <= 0:
        return None
    needed = prompts * (max(0.0, standard_error**2 - run_error**2) / room)
    return max(2, math.ceil(needed)) if math.isfinite(needed) else None


def required_runs(gap: float, run_error: float, runs: int, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """Training runs that a one-sided test needs at the least, however many prompts; None where no number would do.

    Args:
        gap: distance of the true value from the bound, positive.
        run_error: what ``runs`` training runs add to the standard error; it falls with their square root. The
            bootstrap's is (R - 1)/R of the true variance, so that from few runs this number comes out low.
        runs: training runs measured.
        alpha: level of the test.
        power: chance of finding it.
    """
    wanted = _wanted_error(gap, alpha, power)
    ratio = run_error / wanted if wanted > 0 else math.inf
    needed = runs * (ratio * ratio)
    return math.floor(needed) + 1 if math.isfinite(needed) else None


def _wanted_error(gap: float, alpha: float, power: float) -> float:
    """Standard error at which a one-sided test finds ``gap`` with the power wanted; 0.0 where there is no gap."""
    return max(0.0, gap) / float(stats.norm.ppf(1 - alpha) + stats.norm.ppf(power))
