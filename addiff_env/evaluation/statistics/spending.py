"""What "equal compute" is measured in: any cost of a row, and what is not known of it beyond the prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from addiff_env.evaluation.statistics.bootstrap import Resampled
from addiff_env.evaluation.statistics.decision import Rules
from addiff_env.evaluation.statistics.families import Groups
from addiff_env.evaluation.statistics.summary import Cost, cost_named, number_text
from addiff_env.evaluation.statistics.timings import TIMED, Timings


@dataclass(frozen=True)
class Spending:
    """A cost at which methods are compared.

    Attributes:
        cost: one of `COSTS`.
        timings: where the cost is timed seconds, whose rounds are resampled beside prompts.
    """

    cost: Cost
    timings: Timings | None = None

    def text(self, value: float) -> str:
        """A mean cost with its unit."""
        return f"{number_text(value / self.cost.unit, self.cost.digits)} {self.cost.label}"

    def with_rounds(self, found: Resampled, groups: Groups, rules: Rules) -> Resampled:
        """Replicates whose costs (measure 1) vary with the rounds of the timings as well; else as they are.

        Of several training runs the mean of their factors counts.
        """
        if self.timings is None:
            return found
        names = [name for members in groups.values() for name in members]
        factors = self.timings.factors(names, len(next(iter(found.draws.values()))), rules.seed)
        draws = {name: array.copy() for name, array in found.draws.items()}
        for name, members in groups.items():
            draws[name][:, 1] *= np.mean([factors[member] for member in members], axis=0)
        return replace(found, draws=draws)


NET_FLOPS, NFE = Spending(cost_named("net_flops")), Spending(cost_named("nfe"))


def at_seconds(timings: Timings) -> Spending:
    """Timed seconds, of rows that carry them (`Timings.onto`)."""
    return Spending(cost_named(TIMED), timings)
