"""``report.html`` and the exports: the numbers are the rows', nothing in a prompt becomes markup, nothing is loaded."""

import base64
import csv
import io
import json
import re
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image
from reports import ACTIONS, HOSTILE, ITEMS, VERDICTS, Page, rows_of

from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.metrics.set_results import pictures_of
from addiff_env.evaluation.report.exports import latex_escape, latex_table, write_csv
from addiff_env.evaluation.report.figures import actions_figure, complexity_figure, quality_figure
from addiff_env.evaluation.report.gallery import MAX_SIDE, png_uri
from addiff_env.evaluation.report.html import main, write_report
from addiff_env.evaluation.report.svg import DARK, css_variable, inline_svg
from addiff_env.evaluation.run.rows import append_rows
from addiff_env.evaluation.run.run_folder import (
    Trajectory,
    read_items,
    read_trajectories,
    read_verdicts,
    reported_rows,
    save_trajectories,
    write_items,
    write_provenance,
    write_verdicts,
)
from addiff_env.evaluation.statistics.decision import UNDECIDED, Decision, Part, Rules
from addiff_env.evaluation.statistics.rules import read_rules
from addiff_env.evaluation.statistics.summary import (
    by_num_requirements,
    decision_counts,
    estimate,
    headline_metric,
    summarise,
    tidy,
)
from addiff_env.stats import wilson_interval
from addiff_env.types import Action, ResultRow


def strip_of(item, actions):
    mask = np.zeros((4, 4))
    mask[1:3, 1:3] = 1
    frames = [
        {
            "picture": np.full((16, 16, 3), 10 * k, np.uint8),
            "action": action, "nfe": 3 + k, "step": k, "score": 0.5 * k,
            "mask": mask if action == Action.REFINE else None,
        }
        for k, action in enumerate([*actions, None])
    ]  # fmt: skip
    return Trajectory(item, "ok", frames)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run's folder, and rows of other runs in the same file."""
    folder, rows = tmp_path_factory.mktemp("run"), rows_of()
    for row in rows:
        path = folder / row.image
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (row.nfe, 0, 0)).save(path)
    append_rows(folder / "rows.jsonl", [replace(rows[0], code_version="older"), *rows, replace(rows[1], seed=99)])
    write_items(folder, ITEMS)
    write_verdicts(folder, VERDICTS, Rules())
    write_provenance(folder, rows, benchmark="toy_<i>", agent="policy-agent", environment={"id": "Toy", "finish": 2})
    save_trajectories(folder, [strip_of(ITEMS[0], ACTIONS[0]), strip_of(ITEMS[1], [2, 1])])
    (folder / "config.yaml").write_text("limit: <b>4</b>\n")
    write_report(folder, rows, ITEMS, VERDICTS)
    return folder


@pytest.fixture(scope="module")
def page(run):
    parsed = Page()
    parsed.feed((run / "report.html").read_text(encoding="utf-8"))
    parsed.close()
    assert parsed.open == []
    return parsed


def percent(successes, number):
    low, high = wilson_interval(successes, number)
    return f"{100 * successes / number:.1f} [{100 * low:.1f} to {100 * high:.1f}]"


def test_the_main_table_says_what_the_rows_say(page):
    agent = page.line("methods", "agent")
    deviation = np.std([4, 7, 6, 11])
    assert agent[1:4] == ["4", percent(2, 4), f"7.0 ± {deviation:.1f}"]
    assert agent[4:7] == ["14.0", "17.5", "0.250"]  # passes; 7 * 2.5 GFLOPs; seconds
    assert agent[7] == "45/36/18"  # 5, 4 and 2 of 11 decisions
    assert page.line("methods", "ddim-10")[2:4] == [percent(3, 4), "10.0 ± 0.0"]
    assert page.line("methods", "ddim-10")[7] == "–"


