"""`addiff time` on a whole small evaluation; the clock is a stand-in that counts turns."""

import csv
import json
import sys
from dataclasses import replace
from itertools import count

import pytest
from models import thrifty_agent

from addiff_env import cli
from addiff_env.evaluation.report import html
from addiff_env.evaluation.run import time_command, timing
from addiff_env.evaluation.run.rows import read_rows, write_rows
from addiff_env.evaluation.run.run_folder import read_timings, read_verdicts, reported_rows

METHODS = [
    *("ddim-2", "ddim-4", "dpmpp_2m-4", "best-of-2:ddim-2", "threshold:3:0.1", "words-3", "random:0.5:0.25:0.25"),
    *("fk-2:ddim-2", "rbf-4:ddim-2", "restart-6:ddim-4", "agent@0.016", "agent@0.001"),
]
CONTROLS = ["agent@0.016, mask=full", "agent@0.016, continued"]


def run_addiff(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["addiff", *words])
    monkeypatch.setattr(sys, "orig_argv", ["python", "bin/addiff", *words])
    try:
        return cli.main()
    except SystemExit as ended:
        return ended.code or 0


@pytest.fixture(scope="module")
def evaluated(small_kwargs, tmp_path_factory):
    """A run of every kind of method on twelve prompts."""
    agent, folder = tmp_path_factory.mktemp("agent"), tmp_path_factory.mktemp("run")
    thrifty_agent(small_kwargs).save(agent)
    words = ["evaluate", "benchmark.name=tiny-dev", "benchmark.limit=12", "num_envs=4", "save_images=false"]
    words += ["metrics=[checker]", "filmstrips=0", f"agent={agent}", f"hydra.run.dir={folder}"]
    quoted = ",".join(f"'{name}'" for name in METHODS)
    with pytest.MonkeyPatch.context() as patch:
        assert run_addiff(patch, *words, f"methods=[{quoted}]") == 0
    return folder


@pytest.fixture
def run(evaluated, tmp_path):
    """A copy of it."""
    import shutil

    return shutil.copytree(evaluated, tmp_path / "run")


@pytest.fixture
def still_clock(monkeypatch):
    """Every look at the clock is a second after the one before."""
    ticks = count()
    real = time_command.time_methods
    monkeypatch.setattr(
        time_command, "time_methods", lambda *args, **more: real(*args, clock=lambda: float(next(ticks)), **more)
    )
    return ticks


def test_every_method_of_a_run_is_timed_and_reported(run, still_clock, monkeypatch, capsys):
    before = (run / "rows.jsonl").read_bytes()
    assert [one.outcome for one in read_verdicts(run)][-3:] == ["not applicable"] * 3
    assert run_addiff(monkeypatch, "time", str(run), "--rounds=2", "--prompts=4", "--batch-size=2") == 0
    said = capsys.readouterr().out
    assert "Pictures a second at equal quality" in said and "2 rounds in turns over the same 4 pictures" in said
    found = read_timings(run)
    assert not found.untimed and sorted(found.methods) == sorted([*METHODS, *CONTROLS])
    assert all(one.seconds == (0.25, 0.25) for one in found.methods.values())  # a tick a turn of four pictures
    assert found.machine["processor"] and found.machine["dtype"] == "float32" and found.machine["torch"]
    assert (run / "rows.jsonl").read_bytes() == before  # rows keep their own seconds
    rows = reported_rows(run)
    assert {row.timed_seconds for row in rows if row.method == "ddim-4"} == {0.25}
    text = (run / "table.txt").read_text()
    assert "s/image" in text and "timed seconds: " in text
    with (run / "table.csv").open() as file:
        timed = {line["method"]: line for line in csv.DictReader(file) if line["metric"] == "timed_seconds"}
    assert set(timed) == {*METHODS, *CONTROLS}
    with (run / "speeds.csv").open() as file:
        speeds = {line["method"]: line for line in csv.DictReader(file)}
    assert float(speeds["ddim-2"]["pictures_per_second"]) == pytest.approx(4)
    page = (run / "report.html").read_text()
    assert "above the front of ddim at equal seconds" in page and page.count("<figure") >= 3
    verdicts = {one.hypothesis: one for one in read_verdicts(run)}
    assert {"H2 at equal seconds", "H2+ at equal seconds", "H5 at equal seconds"} <= set(verdicts)
    assert "H2 at price 0.001 at equal seconds" in verdicts
    tex = (run / "table.tex").read_text()
    assert "pictures a second at equal quality" in tex and "timed seconds" in tex


