"""``report.html``: one self-contained page from a run folder's files; no model is needed.

``addiff report runs/evaluate`` writes it, ``table.tex`` and ``table.csv`` again.
"""

from __future__ import annotations

import argparse
import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from addiff_env.env.trajectories import INK, overlay
from addiff_env.evaluation.benchmarks.items import Item, categories_in_turn
from addiff_env.evaluation.metrics.set_results import SPREAD, Whole, read_whole
from addiff_env.evaluation.report.exports import latex_table, write_csv, write_whole_csv
from addiff_env.evaluation.report.figures import (
    ACTION_COLORS,
    AGENT,
    FAMILIES,
    GRID,
    absences,
    actions_figure,
    complexity_figure,
    quality_figure,
    shares_text,
)
from addiff_env.evaluation.run.run_folder import (
    SETTINGS,
    Strip,
    read_items,
    read_provenance,
    read_strips,
    read_verdicts,
    reported_rows,
    write_verdicts,
)
from addiff_env.evaluation.statistics.hypotheses import LEAST_PROMPTS, Rules, Verdict, agent_runs, decide, describe
from addiff_env.evaluation.statistics.rules import configured_rules, read_rules
from addiff_env.evaluation.statistics.significance import compare_methods, on_common_pictures
from addiff_env.evaluation.statistics.summary import (
    COSTS,
    NOT_AVAILABLE,
    Estimate,
    MethodSummary,
    by_facts,
    by_method,
    categories_of,
    counted,
    decision_counts,
    estimate,
    headline_metric,
    metric_names,
    number_text,
    score_value,
    scores_of,
    share_metrics,
    summarise,
)
from addiff_env.evaluation.vlm_judge.client import JUDGEMENT, OUTCOMES
from addiff_env.storage.files import claim, read_json
from addiff_env.storage.paths import looked_at
from addiff_env.storage.pictures import read_picture
from addiff_env.types import ACTIONS, ResultRow

SUBJECT = "agent"  # whose comparisons are shown, all its training runs together; decisions and failures: the first's
MAX_FAILURES, MAX_SIDE = 12, 192  # pictures shown, and their largest side in pixels
LEFT_OUT = "left_out"  # in a run's provenance: methods and metrics that were asked for and could not be had
WRITTEN = ("report.html", "table.tex", "table.csv", "table_whole.csv")
CLAIMS = {
    "H1": "Efficiency: quality equal to 50-step inference at no more than {max_nfe:g} NFE on average.",
    "H2": "Quality: higher quality than any fixed-step method at equal compute.",
    "H3": "Adaptivity: simple prompts stop early, complex ones get more evaluations.",
    "H4": "Refinement: refining regions beats the same compute spent on full-image steps.",
}
DARK = {  # what each colour of the plots becomes on a dark page
    INK: "#e4e7ec",
    GRID: "#3d4452",
    AGENT: "#ff8c57",
    **dict(zip(FAMILIES, ("#6cb4ff", "#69d07c", "#b197fc", "#ff86ad", "#4fd0e4", "#e3bf3c"), strict=True)),
    **dict(zip(ACTION_COLORS, ("#6ea8ec", "#98a1b0", "#ff8c42"), strict=True)),
}
Place = tuple[str, int]  # (prompt, seed)


def write_report(
    folder: Path, rows: Sequence[ResultRow], items: Sequence[Item], verdicts: Sequence[Verdict]
) -> list[Path]:
    """Write ``report.html``, ``table.tex`` and ``table.csv`` into a run folder; returns their paths.

    Where protocols or set metrics were measured there is ``table_whole.csv`` as well.

    Args:
        folder: the run, whose pictures, filmstrips, ``config.yaml``, ``provenance.json``, ``protocols.json``,
            ``set_metrics.json`` and ``judge.json`` are shown where they exist.
        rows: per-image rows of all methods.
        items: the benchmark's items.
        verdicts: H1-H4; none where no agent was evaluated.

    Raises:
        ValueError: no rows, or a row that belongs to no item.
    """
    if not rows:
        raise ValueError(f"no rows to report on in {folder}")
    page, tex, table, further = (folder / name for name in WRITTEN)
    whole = read_whole(folder, rows, items)
    write_csv(rows, table)
    tex.write_text(latex_table(rows, _caption(rows, read_provenance(folder)), whole), encoding="utf-8")
    page.write_text(render(folder, rows, items, verdicts), encoding="utf-8")
    further.unlink(missing_ok=True)  # of an earlier report
    if not whole:
        return [page, tex, table]
    write_whole_csv(whole, further)
    return [page, tex, table, further]


