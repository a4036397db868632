"""The parts of the documentation's pages that are made of a run, between markers; nothing there is typed by hand.

A part begins with ``<!-- results: RUN/PART -->`` and ends with ``<!-- end: RUN/PART -->``, each a line of its own.
RUN is the name that a run was given, PART one of `PARTS`; parts of other runs stay as they are.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from addiff_env.evaluation.files import RunFolder
from addiff_env.evaluation.metrics.models import model_notes, read_metric_models
from addiff_env.evaluation.report.seconds import notes_of, speed_text
from addiff_env.evaluation.report.sections import comparison_tables, distinct_text
from addiff_env.evaluation.report.tables import TEXT, Cell, Entry, method_table
from addiff_env.evaluation.report.text import summary_table
from addiff_env.evaluation.run.run_folder import read_provenance, read_verdicts, reported_rows
from addiff_env.evaluation.statistics.comparisons import Comparison
from addiff_env.evaluation.statistics.families import agent_runs, control_names
from addiff_env.evaluation.statistics.summary import (
    COSTS,
    by_method,
    counted,
    headline_metric,
    share_metrics,
)
from addiff_env.evaluation.statistics.tiers import describe_tiers
from addiff_env.storage.files import read_text, replacing, write_whole
from addiff_env.types import ResultRow

PLOT = "quality_vs_compute"  # of a run folder, and with the run's name behind it of the documentation
_PART = re.compile(
    r"^<!-- results: (?P<name>\S+) -->\n(?P<text>.*?)^<!-- end: (?P=name) -->$", re.DOTALL | re.MULTILINE
)
_MARKER = re.compile(r"<!-- (?:results|end): (\S+) -->")


@dataclass(frozen=True)
class Run:
    """A reported run folder as the pages speak of it.

    Attributes:
        name: what its parts are called by.
        folder: where it lies.
        command: what made it, for readers.
        remarks: words behind a method's name, by method.
    """

    name: str
    folder: Path
    command: str
    remarks: Mapping[str, str]

    @property
    def rows(self) -> list[ResultRow]:
        """What was reported."""
        return reported_rows(self.folder)


# --------------------------------------------------------------------------- pages


def check_pages(pages: Sequence[Path], run: str) -> None:
    """Check that the pages can be filled, before anything long runs.

    Raises:
        FileNotFoundError: a page is not there.
        ValueError: markers that do not pair, an unknown part, or no part of ``run`` on any page.
    """
    names = [name for page in pages for name in _names(read_text(page), page)]
    if not any(name.startswith(f"{run}/") for name in names):
        raise ValueError(f"no part of {run!r} on {', '.join(map(str, pages))}: <!-- results: {run}/table --> is one")


def _names(text: str, page: Path) -> list[str]:
    """Names of the page's parts, in order."""
    names = [found["name"] for found in _PART.finditer(text)]
    markers = _MARKER.findall(text)
    if markers != [name for name in names for _ in range(2)]:
        odd = next((name for name in markers if markers.count(name) != 2 * names.count(name)), markers[0])
        raise ValueError(f"{page}: the markers of {odd!r} do not pair: each begins and ends once, on a line of its own")
    if unknown := [name for name in names if name.rpartition("/")[2] not in PARTS]:
        raise ValueError(f"{page}: unknown part {unknown[0]!r}; known: {', '.join(PARTS)}")
    return names


def fill_pages(pages: Sequence[Path], run: Run) -> list[Path]:
    """Make the parts of ``run`` anew on every page, and the plots that they show; returns what was written.

    Raises:
        FileNotFoundError, ValueError: as `check_pages`; or the run was not reported.
    """
    check_pages(pages, run.name)
    rows, written = run.rows, []
    for page in pages:
        plots = _pictures_of(page) / f"{PLOT}_{run.name}.png"

        def make(found: re.Match[str], plot: Path = plots, page: Path = page) -> str:
            owner, _, part = found["name"].rpartition("/")
            if owner != run.name:
                return found[0]
            if part == "plot":
                with replacing(plot) as partial:
                    shutil.copyfile(run.folder / f"{PLOT}.png", partial)
                written.append(plot)
            text = PARTS[part](run, rows, plot.relative_to(page.parent).as_posix())
            return f"<!-- results: {found['name']} -->\n{text.strip()}\n<!-- end: {found['name']} -->"

        write_whole(page, _PART.sub(make, read_text(page)))
        written.append(page)
    return list(dict.fromkeys(written))


def _pictures_of(page: Path) -> Path:
    """Where a page's pictures lie: beside it, or in ``docs`` below it."""
    return page.parent / "docs" if (page.parent / "docs").is_dir() else page.parent


# --------------------------------------------------------------------------- parts


