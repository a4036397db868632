"""Every set of rows gets a report: what it does not tell is said to be not available, and what it tells stays."""

import importlib
import io
import json
import math
import re
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from addiff_env.evaluation import acceptance
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.files import RunFolder
from addiff_env.evaluation.methods import rollouts
from addiff_env.evaluation.metrics.base import score_pictures, unmeasured
from addiff_env.evaluation.metrics.registry import protocol_scores, reported_score
from addiff_env.evaluation.metrics.set_results import read_set_results
from addiff_env.evaluation.metrics.sets import References, SetOptions, describe_sets, set_scores
from addiff_env.evaluation.report import html
from addiff_env.evaluation.report.exports import latex_table
from addiff_env.evaluation.report.figures import plot_quality_against_compute
from addiff_env.evaluation.report.html import write_report
from addiff_env.evaluation.report.text import summary_table
from addiff_env.evaluation.run import reporting
from addiff_env.evaluation.run.evaluation_run import EvaluationRun
from addiff_env.evaluation.run.progress import RunProgress
from addiff_env.evaluation.run.row_maker import RowMaker
from addiff_env.evaluation.run.rows import append_rows
from addiff_env.evaluation.run.run_folder import (
    read_verdicts,
    reported_rows,
    write_items,
    write_provenance,
    write_verdicts,
)
from addiff_env.evaluation.statistics.decide import decide
from addiff_env.evaluation.statistics.decision import NOT_SUPPORTED, SUPPORTED, UNDECIDED, Rules, describe
from addiff_env.evaluation.statistics.families import agent_runs
from addiff_env.evaluation.statistics.rules import rules_of
from addiff_env.evaluation.statistics.summary import headline_metric, lead_with, score_value, tidy
from addiff_env.evaluation.vlm_judge.judging import agreement, describe_judge
from addiff_env.evaluation.vlm_judge.pairs import Preference
from addiff_env.stats import clustered_wilson
from addiff_env.tiny.measures import auc as auc_command
from addiff_env.types import ResultRow

