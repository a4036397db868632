"""The table that a run prints."""

from __future__ import annotations

from collections.abc import Sequence

from addiff_env.evaluation.report.tables import TEXT, Cell, Entry, category_tables, method_table
from addiff_env.evaluation.statistics.summary import (
    COSTS,
    NOT_AVAILABLE,
    by_method,
    categories_of,
    headline_metric,
    score_value,
)
from addiff_env.types import ResultRow

HEADS = {"nfe": ("NFE", "NFE sd"), "net_flops": ("GFLOPs",), "seconds": ("s/image",)}


def summary_table(rows: Sequence[ResultRow], notes: Sequence[str] = ()) -> str:
    """A table with one line per method; success (or `headline_metric`) with its 95% interval, shares in percent.

    What the rows do not tell is `NOT_AVAILABLE`; lines below the table say why, and further ``notes``. Seconds are
    timed ones where the rows carry them.
    """
    metric = headline_metric(rows)
    named = {cost.name: cost for cost in COSTS}
    if any(row.timed_seconds is not None for row in rows):
        named["seconds"] = named["timed_seconds"]
    table = method_table(rows, metric, [named[name] for name in HEADS])
    (by_category,) = category_tables(rows, [metric], (0, 2))
    head = ["method", "n", metric, "95% interval", *(name for names in HEADS.values() for name in names)]
    lines = [[*head, "cont/stop/refine", *map(_short, categories_of(rows))]]
    for (method, entries), (_, parts) in zip(table.lines, by_category.lines, strict=True):
        number, quality, nfe, *costs, shares = entries
        shown = [TEXT.value(number), TEXT.value(quality), TEXT.interval(quality), *_mean_and_deviation(nfe)]
        shown += [TEXT.value(cost, NOT_AVAILABLE) for cost in costs]
        lines.append([method, *shown, TEXT.value(shares), *map(TEXT.value, parts)])
    text = aligned(lines)
    return "\n".join([text[0], "-" * len(text[0]), *text[1:], *absences(rows), *notes])


def _mean_and_deviation(found: Entry) -> list[str]:
    if not isinstance(found, Cell) or found.spread is None:
        return [NOT_AVAILABLE, NOT_AVAILABLE]
    return [TEXT.number(number, found.digits) for number in (found.value, found.spread)]


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells as text: the first column to the left, others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(cell.rjust(w) if k else cell.ljust(w) for k, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]


def _short(category: str) -> str:
    return category.replace("_objects", "").replace("_object", "").replace("color_attribution", "attrib.")


def absences(rows: Sequence[ResultRow]) -> list[str]:
    """Why the headline metric of a method stands for fewer pictures than it has, or for none; nothing where none is."""
    metric = headline_metric(rows)
    found = []
    for method, group in by_method(rows).items():
        if lacking := [row for row in group if score_value(row, metric) is None]:
            of = f"{len(lacking)} of its {len(group)} pictures" if len(lacking) < len(group) else "none of its pictures"
            verb = "lack one" if len(lacking) < len(group) else "has one"
            found.append(f"{metric} of {method}: {of} {verb}")
    return found
