"""What a report says of timed seconds: the machine, what could not be timed, pictures a second at equal quality."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from addiff_env.evaluation.metrics.models import model_notes, read_metric_models
from addiff_env.evaluation.report.exports import write_lines
from addiff_env.evaluation.report.tables import TEXT, Cell, Entry, Table, with_interval
from addiff_env.evaluation.report.text import aligned
from addiff_env.evaluation.run.run_folder import reported_rows, usable_timings
from addiff_env.evaluation.statistics.rules import read_rules
from addiff_env.evaluation.statistics.speed import Speed, equal_quality_speeds
from addiff_env.evaluation.statistics.summary import headline_metric, share_metrics
from addiff_env.evaluation.statistics.timings import describe_machine
from addiff_env.types import ResultRow

NONE = "none is as good"
SPEED_HEAD = ("method", "quality", "seconds", "pictures_per_second", "rival", "rival_seconds", "ratio", "low", "high")


def timing_notes(folder: Path, rows: Sequence[ResultRow]) -> list[str]:
    """Where seconds were measured, what makes them doubtful, and who has none; nothing where the run was not timed."""
    timings = usable_timings(folder, rows)
    if timings is None:
        return []
    without = timings.why_untimed(rows)
    timed = [f"timed seconds: {describe_machine(timings)}"] if timings.methods else []
    return [*timed, *timings.cautions(rows), *(f"{name} was not timed: {why}" for name, why in without.items())]


def notes_of(folder: Path, rows: Sequence[ResultRow]) -> list[str]:
    """What stands below the run's table: by which models its metric was made, and about timed seconds."""
    return [*model_notes([headline_metric(rows)], read_metric_models(folder)), *timing_notes(folder, rows)]


def speeds_of(folder: Path, rows: Sequence[ResultRow]) -> list[Speed]:
    """Pictures a second at equal quality of the run's methods; none where it was not timed."""
    timings = usable_timings(folder, rows)
    return [] if timings is None else equal_quality_speeds(rows, timings, read_rules(folder, headline_metric(rows)))


def speed_table(rows: Sequence[ResultRow], speeds: Sequence[Speed]) -> Table:
    """Each method's pictures a second beside those of the cheapest fixed-step method of at least equal quality."""
    metric = headline_metric(rows)
    is_share = metric in share_metrics(rows)

    def entries(one: Speed) -> list[Entry]:
        quality = Cell(100 * one.quality, 1) if is_share else Cell(one.quality, 3)
        if one.rival is None:
            return [quality, _rate(one.seconds), NONE, None, _at_least(one) or None]
        return [quality, _rate(one.seconds), one.rival, _rate(one.rival_seconds), _ratio(one)]

    head = [
        metric + " (%)" * is_share,
        "pictures/s",
        "cheapest fixed method as good",
        "its pictures/s",
        "times as fast",
    ]
    return Table(head, [(one.method, entries(one)) for one in speeds])


def _rate(seconds: float) -> Cell:
    """Pictures a second, to about three digits."""
    rate = 1 / seconds
    return Cell(rate, max(0, 2 - math.floor(math.log10(rate))) if rate < 1000 else 0)


def _ratio(one: Speed) -> Cell:
    finite = one.low is not None and one.high is not None and math.isfinite(one.high)
    return Cell(one.ratio, 2, one.low if finite else None, one.high if finite else None, note=_at_least(one))


def _at_least(one: Speed) -> str:
    """The interval's lower end in words, where it has no upper one: in some replicates no fixed method is as good."""
    is_open = one.low is not None and math.isfinite(one.low) and not (one.high is not None and math.isfinite(one.high))
    return f"at least {one.low:.2f}" if is_open else ""


def speed_text(folder: Path) -> str:
    """The table of a run's speeds, with where it was measured; says so where there is none."""
    rows = reported_rows(folder)
    notes, table = notes_of(folder, rows), speed_table(rows, speeds_of(folder, rows))
    if not table.lines:
        return "\n".join(["no method with a score was timed", *notes])
    lines = [
        ["method", *table.columns],
        *([name, *(with_interval(entry, TEXT) for entry in entries)] for name, entries in table.lines),
    ]
    head, *body = aligned(lines)
    return "\n".join(["Pictures a second at equal quality", "", head, "-" * len(head), *body, "", *notes])


def write_speeds_csv(speeds: Sequence[Speed], path: Path) -> None:
    """One line per method; what there is not, such as a rival, is empty."""
    lines = []
    for one in speeds:
        numbers = [one.rival_seconds, one.ratio, one.low, one.high]
        known = [value if value is not None and math.isfinite(value) else None for value in numbers]
        lines.append([one.method, one.quality, one.seconds, one.per_second, one.rival, *known])
    write_lines(path, SPEED_HEAD, lines)