def _caption(rows: Sequence[ResultRow], provenance: Mapping[str, Any]) -> str:
    number, name = len(next(iter(by_method(rows).values()))), provenance.get("benchmark", "benchmark")
    return f"{name}, {counted(number, 'picture')}, {_one(rows, 'backbone')}, {_one(rows, 'dtype')}"


def _one(rows: Sequence[ResultRow], name: str) -> str:
    return ", ".join(dict.fromkeys(str(getattr(row, name)) for row in rows))


def render(folder: Path, rows: Sequence[ResultRow], items: Sequence[Item], verdicts: Sequence[Verdict]) -> str:
    """The page as text, see `write_report`. Everything read from files is escaped by the template."""
    own = by_method(rows).get(_subject(rows), [])
    facts = {(item.prompt, item.seed): item.facts for item in items}
    rules = read_rules(folder, headline_metric(rows))
    cards, provenance = Cards(rows, folder), read_provenance(folder)
    return _template().render(
        css=Markup(_css()),  # noqa: S704 (ours)
        caption=_caption(rows, provenance),
        benchmark=provenance.get("benchmark", "benchmark"),
        pictures=len({(row.prompt, row.seed) for row in rows}),
        prompts=len({row.prompt for row in rows}),
        metric=headline_metric(rows),
        verdicts=verdicts,
        claims={name: claim.format(max_nfe=rules.max_nfe) for name, claim in CLAIMS.items()},
        rules=_rules(rules),
        left_out=provenance.get(LEFT_OUT, []),
        subject=_subject(rows),
        methods=_method_table(rows),
        absences=absences(rows),
        metrics=_metric_table(rows),
        whole=_whole_tables(read_whole(folder, rows, items)),
        comparisons=_comparisons(rows) if own and len(own) < len(rows) else None,
        judged=_judged(folder),
        plots=[_svg(quality_figure(rows, [name]), f"quality-{name}") for name in ("net_flops", "nfe")],
        actions=_actions(own),
        complexity=_complexity(own, facts) if own else None,
        categories=_category_tables(rows),
        gallery=[cards.trajectory(strip) for strip in read_strips(folder)],
        failures=cards.failures() if own else None,
        provenance=_provenance(folder, rows, provenance),
    )


def _subject(rows: Sequence[ResultRow]) -> str:
    """The agent's first training run among the methods; `SUBJECT` where there is none."""
    return next(iter(agent_runs(by_method(rows))), SUBJECT)