def test_rounds_are_kept_and_other_settings_are_refused(run, still_clock):
    sample = {"prompts": 2, "batch_size": 2}
    first = time_command.time_run(run, 1, **sample)
    assert time_command.time_run(run, 1, **sample) == first == read_timings(run)
    found = time_command.time_run(run, 3, **sample)
    assert found.rounds == 3 and [one["rounds"] for one in found.sessions] == [1, 2] and found == read_timings(run)
    assert found.methods["ddim-2"].seconds[:1] == first.methods["ddim-2"].seconds
    kept = (run / "timings.json").read_bytes()
    for further in ({"prompts": 3, "batch_size": 2}, {**sample, "seed": 1}, {**sample, "batch_size": 1}):
        with pytest.raises(ValueError, match="was timed with settings .* --anew"):
            time_command.time_run(run, 4, **further)
    assert (run / "timings.json").read_bytes() == kept
    assert time_command.time_run(run, 1, prompts=3, batch_size=2, anew=True).rounds == 1


def test_a_device_that_is_gone_costs_no_round(run, still_clock, monkeypatch):
    time_command.time_run(run, rounds=1, prompts=2, batch_size=2)
    before, left = (run / "timings.json").read_bytes(), [0]

    def gone(method, items, make=timing._make):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("CUDA error: device lost")
        return make(method, items)

    monkeypatch.setattr(timing, "_make", gone)
    with pytest.raises(ValueError, match="1 rounds are kept in .*ddim-2: RuntimeError: CUDA error: device lost"):
        time_command.time_run(run, rounds=2, prompts=2, batch_size=2)
    assert (run / "timings.json").read_bytes() == before
    left[0] = 2 * len([*METHODS, *CONTROLS])  # warm-up and one round more
    with pytest.raises(ValueError, match="2 rounds are kept"):
        time_command.time_run(run, rounds=3, prompts=2, batch_size=2)
    assert read_timings(run).rounds == 2


def test_ctrl_c_keeps_what_was_finished(run, monkeypatch, capsys):
    real = timing._round
    rounds = count()

    def interrupted(*args):
        if next(rounds) == 1:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(timing, "_round", interrupted)
    assert run_addiff(monkeypatch, "time", str(run), "--rounds=3", "--prompts=2", "--batch-size=2") == 130
    assert "1 rounds are kept" in capsys.readouterr().err and read_timings(run).rounds == 1


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("rows.jsonl", lambda text: text.replace('"policy": "ddim-2"', '"policy": "other"'), "'other', here 'ddim-2'"),
        ("config.yaml", lambda text: text.replace("env: {}", "env: {guidance_scale: 3.5}"), "guidance_scale"),
    ],
)
def test_a_run_by_other_methods_or_settings_is_refused(run, monkeypatch, capsys, file, change, words):
    before = (run / file).read_text()
    (run / file).write_text(change(before))
    if file == "rows.jsonl":
        kept = json.loads((run / "provenance.json").read_text())
        kept["methods"]["ddim-2"]["policy"] = "other"
        (run / "provenance.json").write_text(json.dumps(kept))
    assert before != (run / file).read_text()
    assert run_addiff(monkeypatch, "time", str(run), "--rounds=1", "--prompts=1") == 1
    assert words in capsys.readouterr().err and not (run / "timings.json").exists()


def test_what_is_no_evaluation_is_refused_and_not_made(tmp_path, monkeypatch, capsys):
    assert run_addiff(monkeypatch, "time", str(tmp_path / "nothing")) == 1
    assert "no rows.jsonl" in capsys.readouterr().err and not (tmp_path / "nothing").exists()


def test_timings_that_no_longer_fit_are_not_used_and_the_report_goes_on(run, still_clock):
    time_command.time_run(run, 2, 2, 2)
    rows = read_rows(run / "rows.jsonl")
    write_rows(run / "rows.jsonl", [replace(r, policy="new") if r.method == "ddim-2" else r for r in rows])
    kept = json.loads((run / "provenance.json").read_text())
    kept["methods"]["ddim-2"]["policy"] = "new"
    (run / "provenance.json").write_text(json.dumps(kept))
    assert html.main([str(run), "--decide"]) == 0
    assert "ddim-2 was not timed: timed with another policy ddim-2, the rows' is new" in (run / "table.txt").read_text()
    verdicts = {one.hypothesis: one for one in read_verdicts(run)}
    assert "ddim-2 has no seconds" in [part.condition for part in verdicts["H2 at equal seconds"].parts]
    (made,) = run.glob("made-with-*.json")
    other = json.loads(made.read_text())
    other["environment"]["guidance_scale"] = 9.5
    made.write_text(json.dumps(other))
    assert html.main([str(run), "--decide"]) == 0
    assert "what was timed has other settings" in (run / "table.txt").read_text()
    assert all(row.timed_seconds is None for row in reported_rows(run))
    assert read_verdicts(run)[-1].outcome == "not applicable"


def test_damaged_timings_are_named(run):
    for text in ("{", "[]", '{"methods": {"a": {"seconds": []}}}', '{"methods": {}, "other": 1}'):
        (run / "timings.json").write_text(text)
        with pytest.raises(ValueError, match=r"timings\.json"):
            read_timings(run)
