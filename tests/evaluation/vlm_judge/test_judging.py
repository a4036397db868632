"""The judging command over a finished run: pairs, money before the first call, resuming, judge.json, the report."""

import json
import re

import pytest
from chat_server import KEY, brighter
from PIL import Image
from reports import ITEMS, VERDICTS, Page, rows_of

from addiff_env import cli
from addiff_env.evaluation.report import html
from addiff_env.evaluation.run.rows import append_rows, read_rows
from addiff_env.evaluation.run.run_folder import write_items, write_provenance, write_verdicts
from addiff_env.evaluation.statistics.decision import Rules
from addiff_env.evaluation.vlm_judge.judging import agreement, describe_judge, describe_pair, run_pairs
from addiff_env.evaluation.vlm_judge.pairs import Preference

LEVEL = {"agent": 200, "ddim-10": 100, "ddim-5": 10}  # brightness of each method's pictures


@pytest.fixture
def run(tmp_path):
    """A finished run with pictures, the agent's the brightest."""
    folder, rows = tmp_path / "run", rows_of()
    for row in rows:
        (folder / row.image).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (LEVEL[row.method] + row.seed, 0, 0)).save(folder / row.image)
    append_rows(folder / "rows.jsonl", rows)
    write_items(folder, ITEMS)
    write_verdicts(folder, VERDICTS, Rules())
    write_provenance(folder, rows, benchmark="toy")
    return folder


@pytest.fixture
def judges(server, monkeypatch):  # noqa: F811
    """Two judges of the local server, ``eye`` and ``ear``."""
    for name in ("EYE", "EAR"):
        values = {
            "MODEL": f"{name.lower()}-1",
            "USD_IN": "2.5",
            "USD_OUT": "10",
            "BASE_URL": server.url,
            "API_KEY": KEY,
        }
        for part, value in values.items():
            monkeypatch.setenv(f"ADDIFF_JUDGE_{name}_{part}", value)
        for part in ("MAX_USD", "ANSWER_TOKENS", "IMAGE_TOKENS"):
            monkeypatch.delenv(f"ADDIFF_JUDGE_{name}_{part}", raising=False)
    return server


def judge(run, *arguments):
    return cli.main(["judge", str(run), "--judges", *arguments])


def page_of(run):
    page = Page()
    page.feed((run / "report.html").read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    return page


def test_a_run_is_judged_from_end_to_end(run, judges, capsys):
    judges.reply = brighter
    judge(run, "eye", "ear")
    assert len(judges.requests) == 2 * 3 * 4 * 2  # judges, pairs of methods, pictures, orders
    found = json.loads((run / "judge.json").read_text())
    assert (found["methods"], found["pictures"]) == (["ddim-5", "ddim-10", "agent"], 4)
    (pair,) = [p for p in found["judges"]["eye"]["pairs"] if (p["method_a"], p["method_b"]) == ("ddim-5", "agent")]
    assert (pair["pairs"], pair["a"]["share"], pair["tie"]["share"], pair["b"]["share"]) == (4, 0, 0, 1)
    assert 0.3 < pair["b"]["low"] < 1 and pair["b"]["high"] == pytest.approx(1)
    for ranking in (found["judges"]["ear"]["ranking"], found["together"]["ranking"]):
        assert [s["method"] for s in ranking] == ["agent", "ddim-10", "ddim-5"]
        assert all(s["low"] - 1e-6 <= s["estimate"] <= s["high"] + 1e-6 for s in ranking)
    (both,) = found["agreement"]
    assert both["judges"] == ["eye", "ear"] and both["same"] == 1 and both["pairs"] == 12
    assert found["spent_usd"] == pytest.approx(48 * 0.0035)
    page = page_of(run)
    assert page.line("judges", "ddim-5")[:4] == ["ddim-5", "ddim-10", "4", "0.0 [0.0 to 49.0]"]
    assert page.line("judges", "agent")[0] == "agent" and "eye (eye-1)" in "".join(page.words)
    said = capsys.readouterr().out
    assert "eye (eye-1): 12 pairs cost about $0." in said and "report.html" in said


def test_the_cost_is_said_and_refused_before_anything_is_asked(run, judges, capsys):
    assert judge(run, "eye", "ear", "--max-usd", "0.4") == 1
    assert not judges.requests and not (run / "judge.json").exists()
    captured = capsys.readouterr()
    assert captured.out.count("12 pairs cost about $0.2") == 2 and "the ceiling is $0.14" in captured.err
    judge(run, "eye", "--estimate")
    said = capsys.readouterr().out
    assert "12 pairs cost about" in said and "at most" not in said
    assert not judges.requests and not (run / "judge-answers.jsonl").exists()


def test_an_interrupted_run_goes_on_and_its_money_counts(run, judges, capsys):
    judges.script = [None] * 5 + [401]
    assert judge(run, "eye", "--methods", "agent", "ddim-5") == 1
    assert "AuthenticationError" in capsys.readouterr().err and len(judges.requests) == 6
    three_more = ["eye", "--methods", "agent", "ddim-5", "--max-usd"]  # five are paid for
    assert judge(run, *three_more, "0.03") == 1
    assert "$0.02 is spent, the ceiling is $0.03" in capsys.readouterr().err
    judge(run, *three_more, "0.06")
    assert len(judges.requests) == 6 + 3
    assert json.loads((run / "judge.json").read_text())["spent_usd"] == pytest.approx(8 * 0.0035)
    judge(run, "eye", "--methods", "agent", "ddim-5")
    assert len(judges.requests) == 9


def test_no_judge_spends_what_the_next_was_promised(run, judges, capsys):
    judges.script = ["mumble"] * 24  # the first judge's repeats
    judges.prompt_tokens = 3000  # about as estimated
    assert judge(run, "eye", "ear", "--methods", "agent", "ddim-5", "--max-usd", "0.176") == 1
    assert "the ceiling is $0.09" in capsys.readouterr().err
    assert all(body["model"] == "eye-1" for body in judges.requests)


def test_a_limit_takes_whole_prompts(run):
    rows = read_rows(run / "rows.jsonl")
    pairs = run_pairs(run, rows, ["agent", "ddim-5"], limit=2)
    assert [(p.prompt, p.method_a, p.method_b) for p in pairs] == [
        (item.prompt, "agent", "ddim-5") for item in ITEMS[:2]
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eye", "--methods", "agent", "ddim-7"], r"no rows of \['ddim-7'\]; the run has ddim-5, ddim-10, agent"),
        (["eye", "--methods", "agent"], "needs two methods"),
        (["eye", "--limit", "0"], "limit must be a whole number of at least 1, or null, got 0"),
        (["eye", "eye"], "each once"),
        (["nose"], "ADDIFF_JUDGE_NOSE_MODEL, .*ADDIFF_JUDGE_NOSE_API_KEY"),
    ],
)
def test_what_cannot_be_judged_is_said(run, judges, capsys, arguments, words):
    assert judge(run, *arguments) == 1
    assert not judges.requests
    assert re.search(words, capsys.readouterr().err)