def _rules(rules: Rules) -> dict[str, Any]:
    """The rules, the level of the tests in percent."""
    return {**asdict(rules), "alpha": f"{100 * rules.alpha:g}"}


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("addiff_env.evaluation.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["signed"] = lambda value: f"{value:+.1f}"
    environment.filters["fixed"] = lambda value: _fixed(value, 3)
    environment.filters["counted"] = counted
    environment.filters["short"] = lambda value: f"{value:.4g}"
    environment.filters["p_value"] = lambda value: (
        "–" if math.isnan(value) else "< 0.0001" if value < 1e-4 else f"{value:.2g}"
    )
    return environment.get_template("report.html.jinja")


def _css() -> str:
    """The style sheet, with the plots' colours for light and for dark pages in front."""
    light, dark = (
        "".join(f"{_variable(color)}:{value};" for color, value in pairs)
        for pairs in ([(color, color) for color in DARK], DARK.items())
    )
    rules = f":root{{{light}}}\n@media (prefers-color-scheme: dark){{:root{{{dark}}}}}\n"
    return rules + (Path(__file__).parent / "templates" / "report.css").read_text()


def _variable(color: str) -> str:
    return f"--plot-{color.removeprefix('#')}"


# --------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Cell:
    """An estimate as shown: percent where it is a share."""

    mean: str
    interval: str = ""
    note: str = ""  # e.g. how many pictures, where not all have the metric
    level: float | None = None  # in [0, 1], for shading; None: not shaded


def _cell(found: Estimate | None, is_share: bool, number: int) -> Cell:
    """An estimate over some of ``number`` pictures; not available where none of them has it."""
    if found is None:
        return Cell(NOT_AVAILABLE)
    scale, digits = (100, 1) if is_share else (1, 3)
    note = "" if found.number == number else f"n = {found.number:,}"
    interval = ""
    if found.low is not None and found.high is not None:
        interval = f"{_fixed(scale * found.low, digits)} to {_fixed(scale * found.high, digits)}"
    return Cell(_fixed(scale * found.mean, digits), interval, note, found.mean if is_share else None)


def _fixed(value: float, digits: int) -> str:
    if math.isnan(value):
        return "–"
    if math.isinf(value):  # an effect size where every prompt differs by the same
        return "∞" if value > 0 else "−∞"
    return (f"{value:,.{digits}f}" if abs(value) < 1e9 else number_text(value, digits)).replace("-", "−")


def _method_table(rows: Sequence[ResultRow]) -> dict[str, Any]:
    """The main table: quality, costs and actions of each method."""
    metric, shares, summaries = headline_metric(rows), share_metrics(rows), summarise(rows)
    costs = [cost for cost in COSTS if any(cost.name in summary.costs for summary in summaries)]
    lines = []
    for summary in summaries:
        shown = [_cost_text(summary, cost.name, cost.unit, cost.digits) for cost in costs]
        quality = _cell(summary.scores.get(metric), metric in shares, summary.number)
        lines.append((summary.method, summary.number, quality, shown, shares_text(summary.actions)))
    return {"costs": [cost.label for cost in costs], "lines": lines, "percent": metric in shares}


def _cost_text(summary: MethodSummary, name: str, unit: float, digits: int) -> str:
    found = summary.costs.get(name)
    if found is None:
        return "–"
    spread = f" ± {_fixed(found.deviation, 1)}" if name == "nfe" else ""
    return _fixed(found.mean / unit, digits) + spread


def _metric_table(rows: Sequence[ResultRow]) -> dict[str, Any]:
    """Every per-image metric of every method."""
    names, shares = metric_names(rows), share_metrics(rows)
    lines = [
        (summary.method, [_cell(summary.scores.get(name), name in shares, summary.number) for name in names])
        for summary in summarise(rows)
    ]
    return {"names": [name + " (%)" * (name in shares) for name in names], "lines": lines}


def _whole_tables(whole: Whole) -> dict[str, Any] | None:
    """Protocols and set metrics as tables of text; None where there are none."""
    if not whole:
        return None
    tables = []
    for metric, methods in whole.protocols.items():
        names = whole.categories(metric)
        lines = [(name, [_digits(means.get(key)) for key in names]) for name, means in methods.items()]
        tables.append({"title": f"{metric}, by its own protocol", "names": names, "lines": lines})
    if whole.sets:
        names = whole.set_names()
        lines = [
            (name, [f"{values['pictures']:,}", *(_set_value(values, key) for key in names)])
            for name, values in whole.sets.items()
        ]
        tables.append({"title": "set metrics", "names": ["pictures", *names], "lines": lines})
    return {"tables": tables, "references": list(whole.references.items()), "notes": whole.notes}


def _set_value(values: Mapping[str, float], name: str) -> str:
    spread = values.get(SPREAD.get(name, ""))
    return _digits(values.get(name)) + ("" if spread is None else f" ± {_digits(spread)}")


def _digits(value: float | None) -> str:
    return NOT_AVAILABLE if value is None else _fixed(value, 4)


def _category_tables(rows: Sequence[ResultRow]) -> list[dict[str, Any]]:
    """One table per metric, methods by categories; the headline metric first."""
    shares, categories, headline = share_metrics(rows), categories_of(rows), headline_metric(rows)
    parts = [[row for row in rows if row.category == category] for category in categories]
    found = [{summary.method: summary for summary in summarise(part, shares)} for part in parts]
    numbers = [len({(row.prompt, row.seed) for row in part}) for part in parts]
    tables = []
    for name in sorted(metric_names(rows), key=lambda name: name != headline):
        lines = [(method, [_of(summaries, method, name, shares) for summaries in found]) for method in by_method(rows)]
        tables.append({"metric": name + " (%)" * (name in shares), "lines": lines})
    return [{**table, "categories": list(zip(categories, numbers, strict=True))} for table in tables]


def _of(summaries: Mapping[str, MethodSummary], method: str, metric: str, shares: frozenset[str]) -> Cell:
    if method not in summaries:
        return Cell("–")
    return _cell(summaries[method].scores.get(metric), metric in shares, summaries[method].number)


def _comparisons(rows: Sequence[ResultRow]) -> dict[str, Any]:
    """The agent's training runs against every other method, for each metric that all rows have; corrected together.

    Pictures that one of the methods lacks are left out, and so are methods and metrics without any; ``notes`` say so.
    """
    metric, runs = headline_metric(rows), agent_runs(by_method(rows))
    measured = [row for row in rows if score_value(row, metric) is not None]
    methods = list(by_method(measured))
    runs, others = [name for name in methods if name in runs], [name for name in methods if name not in runs]
    paired, notes = on_common_pictures(measured, methods)
    lacking = [name for name in by_method(rows) if name not in methods]
    notes += [f"{name} has no {metric}" for name in lacking]
    prompts = len({row.prompt for row in paired})
    if not runs or not others:
        return {"tables": [], "notes": [*notes, f"{'no other method' if runs else 'no agent'} has {metric}"]}
    if prompts < 2:
        return {"tables": [], "notes": [*notes, f"a comparison needs two prompts, got {prompts}"]}
    metrics = [name for name in metric_names(paired) if all(name in scores_of(row) for row in paired)]
    notes += [f"{name} is missing in some rows" for name in metric_names(paired) if name not in metrics]
    found = compare_methods(paired, {SUBJECT: runs}, others, metrics)
    if prompts < LEAST_PROMPTS:  # as for verdicts: a bootstrap of so few says nothing
        nan = math.nan
        found = [replace(one, low=nan, high=nan, p_bootstrap=nan, p_holm=nan, minimum_detectable=nan) for one in found]
        notes.append(f"intervals and p-values need {LEAST_PROMPTS} prompts, got {prompts}")
    return {"tables": [(name, [one for one in found if one.metric == name]) for name in metrics], "notes": notes}


def _actions(own: Sequence[ResultRow]) -> dict[str, Any] | None:
    """What the agent did at its first, second, ... decision: shares of the pictures that came so far."""
    if not any(row.actions for row in own):
        return None
    counts = decision_counts(own)  # (decisions, 3)
    lines = [
        (k, int(line.sum()), [f"{100 * share:.1f}" for share in line / line.sum()]) for k, line in enumerate(counts, 1)
    ]
    return {"svg": _svg(actions_figure(own), "actions"), "names": ACTIONS, "lines": lines}


def _complexity(own: Sequence[ResultRow], facts: Mapping[Place, int]) -> dict[str, Any]:
    """NFE and quality by how much the pictures must get right."""
    metric = headline_metric(own)
    is_share = metric in share_metrics(own)
    lines = []
    for level, group in by_facts(own, facts).items():
        prompts = [row.prompt for row in group]
        spent = _cell(estimate([row.nfe for row in group], prompts), False, len(group))
        quality = _cell(_estimate_of(metric, group, is_share), is_share, len(group))
        lines.append((level, len(group), spent, quality))
    return {"svg": _svg(complexity_figure(own, facts), "complexity"), "lines": lines, "percent": is_share}


def _estimate_of(metric: str, group: Sequence[ResultRow], is_share: bool) -> Estimate | None:
    measured = [(value, row.prompt) for row in group if (value := score_value(row, metric)) is not None]
    return (
        estimate([value for value, _ in measured], [prompt for _, prompt in measured], is_share) if measured else None
    )


# --------------------------------------------------------------------------- judges


def _judged(folder: Path) -> dict[str, Any] | None:
    """What vision-language models preferred, from ``judge.json``; None where nobody was asked."""
    path = folder / JUDGEMENT
    if not path.exists():
        return None
    found = read_json(path)
    try:
        return _judged_tables(found)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no judgement: {type(error).__name__}: {error}") from error


def _judged_tables(found: Mapping[str, Any]) -> dict[str, Any]:
    judges = {f"{name} ({one['model']})": one for name, one in found["judges"].items()}
    columns = judges if len(judges) == 1 else {**judges, "all judges": found["together"]}
    return {
        **{name: found[name] for name in ("prompts", "pictures", "spent_usd", "agreement")},
        "tables": [(name, [_pair_line(pair) for pair in one["pairs"]]) for name, one in columns.items()],
        "names": list(columns),
        "ranking": _ranking(columns),
        "notes": [f"{name}: {one['note']}" for name, one in columns.items() if one["note"]],
    }


def _pair_line(pair: Mapping[str, Any]) -> dict[str, Any]:
    """Two methods' line: shares of wins, ties and losses as cells."""
    rates = [_rate(pair[outcome], pair["pairs"]) if outcome in pair else Cell("–") for outcome in OUTCOMES]
    return {**pair, "rates": rates}


def _rate(found: Mapping[str, float], number: int) -> Cell:
    return _cell(Estimate(number, found["share"], 0.0, found["low"], found["high"]), True, number)


def _ranking(columns: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[Cell]]]:
    """Methods by strength in the last column, with what each judge makes of them."""
    of = [{one["method"]: one for one in column["ranking"]} for column in columns.values()]
    names = list(dict.fromkeys(name for ranking in reversed(of) for name in ranking))
    return [(name, [_strength(ranking.get(name)) for ranking in of]) for name in names]