METHODS = (
    "ddim-5", "ddim-10", "ddim-50", "dpmpp_2m-10", "best-of-2:ddim-5", "threshold:5:0.055", "words-9.7",
    "agent", "agent, mask=full", "agent, continued", "agent-s0", "agent-s1",
    "agent-s0, mask=full", "agent-s0, continued",
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
        Item(f"prompt {k % distinct}", k, own[k % distinct], num_requirements=int(rng.integers(1, 9)))
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
    num_requirements = {(item.prompt, item.seed): float(item.num_requirements) for item in items}
    runs = agent_runs(dict.fromkeys(row.method for row in rows))
    return decide(rows, num_requirements, replace(rules_of(metric, {}), draws=draws), runs)


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


@settings(max_examples=40)
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


@settings(max_examples=3, phases=(Phase.explicit, Phase.generate))  # a page takes too long to shrink
@given(runs(most=12))
def test_any_rows_get_every_file(tmp_path_factory, run):
    """The page, the plots, the tables and what the page is made again from."""
    items, rows = run
    folder = tmp_path_factory.mktemp("a run")
    _, led, _, verdicts = report(folder, items, rows)
    page = (folder / "report.html").read_text(encoding="utf-8")
    shown = re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", page, flags=re.S)
    assert not numbers_in(re.sub(r"<[^>]*>", " ", shown))
    with Image.open(folder / "plot.png") as plot:
        assert plot.size[0] > 500
    assert read_verdicts(folder) == verdicts
    assert (folder / "table.csv").stat().st_size and (folder / "table.tex").stat().st_size


def rows_of(method, success):
    """One row per prompt; None: it has no score."""
    settings = ("c", "b", "ddim-10", method, "float32", "1", [0, 2, 1], 8, 16, 8e9)
    return [
        ResultRow(method, f"p{k}", k, *settings, scores={} if value is None else {"success": value})
        for k, value in enumerate(success)
    ]


@pytest.mark.parametrize("values", [[0, 0, 1], [1, 0, 0, 1, 1], [0, 1] * 12])
def test_two_prompts_that_disagree_have_a_wide_interval(values):
    """Their effective number is below one picture: the interval is Wilson's all the same, and says next to nothing."""
    low, high = clustered_wilson(values, ["a"] + ["b"] * (len(values) - 1))
    assert 0 <= low < np.mean(values) < high <= 1 and high - low > 0.7


def test_pictures_that_a_method_lacks_are_left_out_for_all_and_said():
    rng = np.random.default_rng(0)
    coins = rng.integers(0, 2, (3, 30)).astype(float)
    whole = [row for name, own in zip(("ddim-5", "ddim-50", "agent"), coins, strict=True) for row in rows_of(name, own)]
    num_requirements = {(row.prompt, row.seed): 1 + row.seed % 5 for row in whole}
    lacking = [row for row in whole if row.method != "ddim-50" or row.seed >= 4]
    nan = [replace(row, scores={"success": math.nan}) if row not in lacking else row for row in whole]
    complete = [row for row in whole if row.seed >= 4]
    quick = Rules(draws=QUICK)
    for rows in (lacking, nan):
        found, expected = decide(rows, num_requirements, quick), decide(complete, num_requirements, quick)
        for one, other in zip(found[:2], expected[:2], strict=True):
            assert one.parts == other.parts and one.prompts == 26
            assert "ddim-50 lacks 4 of 30 pictures" in one.reason


def test_a_method_without_the_metric_keeps_a_hypothesis_from_being_supported():
    """As one that was not run: without its strongest rival an agent would be better than all there are."""
    good, bad = [1.0] * 40, [0.0] * 36 + [1.0] * 4
    rivals = ("ddim-5", "euler-8", "best-of-2:ddim-5")
    rows = rows_of("agent", good) + [row for name in rivals for row in rows_of(name, bad)]
    num_requirements = {(row.prompt, row.seed): 1 for row in rows}
    h2 = decide(rows, num_requirements, Rules(draws=QUICK))[1]
    assert h2.outcome == SUPPORTED
    h2 = decide([*rows, *rows_of("ddim-50", [None] * 40)], num_requirements, Rules(draws=QUICK))[1]
    assert h2.outcome == UNDECIDED and "ddim-50 has no success" in h2.reason
    worse = [replace(row, scores={"success": 1 - row.scores["success"]}) for row in rows]
    h2 = decide([*worse, *rows_of("ddim-50", [None] * 40)], num_requirements, Rules(draws=QUICK))[1]
    assert h2.outcome == NOT_SUPPORTED  # what was measured refutes


def test_the_page_of_a_run_can_be_made_again_where_scores_are_missing(tmp_path):
    items = [Item(f"p{k}", k, "c", num_requirements=1 + k) for k in range(3)]
    rows = rows_of("agent", [1.0, None, 0.0]) + rows_of("ddim-5", [None] * 3)
    append_rows(tmp_path / "rows.jsonl", rows)
    report(tmp_path, items, rows)
    first = (tmp_path / "report.html").read_text()
    write_report(tmp_path, reported_rows(tmp_path), items, read_verdicts(tmp_path))
    assert (tmp_path / "report.html").read_text() == first
    assert "success of ddim-5: none of its pictures has one" in first


# --------------------------------------------------------------------------- what is measured


class Broken:
    """A metric whose model overflows on some pictures."""

    name = "clip_score"

    def columns(self, item):
        return ("clip_score", "other")

    def score(self, pictures, items):
        return [({"clip_score": (0.5, math.nan, math.inf)[item.seed], "other": 1.0}, "words") for item in items]


def test_a_score_that_is_no_number_is_none_and_said():
    items = [Item("p", seed, "c") for seed in range(3)]
    (good, said), *bad = score_pictures([Broken()], np.zeros((3, 8, 8, 3), np.uint8), items)
    assert good == {"clip_score": 0.5, "other": 1.0} and said == "words"
    for scores, words in bad:
        assert scores == {"other": 1.0} and words.startswith("words; ") and unmeasured("clip_score") in words


def test_protocols_count_no_missing_score():
    rows = [*rows_of("a", [None] * 3)]
    for row, value in zip(rows, (1.0, math.nan, 0.0), strict=True):
        row.scores = {"geneval": value, "t2i_compbench": value}
    found = protocol_scores(rows)
    assert found["geneval"]["a"]["c"] == found["t2i_compbench"]["a"]["c"] == 0.5
    assert protocol_scores(rows[1:2]) == {}


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_set_metrics_of_few_pictures(tmp_path, monkeypatch, number):
    pytest.importorskip("torch_fidelity")
    from addiff_env.evaluation.metrics import sets

    def colours(paths, *_, **__):
        return np.stack([np.asarray(Image.open(path), float).mean((0, 1)) for path in paths])

    monkeypatch.setattr(sets, "inception_features", colours)
    monkeypatch.setattr(sets, "inception_weights", lambda weights: weights)
    rng = np.random.default_rng(0)
    for folder, many in (("references", 5), ("run", number)):
        (tmp_path / folder).mkdir()
        for k in range(many):
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(tmp_path / folder / f"{k}.png")
    options = SetOptions(["fid", "kid"], str(tmp_path / "references"))
    rows = [replace(row, image=f"{row.seed}.png") for row in rows_of("agent", [1.0] * number)]
    found = set_scores(rows, tmp_path / "run", References(options, tmp_path / "run", "cpu"))
    least = {"fid": 2, "kid": 4}
    assert {name for name in least if name in found["methods"]["agent"]} == {n for n in least if number >= least[n]}
    notes = [f"agent: {n} needs {least[n]} pictures, got {number}" for n in least if number < least[n]]
    assert found["notes"] == notes and all(note in describe_sets(found) for note in notes)
    items = [Item(row.prompt, row.seed, "c", num_requirements=1) for row in rows]
    (tmp_path / "run" / "set_metrics.json").write_text(json.dumps(found))
    report(tmp_path / "run", items, rows)
    assert read_set_results(tmp_path / "run", rows, items).notes == notes
    assert all(note in (tmp_path / "run" / "report.html").read_text() for note in notes)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "run" / "0.png")
    (tmp_path / "one").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "one" / "0.png")
    with pytest.raises(ValueError, match=r"fid needs 2 references, '.*one' holds 1"):
        References(SetOptions(["fid"], str(tmp_path / "one")), tmp_path, "cpu")