def _sample(run: Run, rows: Sequence[ResultRow], plot: str) -> str:
    """What the run's pictures are of."""
    pictures, prompts = (len(set(keys)) for keys in (((r.prompt, r.seed) for r in rows), (r.prompt for r in rows)))
    benchmark = read_provenance(run.folder).get("benchmark", "a benchmark")
    of = f"{counted(pictures, 'picture')} ({counted(prompts, 'prompt')}) of `{benchmark}` a method"
    return f"{of}, in {distinct_text(rows, 'dtype')}, code {distinct_text(rows, 'code_version')}."


def _command(run: Run, rows: Sequence[ResultRow], plot: str) -> str:
    """How the run was made, and how long its pictures took."""
    minutes = sum(row.seconds for row in rows) / 60
    return f"{_sample(run, rows, plot)} Making the pictures took {minutes:,.0f} min:\n\n```sh\n{run.command}\n```"


def _as_printed(text: str) -> str:
    return "\n".join(filter(None, ["```text", text, "```"]))


def _summary(run: Run, rows: Sequence[ResultRow], plot: str) -> str:
    """Quality, cost and the agent's lead, without the controls of H4."""
    metric = headline_metric(rows)
    costs = [cost for cost in COSTS if cost.name in ("nfe", "net_flops")]
    agents = agent_runs(by_method(rows))
    controls = {name for agent in agents for name in control_names(agent)}
    leads = {one.baseline: _difference(one, rows) for one in _comparisons(rows)}
    unit, of = (", %", ", points") if metric in share_metrics(rows) else ("", "")
    head = [f"method | {metric}{unit}", *(cost.label for cost in costs), f"agent minus method{of}, paired"]
    lines = ["| " + " | ".join(head) + " |", "|---" * (len(costs) + 3) + "|"]
    for name, (_, quality, *spent, _) in method_table(rows, metric, costs).lines:
        if name not in controls:
            remark = f", {run.remarks[name]}" if name in run.remarks else ""
            cells = [f"`{name}`{remark}", _with_interval(quality), *map(_mean, spent), leads.get(name, "")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([f"{_sample(run, rows, plot)}{_made_by(run, rows)}", "", *lines])


def _made_by(run: Run, rows: Sequence[ResultRow]) -> str:
    """By which models the metric was made, as sentences behind another."""
    return "".join(f" {note}." for note in model_notes([headline_metric(rows)], read_metric_models(run.folder)))


def _mean(entry: Entry) -> str:
    return TEXT.number(entry.value, entry.digits) if isinstance(entry, Cell) else TEXT.value(entry)


def _with_interval(entry: Entry) -> str:
    if not isinstance(entry, Cell) or entry.low is None or entry.high is None:
        return _mean(entry)
    return f"{_mean(entry)} [{TEXT.number(entry.low, entry.digits)}, {TEXT.number(entry.high, entry.digits)}]"


def _differences(run: Run, rows: Sequence[ResultRow], plot: str) -> str:
    """The agent against every other method, paired."""
    lines = ["| method | agent minus method | p (Holm) |", "|---|---|---|"]
    lines += [f"| `{one.baseline}` | {_difference(one, rows)} | {_p_value(one.p_holm)} |" for one in _comparisons(rows)]
    by = _made_by(run, rows).strip()
    return "\n".join([*([by, ""] if by else []), *lines])


def _comparisons(rows: Sequence[ResultRow]) -> list[Comparison]:
    """Those of the report for its headline metric; none without an agent or anybody to compare it with."""
    return dict(comparison_tables(rows)["tables"]).get(headline_metric(rows), [])


def _difference(one: Comparison, rows: Sequence[ResultRow]) -> str:
    """In points where the metric is a share."""
    scale, digits = (100, 1) if one.metric in share_metrics(rows) else (1, 3)
    numbers = [f"{scale * value:+.{digits}f}" for value in (one.difference, one.low, one.high)]
    return numbers[0] if math.isnan(one.low) else f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"


def _p_value(p: float) -> str:
    return "-" if math.isnan(p) else "< .0001" if p < 1e-4 else f"{p:.2g}".removeprefix("0")


def _plot(run: Run, rows: Sequence[ResultRow], plot: str) -> str:
    """Quality against compute."""
    number = len(by_method(rows))
    costs = ["net FLOPs", "NFE", *(["seconds"] if any(row.timed_seconds is not None for row in rows) else [])]
    against = f"{', '.join(costs[:-1])} and {costs[-1]}"
    return f"![{headline_metric(rows)} against {against}, {counted(number, 'method')}]({plot})"


PARTS: dict[str, Callable[[Run, Sequence[ResultRow], str], str]] = {
    "summary": _summary,
    "command": _command,
    "table": lambda run, rows, plot: _as_printed(summary_table(rows, notes_of(run.folder, rows))),
    "seconds": lambda run, rows, plot: _as_printed(speed_text(run.folder)),
    "differences": _differences,
    "verdicts": lambda run, rows, plot: _as_printed(describe_tiers(read_verdicts(run.folder))),
    "plot": _plot,
    "bars": lambda run, rows, plot: _as_printed(read_text(RunFolder(run.folder).bars).rstrip()),
}