def test_every_metric_and_category_is_there(page):
    assert page.tables["metrics"][0] == ["method", "success (%)", "reward_score"]
    values = np.array([1.0, 0.25, 0.125, 3.0])
    half = 1.959964 * values.std(ddof=1) / 2  # four prompts of one picture: the textbook's interval
    expected = f"{values.mean():.3f} [{values.mean() - half:.3f} to {values.mean() + half:.3f}]".replace("-", "−")
    assert page.line("metrics", "agent")[2] == expected
    assert page.tables["categories"][0] == ["method", "simple_<b> n = 2", "full n = 2"]
    assert page.line("categories", "ddim-5")[1:] == [percent(0, 2), percent(2, 2)]
    assert page.line("categories", "agent")[1:] == [percent(1, 2), percent(1, 2)]


PROTOCOLS = {
    "geneval": {"agent": {"single": 1.0, "two": 0.5, "overall": 0.75}, "gone": {"single": 0.0, "overall": 0.0}},
    "t2i_compbench": {"agent": {"color": 0.4321}, "ddim-5": {"color": 0.25}},
}
SETS = {
    "references": {"inception": {"extractor": "inception <v3>", "size": None, "codec": "png"}},
    "methods": {
        "agent": {"pictures": 4, "fid": 12.5, "kid": 0.0123, "kid_std": 0.0045, "cmmd": 0.75},
        "gone": {"pictures": 4, "fid": 1.0},
    },
}


def whole_run(folder):
    (folder / "protocols.json").write_text(json.dumps(PROTOCOLS))
    (folder / "set_metrics.json").write_text(json.dumps(SETS))
    rows = [replace(row, image="") for row in rows_of()]
    return rows, write_report(folder, rows, ITEMS, [])


