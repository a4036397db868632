"""Tables hold numbers; every style tells the same of them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from addiff_env.evaluation.metrics.set_results import SetResults
from addiff_env.evaluation.report.tables import (
    HTML,
    LATEX,
    TEXT,
    Cell,
    category_tables,
    method_table,
    protocol_table,
    set_table,
)
from addiff_env.evaluation.statistics.summary import NOT_AVAILABLE, measured_costs
from addiff_env.types import ResultRow

STYLES = (TEXT, LATEX, HTML)
NUMBERS = st.floats(-1e6, 1e6)


def read_back(text):
    plain = text.replace("$-$", "-").replace("−", "-").replace(",", "")
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?", plain)]


@given(NUMBERS, st.integers(0, 4), st.floats(0, 1e6))
def test_every_style_tells_the_same_numbers(value, digits, spread):
    for style in STYLES:
        text = style.value(Cell(value, digits, spread=spread))
        assert read_back(text) == pytest.approx([value, spread], abs=0.51 * 10**-digits)


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.integers(0, 4))
def test_every_style_tells_the_same_interval(low, high, digits):
    for style in STYLES:
        found = re.sub(r"(?<=\d)-(?=\d)", " ", style.interval(Cell(0.5, digits, low, high)).replace(", ", " "))
        assert read_back(found) == pytest.approx([low, high], abs=0.51 * 10**-digits)


@pytest.mark.parametrize("style", STYLES)
def test_what_is_not_known_is_no_number(style):
    assert style.value(None) == style.interval(None) == style.interval(Cell(1.0, 1)) == style.dash
    assert style.value(NOT_AVAILABLE) == NOT_AVAILABLE and style.value(None, NOT_AVAILABLE) == NOT_AVAILABLE


def row(method, category, score, seconds=0.5):
    scores = {} if score is None else {"success": score}
    return ResultRow(
        method, f"{category} {score}", 0, category, "b", "s", method, "float32", "1", actions=[0, 1], nfe=4,
        forward_passes=8, net_flops=2e9, seconds=seconds, scores=scores,
    )  # fmt: skip


def test_tables_of_rows_hold_means_in_the_unit_shown():
    rows = [row("a", "x", 1.0), row("a", "x", 0.0), row("b", "x", 1.0, float("nan")), row("b", "y", None, float("nan"))]
    costs = measured_costs(rows)
    assert [cost.name for cost in costs] == ["nfe", "forward_passes", "net_flops", "seconds"]
    (first, ours), (second, theirs) = method_table(rows, "success", costs).lines
    assert (first, second) == ("a", "b") and ours[-1] == "50/50/0"
    assert [entry.value for entry in ours[:-1]] == [2, 50.0, 4.0, 8.0, 2.0, 0.5]
    assert theirs[1].value == 100.0 and theirs[1].note == "n = 1" and theirs[-2] is None
    (table,) = category_tables(rows, ["success"])
    assert table.columns == ["x", "y"]
    assert [entries[1] for _, entries in table.lines] == [None, NOT_AVAILABLE]  # no such picture; none with the metric


def test_tables_of_sets_leave_open_what_a_method_lacks():
    sets = {"a": {"pictures": 4, "fid": 2.0, "kid": 0.5, "kid_std": 0.25}, "b": {"pictures": 4, "fid": 3.0}}
    found = SetResults({"geneval": {"a": {"single": 1.0, "overall": 0.75}}}, sets)
    assert protocol_table(found, "geneval").columns == ["overall", "single"]
    table = set_table(found)
    assert table.columns == ["fid", "kid"]
    assert table.lines == [("a", [Cell(2.0, 4), Cell(0.5, 4, spread=0.25)]), ("b", [Cell(3.0, 4), None])]