@pytest.mark.parametrize("ceiling", ["nan", "-1", "much"])
def test_a_ceiling_that_is_none_is_refused(run, judges, capsys, ceiling):
    with pytest.raises(SystemExit):
        judge(run, "eye", "--max-usd", ceiling)
    assert not judges.requests and f"at least 0, got '{ceiling}'" in capsys.readouterr().err


def test_a_missing_key_is_named_by_its_variable(run, judges, monkeypatch, capsys):
    monkeypatch.delenv("ADDIFF_JUDGE_EYE_API_KEY")
    assert judge(run, "eye") == 1
    assert capsys.readouterr().err == "addiff judge: a judge needs the environment variables ADDIFF_JUDGE_EYE_API_KEY\n"


def test_lost_pictures_and_strange_paths_are_said(run, judges, capsys):
    (run / rows_of()[0].image).unlink()
    assert judge(run, "eye") == 1
    assert "'ddim-5' has no picture of 1 places" in capsys.readouterr().err
    rows = read_rows(run / "rows.jsonl")
    rows[0].image = "../secret.png"
    with pytest.raises(ValueError, match="outside the run folder"):
        run_pairs(run, rows)


def test_the_key_is_in_no_file(run, judges):
    judges.script = [json.dumps({"winner": "tie", "reason": f"I was told {KEY}"}), f"mumble {KEY}"]
    judge(run, "eye")
    written = [path.read_bytes() for path in run.rglob("*") if path.is_file()]
    assert any(b"mumble <key>" in content for content in written)
    assert not any(KEY.encode() in content for content in written)


def preferences(winners, judge="j", prompts=None):
    prompts = prompts or [f"p{k}" for k in range(len(winners))]
    return [
        Preference(p, k, "x", "y", w, w != "tie", judge) for k, (w, p) in enumerate(zip(winners, prompts, strict=True))
    ]


def test_rates_by_hand():
    found = describe_pair(preferences(["a", "a", "tie", "b", None]))
    assert (found["pairs"], found["unanswered"], found["inconsistent"]) == (4, 1, 1)
    assert [found[k]["share"] for k in ("a", "tie", "b")] == [0.5, 0.25, 0.25]
    # Four pictures of one prompt are one observation.
    alone = describe_pair(preferences(["a"] * 4, prompts=["p"] * 4))["a"]
    assert alone["low"] == pytest.approx(1 / (1 + 1.959964**2))
    assert "a" not in describe_pair(preferences([None]))


def test_what_is_undefined_is_said_and_not_raised(tmp_path):
    silent = describe_judge(preferences([None, None]))
    assert silent["ranking"] == [] and "none of 2 pairs" in silent["note"]
    (found,) = agreement({"one": preferences(["tie"] * 3), "other": preferences(["tie"] * 3)})
    assert found["kappa"] is None and found["same"] == 1 and "always answered 'tie'" in found["note"]


def test_no_judge_no_section(run):
    rows = read_rows(run / "rows.jsonl")
    html.write_report(run, rows, ITEMS, VERDICTS)
    assert "judges" not in page_of(run).tables