@settings(max_examples=10)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from(("a-b", "a-c", "c-d")), st.sampled_from(("a", "b", "tie", None))),
        min_size=1,
        max_size=6,
    )
)
def test_judgements_of_few_pairs(answers):
    said = [
        Preference(f"p{prompt}", k, *pair.split("-"), winner, winner is not None, "eye")
        for k, (prompt, pair, winner) in enumerate(answers)
    ]
    found = describe_judge(said)
    assert sum(pair["pairs"] for pair in found["pairs"]) == sum(one.winner is not None for one in said)
    assert bool(found["ranking"]) != bool(found["note"])
    for entry in agreement({"x": said, "y": said}):
        assert (entry["kappa"] is None) == bool(entry["note"])


# --------------------------------------------------------------------------- the other commands


def run_of(name, value, number):
    return rollouts.PolicyRun(name, [rollouts.Episode(value + 0.01 * k, 1.0, 5 + k, (0, 1, 2)) for k in range(number)])


@pytest.mark.parametrize(("number", "prompts"), [(1, 1), (3, 1), (2, 2)])
def test_the_bar_of_few_pictures(number, prompts):
    names = [f"p{k % prompts}" for k in range(number)]
    agent, rule, constant = (run_of(*one, number) for one in (("agent", 1.0), ("rule", 0.5), ("stop-4", 0.0)))
    found = acceptance.conditions(agent, [constant], rule, names)
    choice = rollouts.RuleChoice(4, 0.0, 0.5, 1, 1)
    made = acceptance.AcceptanceReport("a", "b", "float32", choice, [agent, rule, constant], names, found)
    (above,) = [condition for condition in found if "every constant" in condition.name]
    assert above.passed is (None if prompts == 1 else True) and not made.passed
    assert ("n/a" in made.text()) == (prompts == 1) and not numbers_in(made.text())
    assert (made.as_dict()["rows"][1]["agent_ahead"][1] is None) == (prompts == 1)


