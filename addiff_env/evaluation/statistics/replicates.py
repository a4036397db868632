"""Paired values of a hypothesis's methods, and bootstrap replicates of their means.

Where the metric is 0 or 1, replicates are drawn from the prompts and two more, on one of which only the agent passes,
and on the other everything but the agent (after Bonett & Price 2012). Methods that disagree on no prompt, or hardly
any, would otherwise have an interval of no width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from addiff_env.evaluation.statistics.bootstrap import Resampled, mean_over_pictures, resampled_means
from addiff_env.evaluation.statistics.decision import Rules
from addiff_env.evaluation.statistics.families import Groups
from addiff_env.evaluation.statistics.pairing import Measure, paired_values, picture_counts
from addiff_env.evaluation.statistics.summary import share_metrics
from addiff_env.types import ResultRow

Values = Mapping[str, np.ndarray]  # per group (measures, runs, prompts)
AGENT = ""  # the agent's runs as one group; no method has this name


@dataclass(frozen=True)
class PairedValues:
    """Values of every group, the metric first, and the same with two prompts more where the metric is 0 or 1."""

    values: Values
    padded: Values
    pictures: np.ndarray  # of each prompt (prompts,): what it weighs

    @property
    def prompts(self) -> int:
        """How many there are."""
        return len(self.pictures)

    def against(self) -> PairedValues:
        """The agent minus each control, run by run: a control repeats the decisions of one run."""
        return replace(self, values=_against(self.values), padded=_against(self.padded))


def read_paired(rows: Sequence[ResultRow], groups: Groups, measures: Sequence[Measure], rules: Rules) -> PairedValues:
    """Read ``measures`` of every group off the rows, the rules' metric first; raises as `paired_values`."""
    values, pictures = paired_values(rows, groups, measures), picture_counts(rows, groups)
    if rules.metric not in share_metrics(rows):
        return PairedValues(values, values, pictures)
    padded = {name: _with_disagreement(array, pictures, name == AGENT) for name, array in values.items()}
    return PairedValues(values, padded, pictures)


def _with_disagreement(array: np.ndarray, pictures: np.ndarray, is_agent: bool) -> np.ndarray:
    """(measures, runs, prompts + 2): a prompt that only the agent passes, one that only it fails, at mean cost."""
    further = np.repeat(mean_over_pictures(array, pictures)[..., None], 2, axis=2)  # (measures, runs, 2)
    further[0] = (1.0, 0.0) if is_agent else (0.0, 1.0)
    return np.concatenate([array, further], axis=2)


def resample_means(read: PairedValues, rules: Rules) -> Resampled:
    """The means of the values with replicates of the padded ones, moved to have the same centre."""
    runs = {name: mean_over_pictures(array, read.pictures) for name, array in read.values.items()}
    means = {name: array.mean(1) for name, array in runs.items()}
    number = next(iter(read.padded.values())).shape[-1] - read.prompts
    pictures = np.append(read.pictures, np.full(number, read.pictures.mean()))  # a prompt more is one of the usual size
    drawn = resampled_means(read.padded, rules.draws, rules.seed, pictures)
    centres = {name: mean_over_pictures(array, pictures).mean(1) for name, array in read.padded.items()}
    centred = {name: draws + means[name] - centres[name] for name, draws in drawn.items()}
    return Resampled(means, centred, rules.level, runs)


def _against(values: Values) -> Values:
    return {name: values[AGENT] - array for name, array in values.items() if name != AGENT}
