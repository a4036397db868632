"""From rows to values that are paired: the same prompts, in the same order, of every method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from addiff_env.evaluation.statistics.summary import cost_named, score_value, scores_of
from addiff_env.types import ResultRow

Measure = Callable[[ResultRow], float]


def score_of(metric: str) -> Measure:
    """Read a metric off a row.

    The function raises ValueError where the row does not have it, naming the row and the metrics it has.
    """

    def read(row: ResultRow) -> float:
        if score_value(row, metric) is None:
            place = f"{row.method}, {row.prompt!r}, seed {row.seed}"
            raise ValueError(f"no {metric!r} in the row of ({place}); it has {sorted(scores_of(row))}")
        return row.scores[metric]

    return read


def costs_of(name: str) -> Measure:
    """Read a cost off a row, one of `COSTS`.

    The function raises ValueError where the row does not say it, naming the row.

    Raises:
        ValueError: another name.
    """
    cost = cost_named(name)

    def read(row: ResultRow) -> float:
        value = getattr(row, cost.name)
        if value is None:
            raise ValueError(f"no {cost.name} in the row of ({row.method}, {row.prompt!r}, seed {row.seed})")
        return float(value)

    return read


def paired_values(
    rows: Sequence[ResultRow], groups: Mapping[str, Sequence[str]] | Sequence[str], measures: Sequence[Measure]
) -> dict[str, np.ndarray]:
    """Per-prompt means of measures, float64 (measures, runs, prompts), the same prompts in the same order for each.

    Args:
        rows: per-image rows of all methods.
        groups: methods to read, or a mapping of a name to the methods that are its training runs, e.g.
            ``{"agent": ["agent-s0", "agent-s1"], "ddim-50": ["ddim-50"]}``.
        measures: what to read off each row, see `score_of` and `costs_of`.

    Raises:
        ValueError: no rows of a method, two rows of one picture, or pictures that only some methods made: pairs would
            not be pairs. The message names them.
    """
    if not isinstance(groups, Mapping):
        groups = {name: [name] for name in groups}
    methods = [method for runs in groups.values() for method in runs]
    tables = _tables(rows, methods)
    _refuse_unpaired(tables)
    places = list(next(iter(tables.values())))
    owner = _owners(prompt for prompt, _ in places)
    per_method = {m: _prompt_means([table[p] for p in places], owner, measures) for m, table in tables.items()}
    return {name: np.stack([per_method[m] for m in runs], axis=1) for name, runs in groups.items()}


def on_common_pictures(rows: Sequence[ResultRow], methods: Sequence[str]) -> tuple[list[ResultRow], list[str]]:
    """The rows on those pictures that all of ``methods`` have, and in words which method lacks how many."""
    own = {name: {(row.prompt, row.seed) for row in rows if row.method == name} for name in methods}
    everything = set().union(*own.values())
    common = everything.intersection(*own.values())
    notes = [
        f"{name} lacks {len(everything - places)} of {len(everything)} pictures, which are left out for all"
        for name, places in own.items()
        if places != everything
    ]
    return [row for row in rows if (row.prompt, row.seed) in common], notes


def picture_counts(rows: Sequence[ResultRow], groups: Mapping[str, Sequence[str]]) -> np.ndarray:
    """Pictures of each prompt, int64 (prompts,), in the order of the `paired_values` of the same groups.

    Raises:
        ValueError: as `paired_values`.
    """
    first = next(iter(groups.values()))[0]  # whose rows set the order
    return np.bincount(_owners(prompt for prompt, _ in _tables(rows, [first])[first]))


def _owners(prompts: Iterable[str]) -> np.ndarray:
    """Which prompt each picture belongs to, numbered by first appearance (pictures,)."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(prompt, len(numbers)) for prompt in prompts])


def _tables(rows: Sequence[ResultRow], methods: Sequence[str]) -> dict[str, dict[tuple[str, int], ResultRow]]:
    tables: dict[str, dict[tuple[str, int], ResultRow]] = {method: {} for method in methods}
    for row in rows:
        table = tables.get(row.method)
        if table is None:
            continue
        if (row.prompt, row.seed) in table:
            raise ValueError(f"two rows of {row.method!r} for {row.prompt!r}, seed {row.seed}")
        table[row.prompt, row.seed] = row
    empty = [method for method, table in tables.items() if not table]
    if empty:
        raise ValueError(f"no rows of {empty}; rows are of {sorted({row.method for row in rows})}")
    return tables


def _refuse_unpaired(tables: Mapping[str, Mapping[tuple[str, int], ResultRow]]) -> None:
    everything = dict.fromkeys(place for table in tables.values() for place in table)
    for method, table in tables.items():
        absent = [place for place in everything if place not in table]
        if absent:
            raise ValueError(
                f"{method!r} lacks {len(absent)} of {len(everything)} pictures that others made, e.g. {absent[0]}; "
                "only the same (prompt, seed) can be compared"
            )


def _prompt_means(rows: Sequence[ResultRow], owner: np.ndarray, measures: Sequence[Measure]) -> np.ndarray:
    """Means over each prompt's pictures, (measures, prompts)."""
    counts = np.bincount(owner)
    return np.stack([np.bincount(owner, [measure(row) for row in rows]) / counts for measure in measures])