@pytest.mark.parametrize("number", [1, 2, 3, 7])
@pytest.mark.parametrize("right", [0.0, 0.5, 1.0])
def test_aucs_of_few_pictures(number, right):
    rng = np.random.default_rng(number)
    labels = np.arange(number) < right * number
    predictions = auc_command.probe(rng.normal(size=(number, 8)), labels.astype(float))
    both = 0 < labels.sum() < number
    for scores in (rng.normal(size=number), np.zeros(number), predictions):
        found = auc_command.entry(scores, labels)
        assert (found["auc"] is None) == (found["low"] is None) == (not both)
    cells = {f"{share:g}": auc_command.entry(rng.normal(size=number), labels) for share in auc_command.SHARES}
    result = {"number": number, "split": "dev", "satisfied": float(labels.mean()), "auc": {"reward model": cells}}
    assert not numbers_in(auc_command.table(result)) and ("n/a" in auc_command.table(result)) == (not both)
    assert auc_command.passes(result) in (True, False) and (both or not auc_command.passes(result))


COMMANDS = (
    "addiff_env.evaluation.acceptance",
    "addiff_env.evaluation.methods.tuning",
    "addiff_env.tiny.measures.repair",
    "addiff_env.tiny.measures.auc",
)


@pytest.mark.parametrize("module", COMMANDS)
@pytest.mark.parametrize("text", ["0", "-3", "abc", "1.5"])
def test_a_number_of_nothing_is_refused_by_name(capsys, module, text):
    flag = "--limit" if module.endswith(("acceptance", "tuning")) else "--number"
    agent = ["agent"] if module.endswith("acceptance") else []
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main([*agent, flag, text])
    words = capsys.readouterr().err
    assert ended.value.code == 2 and flag in words and "at least 1" in words and text in words


# --------------------------------------------------------------------------- the run


def limited(limit, name="tiny-test"):
    return OmegaConf.create(
        {"benchmark": {"name": name, "limit": limit, "root": None, "images_per_prompt": None, "any_length": False}}
    )


@pytest.mark.parametrize("limit", [0, -1, "abc", 2.5, True])
def test_a_limit_that_is_none_is_refused(limit):
    with pytest.raises(ValueError, match=rf"benchmark\.limit must be a whole number of at least 1.*{limit}"):
        assert not EvaluationRun(limited(limit), Path()).items


def test_a_limit_beyond_the_benchmark_takes_all_of_it_and_says_so(capsys, tmp_path):
    assert len(EvaluationRun(limited(5), tmp_path).items) == 5 and not capsys.readouterr().out
    prompts = tmp_path / "mine.txt"
    prompts.write_text("a red circle\na red circle\na blue star\n")
    assert len(EvaluationRun(limited(9, str(prompts)), tmp_path).items) == 3
    assert f"benchmark.limit=9: {prompts} has 3 prompts" in capsys.readouterr().out
    assert len(EvaluationRun(limited(3, str(prompts)), tmp_path).items) == 3 and not capsys.readouterr().out


def test_filmstrips_are_chosen_whatever_is_missing():
    for success in ([None] * 3, [1.0, None, 0.0], [math.nan, 1.0, 1.0], [0.25, None, 0.5]):
        rows = rows_of("agent", success)
        chosen = reporting.choose_filmstrips(rows, 2)
        assert len(chosen) == 2 and len({row.key for row in chosen}) == 2
    assert reporting.choose_filmstrips(rows_of("agent", [None]), 8) == rows_of("agent", [None])