def read_page(folder):
    page = Page()
    page.feed((folder / "report.html").read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page


def test_protocols_and_set_metrics_are_shown(tmp_path):
    whole_run(tmp_path)
    page = read_page(tmp_path)
    lines = page.tables["whole"]
    assert lines[:2] == [["method", "overall", "single", "two"], ["agent", "0.7500", "1.0000", "0.5000"]]
    assert lines[2:5] == [["method", "color"], ["ddim-5", "0.2500"], ["agent", "0.4321"]]
    assert lines[5:] == [
        ["method", "pictures", "fid", "kid", "cmmd"],
        ["agent", "4", "12.5000", "0.0123 ± 0.0045", "0.7500"],
    ]  # "gone" is no method of these rows
    assert "extractor inception <v3>, size –, codec png" in " ".join("".join(page.words).split())


def test_set_metrics_of_other_pictures_are_not_shown(tmp_path):
    """A folder's run may have grown since, or its code changed."""
    rows, _ = whole_run(tmp_path)
    for items, made, shown in (
        (ITEMS, rows, True),
        (ITEMS[:2], rows, False),
        (ITEMS, [replace(row, code_version="older") for row in rows], False),
    ):
        kept = {**SETS, "measured_on": pictures_of(made, items)}
        (tmp_path / "set_metrics.json").write_text(json.dumps(kept))
        write_report(tmp_path, rows, ITEMS, [])
        lines = read_page(tmp_path).tables["whole"]
        assert (["method", "pictures", "fid", "kid", "cmmd"] in lines) == shown
        assert ("fid" in (tmp_path / "table_whole.csv").read_text()) == shown


def test_protocols_and_set_metrics_are_exported(tmp_path):
    rows, written = whole_run(tmp_path)
    assert [path.name for path in written][3:] == ["table_whole.csv"]
    with (tmp_path / "table_whole.csv").open(newline="", encoding="utf-8") as file:
        lines = {(x["method"], x["metric"], x["category"]): x for x in csv.DictReader(file)}
    assert float(lines["agent", "geneval", "overall"]["value"]) == 0.75
    assert float(lines["ddim-5", "t2i_compbench", "color"]["value"]) == 0.25
    kid = lines["agent", "kid", ""]
    assert (float(kid["value"]), float(kid["sd"]), kid["pictures"]) == (0.0123, 0.0045, "4")
    assert len(lines) == 3 + 2 + 3
    tex = (tmp_path / "table.tex").read_text()
    assert r"agent & 12.5000 & 0.0123 (0.0045) & 0.7500 \\" in tex and r"agent & 0.7500 & 1.0000 & 0.5000 \\" in tex
    assert tex.count(r"\toprule") == 2 + 3
    for name in ("protocols.json", "set_metrics.json"):
        (tmp_path / name).unlink()
    assert len(write_report(tmp_path, rows, ITEMS, [])) == 3 and not (tmp_path / "table_whole.csv").exists()
    assert "whole" not in read_page(tmp_path).tables


def test_decisions_and_complexity(page):
    # First decisions 0, 0, 2, 0; second 1, 2, 1, 0; third 1, 0; fourth 1.
    decisions = page.tables["actions"][1:]
    assert decisions == [
        ["1", "4", "75.0", "0.0", "25.0"],
        ["2", "4", "25.0", "50.0", "25.0"],
        ["3", "2", "50.0", "50.0", "0.0"],
        ["4", "1", "0.0", "100.0", "0.0"],
    ]
    assert page.line("complexity", "2") == ["2", "1", "7.000", percent(0, 1)]  # one prompt: no interval of NFE


def test_verdicts_are_shown_with_their_parts(page):
    text = " ".join(" ".join(page.words).split())
    assert "H1 undecided" in text and "About 777 prompts would decide." in text and "H2 supported" in text
    assert page.line("verdicts", "quality") == ["quality", "undecided", "0.125 [-0.25, 0.5]", "0.032"]
    assert page.line("verdicts", "above")[3] == "< 0.0001"


def test_a_few_prompts_have_no_bootstrap(page):
    """Two or four of them would give tiny p-values to differences of nothing."""
    (head, first, *_) = page.tables["comparisons"]
    cells = dict(zip(head, [" ".join(cell.split()) for cell in first], strict=True))
    assert cells["difference"].endswith("[– to –]") and cells["p (Holm)"] == cells["detectable"] == "–"
    assert float(cells["Wilcoxon p"]) == 1.0


def test_the_rules_of_the_verdicts_are_shown(tmp_path, page):
    text = " ".join(" ".join(page.words).split())
    assert "one-sided tests at 5%. Means are over pictures; prompts are resampled, each with all its pictures." in text
    assert "Of success, 0.02 less still counts as equal, and 0.01 more is the smallest gain" in text
    assert page.line("verdicts", "margin")[1] == "0.02" and page.line("verdicts", "worthwhile")[1] == "0.01"
    (tmp_path / "config.yaml").write_text("rules: {alpha: 0.01, margin: 0.004, max_nfe: 20}\n")
    scores = [replace(row, image="", scores={"imagereward": float(row.nfe)}) for row in rows_of()]
    write_report(tmp_path, scores, ITEMS, VERDICTS)
    shown = read_page(tmp_path)
    text = " ".join(" ".join(shown.words).split())
    assert "one-sided tests at 1%." in text and "its p is at most 1% just where the bound that supports" in text
    lines = {name: shown.line("verdicts", name)[1] for name in ("score", "margin", "worthwhile", "max NFE")}
    assert lines == {"score": "imagereward", "margin": "0.004", "worthwhile": "0.025", "max NFE": "20"}
    used = Rules("imagereward", 0.5, 0.025)
    write_verdicts(tmp_path, VERDICTS, used)  # what they were reached by counts, not what was configured since
    assert read_rules(tmp_path, "imagereward") == used and read_verdicts(tmp_path) == VERDICTS
    (tmp_path / "verdicts.json").write_text(
        json.dumps([asdict(verdict) for verdict in VERDICTS])
    )  # of earlier releases
    assert read_verdicts(tmp_path) == VERDICTS and read_rules(tmp_path, "imagereward").margin == 0.004


def test_training_runs_of_an_agent_are_shown_as_one_agent(tmp_path):
    rows = [replace(row, image="") for row in rows_of()]
    named = [replace(row, method="agent-s1") if row.method == "agent" else row for row in rows]
    second = [replace(row, method="agent-s2", policy="other") for row in rows if row.method == "agent"]
    write_report(tmp_path, [*named, *second], ITEMS, [])
    page = read_page(tmp_path)
    assert {"comparisons", "actions", "complexity", "failures"} <= set(page.tables)
    compared = [line[0] for line in page.tables["comparisons"][1:]]
    assert "ddim-5" in compared and not any("agent" in name for name in compared)


def test_the_verdicts_are_decided_anew_by_the_configured_rules(tmp_path, capsys):
    rng, methods = np.random.default_rng(0), {"agent": 6, "ddim-5": 5, "ddim-50": 50, "euler-5": 5}
    items = [Item(f"prompt {k // 2}", k, "full", num_requirements=k % 3) for k in range(60)]
    rows = [
        ResultRow(name, i.prompt, i.seed, i.category, "b", name, name, "float32", "1", nfe=nfe + i.num_requirements,
                  net_flops=nfe * 1e9, scores={"success": float(rng.random() < 0.8)})
        for name, nfe in methods.items() for i in items
    ]  # fmt: skip
    append_rows(tmp_path / "rows.jsonl", rows)
    write_items(tmp_path, items)
    write_provenance(tmp_path, rows, metric="success")
    (tmp_path / "config.yaml").write_text("rules: {max_nfe: 6, draws: 200}\n")
    again = [str(tmp_path), "--decide"]
    assert main(again) == 0
    assert "H1: not supported (30 prompts; fails: mean NFE at most 6" in capsys.readouterr().out
    (first, *_) = read_verdicts(tmp_path)
    assert first.parts[0].estimate == pytest.approx(np.mean([row.nfe for row in rows if row.method == "agent"]))
    text = (tmp_path / "report.html").read_text()
    assert read_rules(tmp_path, "success").max_nfe == 6 and "at most 6" in text and "no more than 6 NFE" in text
    (tmp_path / "config.yaml").write_text("rules: {max_nef: 6}\n")
    with pytest.raises(ValueError, match=r"unknown rules \['max_nef'\]; known: metric, margin"):
        main(again)
    (tmp_path / "config.yaml").write_text("rules: {}\n")
    write_provenance(tmp_path, [row for row in rows if row.method != "agent"], metric="success")
    main(again)  # without an agent there is nothing to decide
    assert read_verdicts(tmp_path) == []


def test_failures_of_any_metric_that_passes_or_fails_are_shown(tmp_path):
    rows = [replace(row, image="", scores={"geneval": row.scores["success"]}) for row in rows_of()]
    write_report(tmp_path, rows, ITEMS, [])
    page = read_page(tmp_path)
    assert "The agent failed 2 of 4 pictures" in " ".join("".join(page.words).split())
    assert page.line("failures", "ddim-10") == ["ddim-10", "1", "0"]
    assert any("geneval: star is missing" in words for words in page.words)
    graded = [replace(row, scores={"imagereward": float(row.nfe)}) for row in rows]
    write_report(tmp_path, graded, ITEMS, [])
    assert not any("The agent failed" in words for words in read_page(tmp_path).words)


def test_what_was_left_out_is_said(tmp_path, page):
    rows = [replace(row, image="") for row in rows_of()]
    write_provenance(tmp_path, rows, benchmark="toy", left_out=["method 'lcm-4': no <LoRA>", "metric 'fid': offline"])
    write_report(tmp_path, rows, ITEMS, [])
    text = "".join(read_page(tmp_path).words)
    assert text.count("method 'lcm-4': no <LoRA>") == 1 and "metric 'fid': offline" in text
    assert not any("left out" in words for words in page.words)


def test_failures_show_the_reason_and_what_others_made(page):
    text = " ".join(" ".join(page.words).split())
    assert "The agent failed 2 of 4 pictures" in text
    assert page.line("failures", "ddim-5") == ["ddim-5", "1", "1"]  # passed item 1, failed item 0
    assert page.line("failures", "ddim-10") == ["ddim-10", "1", "0"]
    assert len([src for section, src in page.images if section == "failures"]) == 2 * 3
    # Two filmstrips of three frames, each with three final pictures.
    assert len([src for section, src in page.images if section == "gallery"]) == 2 * (3 + 3)


def test_a_trajectory_that_differs_from_the_evaluated_one_says_so(page):
    assert sum("decided otherwise" in words for words in page.words) == 1  # [2, 1] was recorded, [0, 2, 1] evaluated


def test_nothing_in_a_file_becomes_markup(page):
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "iframe", "object", "b", "i", "link", "form"}
    assert any(HOSTILE in words for words in page.words)  # shown as it stands, {{ }} and $ included
    assert "limit: <b>4</b>" in "".join(page.words) and any("toy_<i>" in words for words in page.words)


