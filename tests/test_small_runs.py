"""Every set of rows gets a report: what it does not tell is said to be not available, and what it tells stays."""

import csv
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from addiff_env.evaluation.benchmarks import Item
from addiff_env.evaluation.exports import latex_table, write_csv
from addiff_env.evaluation.html import write_report
from addiff_env.evaluation.hypotheses import UNDECIDED, Rules, agent_runs, decide, describe
from addiff_env.evaluation.metrics import protocol_scores, reported_score
from addiff_env.evaluation.report import plot_quality_against_compute, summary_table
from addiff_env.evaluation.rules import rules_of
from addiff_env.evaluation.runs import read_verdicts, write_items, write_provenance, write_verdicts
from addiff_env.evaluation.summary import headline_metric, lead_with, score_value, summarise, tidy
from addiff_env.stats import clustered_wilson, effective_size, wilson_interval
from addiff_env.types import ResultRow

METHODS = (
    "ddim-5", "ddim-10", "ddim-50", "dpmpp_2m-10", "best-of-2:ddim-5", "threshold:5:0.055", "words-9.7",
    "agent", "agent, mask=full", "agent, continued", "agent-s0", "agent-s1", "agent-s0, mask=full", "agent-s0, continued",
)  # fmt: skip
CATEGORIES = ("single_object", "counting", "four_objects", "", "100 % of $x_1$ <b>")
ODD = (math.nan, math.inf, -math.inf, 1e300, -1e300)
QUICK = 200  # replicates


@st.composite
def outcomes(draw, number):
    """Scores of one method: shares, all alike or not, or numbers of any size; some of them missing or none."""
    kind = draw(st.sampled_from(("coins", "right", "wrong", "numbers", "constant", "tiny", "huge", "odd")))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    made = {
        "coins": rng.integers(0, 2, number).astype(float),
        "right": np.ones(number),
        "wrong": np.zeros(number),
        "numbers": rng.normal(0.3, 0.1, number),
        "constant": np.full(number, 0.25),
        "tiny": 1 + 1e-15 * rng.integers(0, 3, number),
        "huge": rng.normal(0, 1, number) * 10.0 ** rng.integers(0, 99, number),
        "odd": rng.choice([*ODD, 0.0, 5e-324, 1.0], number),
    }[kind]
    lacking = rng.random(number) < draw(st.sampled_from((0, 0, 0, 0.2, 1)))
    return [None if absent else float(value) for absent, value in zip(lacking, made, strict=True)]


@st.composite
def runs(draw, most=64):
    """Items of a benchmark and rows of some methods on some of them."""
    number = draw(st.integers(1, most))
    distinct = draw(st.integers(1, number))
    categories = draw(st.lists(st.sampled_from(CATEGORIES), min_size=1, unique=True))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    own = [categories[k] for k in rng.integers(len(categories), size=distinct)]
    items = [
        Item(f"prompt {k % distinct}", k, own[k % distinct], facts=int(rng.integers(1, 9)))
        for k in range(number)
    ]
    rows = []
    complete = draw(st.booleans())
    for method in draw(st.lists(st.sampled_from(METHODS), min_size=1, unique=True)):
        success, clip = draw(outcomes(number)), draw(outcomes(number))
        kept = np.ones(number, bool) if complete else rng.random(number) < 0.8
        kept[rng.integers(number)] = True
        nfe = rng.integers(1, 12, number) if draw(st.booleans()) else np.full(number, 7)
        for k in np.flatnonzero(kept):
            scores = {"success": success[k], "clip_score": clip[k]}
            actions = rng.integers(0, 3, rng.integers(0, 9)).tolist() if method.startswith("agent") else []
            rows.append(
                ResultRow(
                    method, items[k].prompt, items[k].seed, items[k].category, "tiny@packaged", "ddim-10", method,
                    "float32", "1", actions=actions, nfe=int(nfe[k]), forward_passes=2 * int(nfe[k]),
                    net_flops=2.5e9 * int(nfe[k]), seconds=0.1,
                    scores={name: value for name, value in scores.items() if value is not None},
                )
            )  # fmt: skip
    return items, rows


def decided(items, rows, metric, draws=QUICK):
    facts = {(item.prompt, item.seed): float(item.facts) for item in items}
    runs = agent_runs(dict.fromkeys(row.method for row in rows))
    return decide(rows, facts, replace(rules_of(metric, {}), draws=draws), runs)


def report(folder, items, rows, wanted=None):
    """What ``evaluate.py`` makes of rows."""
    metric = reported_score(rows, wanted)
    rows = lead_with(rows, metric)
    table, verdicts = summary_table(rows), decided(items, rows, metric)
    write_items(folder, items)
    write_provenance(folder, rows, benchmark="toy", metric=metric)
    write_verdicts(folder, verdicts, rules_of(metric, {}))
    plot_quality_against_compute(rows, folder / "plot.png")
    write_report(folder, rows, items, verdicts)
    return metric, rows, table, verdicts


def numbers_in(text):
    return re.findall(r"(?<![\w.])(?:nan|inf)(?![\w.])", text)


@settings(max_examples=150)
@given(runs())
def test_any_rows_are_summarised_and_decided(run):
    items, rows = run
    metric = reported_score(rows)
    for some in (rows, lead_with(rows, metric)):
        headline = headline_metric(some)
        table = summary_table(some)
        assert not numbers_in(table)
        for method in dict.fromkeys(row.method for row in some):
            measured = [v for row in some if row.method == method and (v := score_value(row, headline)) is not None]
            (line,) = [line for line in table.splitlines() if line.startswith(f"{method}  ")]
            assert bool(measured) != (line.split()[len(method.split()) + 1] == "n/a"), line
        assert latex_table(some, "toy").count(r"\toprule") == 2
        assert all(math.isfinite(e.mean) for _, _, _, e in tidy(some))
        assert protocol_scores(some) == {}
    for verdict in decided(items, rows, metric):
        assert verdict.reason and not numbers_in(describe(verdict))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_report_of_few_pictures_has_every_file(tmp_path, number):
    pass