def test_what_breaks_the_filmstrips_costs_no_verdict(tmp_path, monkeypatch):
    """They are made last, by the model: the report can be made again without it."""
    rows = [row for name in ("agent", "ddim-5") for row in rows_of(name, [1.0] * 4)]
    append_rows(tmp_path / "rows.jsonl", rows)
    items = [Item(row.prompt, row.seed, row.category, str(k), 1) for k, row in enumerate(rows[:4])]
    benchmark = {"name": "tiny-dev", "limit": None}
    cfg = {"primary": None, "benchmark": benchmark, "filmstrips": 2, "rules": {}, "methods": "all"}
    agent = SimpleNamespace(environment=("AdDiffusion-Tiny-v0", {}), fingerprint="f")
    run = SimpleNamespace(
        cfg=OmegaConf.create(cfg), files=RunFolder(tmp_path), folder=tmp_path, rows=rows, metrics=["checker"],
        items=items, own_rows=lambda rows: rows[:4], runs=["agent"], agent=agent, agents={"agent": agent}, overrides={},
    )  # fmt: skip

    def full(*_):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(reporting, "record_filmstrips", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        reporting.report(run)
    assert {"H1", "H2", "H3", "H4", "H2+", "H4+", "H5"} <= {one.hypothesis for one in read_verdicts(tmp_path)}
    assert html.main([str(tmp_path)]) == 0 and "H5" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_picture_without_a_finite_score_is_no_row_of_other_metrics(tmp_path):
    """A resumed run takes it as it is."""
    backbone = SimpleNamespace(name="b", revision=None, dtype_name="float32")
    method = SimpleNamespace(name="ddim-2", solver="ddim-2", policy="ddim-2", backbone=backbone)
    env = SimpleNamespace(config=SimpleNamespace(negative_prompt=None))
    evaluation = RowMaker(tmp_path / "rows.jsonl", env, [Broken()], False)
    items = [Item("p", seed, "c") for seed in range(3)]
    scored = score_pictures([Broken()], np.zeros((3, 8, 8, 3), np.uint8), items)
    for item, (scores, words) in zip(items, scored, strict=True):
        evaluation.rows.append(replace(evaluation.blank_row(method, item), scores=scores, reason=words))
    evaluation.require_scores(method, items)
    evaluation.rows[1].reason = ""
    with pytest.raises(ValueError, match="without clip_score"):
        evaluation.require_scores(method, items)


def test_the_default_run_is_a_demo_of_a_few_minutes():
    """48 prompts, and of each at most 115 evaluations: at 34 ms an evaluation that is less than 200 s."""
    cfg = OmegaConf.load(Path(__file__).parents[3] / "configs" / "evaluate.yaml")
    assert {"agent", "ddim-10", "ddim-50", "best-of-2:ddim-5"} <= set(cfg.methods)
    assert any(name.startswith("two-step:") for name in cfg.methods) and cfg.controls
    fixed = {"ddim-10": 10, "ddim-50": 50, "best-of-2:ddim-5": 10}
    decided = 2 * 2 + 10  # at most: two refinements, the schedule; by rule, agent and both controls mostly 9
    assert len(cfg.methods) == 5 and 0.034 * cfg.benchmark.limit * (sum(fixed.values()) + 4 * decided) < 240


# --------------------------------------------------------------------------- progress


def spent(name, *nfe):
    return [replace(row, nfe=own) for row, own in zip(rows_of(name, [None] * len(nfe)), nfe, strict=True)]


def test_the_time_that_is_left_is_told_by_the_evaluations_that_are_left(capsys):
    clock = [0.0]
    progress = RunProgress({"ddim-10": 10, "ddim-50": 50, "agent": 10}, 4, lambda: clock[0])
    progress.keep("ddim-10", spent("ddim-10", 10, 10))
    with redirect_stderr(io.StringIO()):
        progress.start()
        assert "10 pictures by 3 methods, about 260 evaluations" in capsys.readouterr().out
        clock[0] = 2.0
        progress.add("ddim-10", spent("ddim-10", 10, 10))
        assert progress.seconds_left == pytest.approx(24)  # 20 evaluations in 2 s, 240 are left
        assert "about 0:00:26 (h:mm:ss) for all pictures, by the first 2 pictures: 100 ms" in capsys.readouterr().out
        clock[0] = 22.0
        progress.add("ddim-50", spent("ddim-50", 50, 50, 50, 50))
        assert progress.seconds_left == pytest.approx(4)
        progress.add("agent", spent("agent", 20))  # twice what was guessed: so are the other three
        assert progress.done == 260 and progress.total == 320
        assert progress.seconds_left == pytest.approx(60 * 22 / 240)
        progress.add("agent", spent("agent", 5, 5, 10))
        assert progress.done == progress.total == 280 and progress.seconds_left == 0
        progress.close()
    assert not capsys.readouterr().out


def test_a_run_that_is_there_shows_no_progress(capsys):
    progress = RunProgress({"ddim-10": 10}, 1)
    progress.keep("ddim-10", spent("ddim-10", 10))
    progress.start()
    progress.close()
    assert capsys.readouterr() == ("", "")