def test_nothing_is_loaded_from_anywhere(run, page):
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            assert re.match(r"data:image/png;base64,|#", attributes.get(name) or "#"), (tag, attributes[name])
    text = (run / "report.html").read_text(encoding="utf-8")
    urls = re.findall(r"url\(([^)]*)\)", text)
    assert urls and all(url.startswith("#") for url in urls)
    assert "@import" not in text
    assert re.findall(r"https?://[^\s<\"&]*", text.replace("http://evil.example", "")) == []


def test_plots_follow_the_page_in_every_colour_and_leave_words_alone():
    names = ["ddim-5", "ddim-10", "best-of-2:ddim-5", "stop-3", "words-9", "agent@0.002", "agent@0.004"]
    places = [(f"p{k}", k, "c", "m", "ddim-10", "agent", "float32", "1") for k in range(3)]
    rows = [
        ResultRow(name, *place, nfe=5 + k, net_flops=1e9 * (5 + k), actions=[0, 2, 1], scores={"success": k % 2})
        for k, name in enumerate(names)
        for place in places
    ]
    requirements = {place[:2]: 1 + k for k, place in enumerate(places)}
    for figure in (quality_figure(rows, ["nfe"]), actions_figure(rows), complexity_figure(rows, requirements)):
        svg = inline_svg(figure, "plot")
        assert not re.findall(r"(?:fill|stroke): *#[0-9a-f]{6}", svg) and "var(--plot-agent)" not in svg
        assert set(re.findall(r"var\((--plot-[^)]*)\)", svg)) <= {css_variable(color) for color in DARK}
        words = re.findall(r">([^<>]+)</text>", svg)
        assert "ddim" not in words or {"agent", "@0.002", "@0.004", "stop-3"} <= set(words)