def _strength(found: Mapping[str, Any] | None) -> Cell:
    if found is None:
        return Cell("–")
    return Cell(_fixed(found["estimate"], 3), f"{_fixed(found['low'], 3)} to {_fixed(found['high'], 3)}")


# --------------------------------------------------------------------------- pictures


class Pictures:
    """A run's pictures as data URIs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()

    def of(self, row: ResultRow) -> str | None:
        """The picture of a row; None where it was not kept.

        Raises:
            ValueError: the row names a file outside the run folder.
        """
        if not row.image:
            return None
        path = (self.folder / row.image).resolve()
        if not path.is_relative_to(self.folder):
            raise ValueError(f"{row.image!r} lies outside the run folder {self.folder}")
        return png_uri(read_picture(path)) if path.exists() else None


def png_uri(picture: np.ndarray) -> str:
    """A picture uint8 (H, W, 3) as a data URI, made smaller where a side is longer than `MAX_SIDE`."""
    image = Image.fromarray(picture)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _svg(figure: Figure, name: str) -> Markup:
    """A figure as inline SVG: colours follow the page, ids start with ``name``, nothing refers to another file."""
    buffer = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(_METADATA))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style[^>]*>.*?</style>|<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for color in DARK:
        text = text.replace(color, f"var({_variable(color)})")
    text = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', text, count=1)
    return Markup(text)  # noqa: S704 (matplotlib escapes text)


_METADATA = ("Creator", "Date", "Format", "Type")


# --------------------------------------------------------------------------- galleries


class Cards:
    """Prompts with what each method made of them, side by side."""

    def __init__(self, rows: Sequence[ResultRow], folder: Path) -> None:
        self.pictures, self.metric = Pictures(folder), headline_metric(rows)
        self.is_share = self.metric in share_metrics(rows)  # passed or failed, as by the checker or GenEval's rules
        self.groups, self.subject = by_method(rows), _subject(rows)
        self.by_place: dict[Place, list[ResultRow]] = {}
        for row in rows:
            self.by_place.setdefault((row.prompt, row.seed), []).append(row)

    def trajectory(self, strip: Strip) -> dict[str, Any]:
        """A recorded trajectory, and the final pictures of every method for the same prompt and noise."""
        place = strip.item.prompt, strip.item.seed
        own = [row for row in self.by_place.get(place, []) if row.method == self.subject]
        return {
            "item": strip.item,
            "reason": strip.reason,
            "frames": [_frame(frame) for frame in strip.frames],
            "differs": any(row.actions != strip.actions for row in own),
            "made": self.made(place),
        }

    def made(self, place: Place) -> list[dict[str, Any]]:
        """Final pictures of one prompt and noise, methods in order."""
        return [self._final(row) for row in self.by_place.get(place, [])]

    def _final(self, row: ResultRow) -> dict[str, Any]:
        value = score_value(row, self.metric)
        passed = bool(value) if self.is_share and value is not None else None
        words = row.reason or f"{self.metric} {NOT_AVAILABLE if value is None else f'{value:.3g}'}"
        return {"method": row.method, "uri": self.pictures.of(row), "passed": passed, "words": words, "nfe": row.nfe}

    def failures(self) -> dict[str, Any] | None:
        """What the agent failed, categories in turn, and who passed where it failed; None for graded scores."""
        if not self.is_share:
            return None
        own = {
            (row.prompt, row.seed): row for row in self.groups[self.subject] if _outcome(row, self.metric) is not None
        }
        failed = [row for row in own.values() if not _outcome(row, self.metric)]
        others = {name: group for name, group in self.groups.items() if name != self.subject}
        shown = [row for (row,) in categories_in_turn([[row] for row in failed])][:MAX_FAILURES]
        return {
            "number": len(failed),
            "of": len(own),
            "balance": [(name, *_discordant(group, own, self.metric)) for name, group in others.items()],
            "cards": [{"row": row, "made": self.made((row.prompt, row.seed))} for row in shown],
        }


def _outcome(row: ResultRow, metric: str) -> bool | None:
    """Whether a picture passed; None where nobody said."""
    value = score_value(row, metric)
    return None if value is None else bool(value)


def _discordant(group: Sequence[ResultRow], own: Mapping[Place, ResultRow], metric: str) -> tuple[int, int]:
    """Pictures that passed where the agent's ``own`` failed, and that failed where it passed."""
    both = [(_outcome(row, metric), _outcome(own[place], metric)) for row in group if (place := _place(row)) in own]
    return both.count((True, False)), both.count((False, True))


def _place(row: ResultRow) -> Place:
    return row.prompt, row.seed


def _frame(frame: Mapping[str, Any]) -> dict[str, Any]:
    picture = frame["picture"] if frame["mask"] is None else overlay(frame["picture"], frame["mask"])
    action = "final" if frame["action"] is None else ACTIONS[frame["action"]]
    return {"uri": png_uri(picture), "action": action, "nfe": frame["nfe"], "score": frame["score"]}


# --------------------------------------------------------------------------- provenance


def _provenance(folder: Path, rows: Sequence[ResultRow], kept: Mapping[str, Any]) -> dict[str, Any]:
    """What is needed to run this again."""
    config = folder / "config.yaml"
    return {
        "kept": _flat({name: value for name, value in kept.items() if name not in ("methods", LEFT_OUT)}),
        "settings": SETTINGS,
        "methods": [(name, [_one(group, part) for part in SETTINGS]) for name, group in by_method(rows).items()],
        "config": config.read_text() if config.exists() else "",
    }


def _flat(values: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Nested values as dotted names and text."""
    found: list[tuple[str, str]] = []
    for name, value in values.items():
        found += _flat(value, f"{above}{name}.") if isinstance(value, Mapping) else [(above + name, str(value))]
    return found


def decide_again(folder: Path) -> list[Verdict]:
    """H1-H4 anew from a finished run's rows, by the rules of its ``config.yaml``; kept in ``verdicts.json``.

    Raises:
        ValueError: as `reported_rows` and `decide`.
    """
    rows, items = reported_rows(folder), read_items(folder)
    rules = configured_rules(folder, headline_metric(rows))
    complexity = {(item.prompt, item.seed): float(item.facts) for item in items}
    runs = agent_runs(by_method(rows))
    verdicts = decide(rows, complexity, rules, runs) if runs else []
    write_verdicts(folder, verdicts, rules)
    return verdicts


def main(argv: Sequence[str] | None = None) -> int:
    """Make a finished run's report again; returns the exit status."""
    text = "Make the report of a finished evaluation again, without any model."
    parser = argparse.ArgumentParser(prog="addiff report", description=text)
    parser.add_argument("folder", type=Path, help="run folder of evaluate.py, e.g. runs/evaluate")
    parser.add_argument("--decide", action="store_true", help="decide H1-H4 anew, by the rules in its config.yaml")
    options = parser.parse_args(argv)
    folder = options.folder
    if not (folder / "rows.jsonl").exists():
        raise FileNotFoundError(f"no rows.jsonl in {looked_at(folder)}")
    with claim(folder, "the report"):
        _remake(folder, options.decide)
    return 0


def _remake(folder: Path, decide: bool) -> None:
    verdicts = decide_again(folder) if decide else read_verdicts(folder)
    if decide:
        print("\n".join(map(describe, verdicts)))
    for path in write_report(folder, reported_rows(folder), read_items(folder), verdicts):
        print(path)