def test_links_and_ids_fit(page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [value[1:] for _, attributes in page.tags if (value := attributes.get("href"))]
    assert targets and set(targets) <= set(ids)


def test_pictures_are_inlined_and_made_small():
    picture = np.random.default_rng(0).integers(0, 255, (8, 12, 3), np.uint8)
    data = png_uri(picture).removeprefix("data:image/png;base64,")
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) == picture).all()
    large = png_uri(np.zeros((1024, 512, 3), np.uint8)).removeprefix("data:image/png;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(large))).size == (MAX_SIDE // 2, MAX_SIDE)


def test_a_row_cannot_name_a_file_outside_its_run(run, tmp_path):
    rows = [replace(row, image="../secret.png") for row in rows_of()]
    with pytest.raises(ValueError, match="secret.png.* outside"):
        write_report(tmp_path, rows, ITEMS, VERDICTS)


WRITTEN = ("report.html", "table.tex", "table.csv", "verdicts.csv")


def test_both_tiers_are_on_the_page_and_in_the_exports(tmp_path):
    stricter = Decision("H5", UNDECIDED, "open: rules", 4, (Part("no rule was run", UNDECIDED),))
    verdicts = [replace(VERDICTS[1], p_corrected=4e-7), stricter]
    write_report(tmp_path, [replace(row, image="") for row in rows_of()], ITEMS, verdicts)
    text = " ".join(" ".join(read_page(tmp_path).words).split())
    assert text.index("As stated H2 supported") < text.index("Stricter, the project's own H5 undecided")
    assert "corrected within its tier < 0.0001" in text and "p n/a: no rule was run." in text
    with (tmp_path / "verdicts.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["tier"], first["hypothesis"], first["p"], first["p_corrected"]) == (
        "As stated",
        "H2",
        "1e-07",
        "4e-07",
    )
    assert (first["estimate"], first["low"], first["high"]) == ("0.25", "0.1", "0.4")
    assert second["p"] == second["low"] == "" and "no p-value: no rule was run" in second["reason"]
    tex = (tmp_path / "table.tex").read_text()
    assert r"H2 & supported & 0.25 [0.1, 0.4] & $<$ 0.0001 & $<$ 0.0001 \\" in tex
    assert r"H5 & undecided & n/a & n/a & n/a \\" in tex and "H5 has no p-value: no rule was run." in tex


def test_a_finished_run_is_reported_again_without_a_model(run):
    before = (run / "report.html").read_text(encoding="utf-8")
    (run / "report.html").unlink()
    code = (
        "import sys; from addiff_env.evaluation.report import html; html.main(sys.argv[1:]); "
        "print('torch' in sys.modules or 'diffusers' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (run / "report.html").read_text(encoding="utf-8") == before
    again = ("table.txt", "quality_vs_compute.png", *WRITTEN)
    assert result.stdout.split() == [*(str(run / f"{n}") for n in again), "False"]


def test_a_run_keeps_what_its_report_needs(run):
    assert reported_rows(run) == rows_of()  # neither those of older code nor those of other items
    assert read_items(run) == ITEMS and read_verdicts(run) == VERDICTS
    strips = read_trajectories(run)
    for kept, made in zip(strips, (strip_of(ITEMS[0], ACTIONS[0]), strip_of(ITEMS[1], [2, 1])), strict=True):
        assert (kept.item, kept.reason, kept.actions) == (made.item, made.reason, made.actions)
        for a, b in zip(kept.frames, made.frames, strict=True):
            assert (a["picture"] == b["picture"]).all() and a["score"] == b["score"]
            assert (a["mask"] is None) == (b["mask"] is None) and (b["mask"] is None or (a["mask"] == b["mask"]).all())


def test_a_run_that_was_stopped_is_reported_as_far_as_it_came(tmp_path, capsys):
    """Its rows are all there is: no item, verdict or provenance was kept."""
    rows = rows_of()
    append_rows(tmp_path / "rows.jsonl", rows[: len(rows) - 2])
    assert main([str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(name in text for name in {row.method for row in rows}) and (tmp_path / "table.csv").exists()
    with pytest.raises(FileNotFoundError, match="no items.jsonl"):
        main([str(tmp_path), "--decide"])


def test_rows_that_are_gone_are_named(run, tmp_path):
    append_rows(tmp_path / "rows.jsonl", rows_of()[1:])
    write_items(tmp_path, ITEMS)
    write_provenance(tmp_path, rows_of())
    with pytest.raises(ValueError, match="1 of 12 reported rows"):
        reported_rows(tmp_path)


def test_without_an_agent_pictures_or_checker(tmp_path):
    rows = [replace(row, image="", scores={"clip_score": 0.5 + 0.1 * row.seed}) for row in rows_of()]
    fixed = [row for row in rows if row.method != "agent"]
    write_report(tmp_path, fixed, ITEMS, [])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "nothing is decided" in text and "clip_score" in text and 'id="failures"' not in text
    write_report(tmp_path, rows, ITEMS, [])
    assert 'id="actions"' in (tmp_path / "report.html").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="no rows"):
        write_report(tmp_path, [], ITEMS, [])


# --------------------------------------------------------------------------- numbers


def test_a_mean_holds_the_pictures_of_one_prompt_together():
    # Two prompts of two equal pictures are two observations, not four.
    found = estimate([0.0, 0.0, 1.0, 1.0], ["a", "a", "b", "b"])
    assert (found.number, found.mean) == (4, 0.5)
    assert found.high - found.mean == pytest.approx(1.959964 * np.std([0, 1], ddof=1) / np.sqrt(2))
    assert estimate([1.0, 2.0], ["a", "a"]).low is None
    with pytest.raises(ValueError, match="no mean of 0"):
        estimate([], [])


def test_the_interval_covers_at_its_level():
    rng = np.random.default_rng(1)
    prompts = [f"p{k}" for k in range(40) for _ in range(3)]
    hits = 0
    for _ in range(600):
        values = np.repeat(rng.normal(1, 1, 40), 3) + rng.normal(0, 0.5, 120)
        found = estimate(values, prompts)
        hits += found.low <= 1 <= found.high
    assert hits / 600 == pytest.approx(0.95, abs=0.025)


def test_a_metric_that_some_rows_lack_is_never_counted_as_zero():
    rows = rows_of()
    del rows[0].scores["reward_score"]
    ddim = summarise(rows)[0]
    assert ddim.scores["reward_score"].number == 3 and ddim.scores["reward_score"].mean == pytest.approx(2 / 3)
    assert "peak_memory" not in ddim.costs
    assert headline_metric(rows) == "success"
    assert headline_metric([replace(rows[0], scores={"a": 1}), replace(rows[1], scores={"b": 1})]) == "a"


def test_decisions_and_levels_of_complexity():
    rows = [row for row in rows_of() if row.method == "agent"]
    assert decision_counts(rows).tolist() == [[3, 0, 1], [1, 2, 1], [1, 1, 0], [0, 1, 0]]
    assert decision_counts([]).shape == (0, 3)
    num_requirements = {(item.prompt, item.seed): item.num_requirements // 2 for item in ITEMS}
    assert {level: len(group) for level, group in by_num_requirements(rows, num_requirements).items()} == {
        0: 1,
        1: 2,
        2: 1,
    }
    with pytest.raises(ValueError, match="belongs to no item"):
        by_num_requirements(rows, {})


# --------------------------------------------------------------------------- exports


def test_csv_reads_back(run):
    with (run / "table.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    expected = list(tidy(rows_of()))
    assert len(lines) == len(expected) == len({(x["method"], x["metric"], x["category"]) for x in lines})
    for line, (method, metric, category, found) in zip(lines, expected, strict=True):
        assert (line["method"], line["metric"], line["category"]) == (method, metric, category)
        assert (int(line["pictures"]), float(line["mean"])) == (found.number, found.mean)
        ends = [float(line[name]) if line[name] else None for name in ("low", "high")]
        assert ends == [found.low, found.high]
    chosen = {(x["method"], x["metric"], x["category"]): x for x in lines}
    assert float(chosen["agent", "nfe", "full"]["mean"]) == 9.0  # 7 and 11
    assert float(chosen["ddim-5", "net_flops", "(all)"]["mean"]) == 12.5e9


def test_csv_keeps_odd_names(tmp_path):
    rows = [replace(row, category='a, "b"\nc', method="x,y") for row in rows_of()[:2]]
    write_csv(rows, tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        assert {(x["method"], x["category"]) for x in csv.DictReader(file)} == {
            ("x,y", "(all)"),
            ("x,y", 'a, "b"\nc'),
        }


def test_latex_special_characters_are_escaped():
    assert latex_escape("50% of_a & b #1 $x$ {y}") == r"50\% of\_a \& b \#1 \$x\$ \{y\}"
    assert latex_escape("a\\b~c^d<e>f|\n g") == (
        r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d\textless{}e\textgreater{}f\textbar{} g"
    )


def test_latex_table_holds_the_numbers():
    rows = [replace(row, method=row.method.replace("agent", "a_b&c")) for row in rows_of()]
    text = latex_table(rows, "toy_split")
    low, high = wilson_interval(2, 4)
    line = rf"a\_b\&c & 4 & 50.0 & [{100 * low:.1f}, {100 * high:.1f}] & 7.0 (2.5) & 14.0 & 17.5 & 0.250 & 45/36/18 \\"
    assert line in text.splitlines()
    assert r"a\_b\&c & 50 & 50 \\" in text.splitlines()
    assert r"method & simple\_\textless{}b\textgreater{} & full \\" in text.splitlines()
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == text.count(r"\end{tabular}") == 2
    body = text[: text.index(r"\bottomrule")].splitlines()[5:]
    columns = {len(re.split(r"(?<!\\)&", line)) for line in body if line.endswith(r"\\")}
    assert columns == {9}
