"""The two scripts as a user runs them: train a little, evaluate the result, kill and go on."""

import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from addiff_env import cli
from addiff_env.agent import Agent
from addiff_env.evaluation.run.rows import append_rows, read_rows, shard_path
from addiff_env.evaluation.run.run_folder import read_trajectories, reported_rows
from addiff_env.evaluation.statistics.rules import read_rules
from addiff_env.types import ResultRow

ROOT = Path(__file__).parent.parent
LITTLE = ["num_envs=4", "algorithm.n_steps=4", "algorithm.batch_size=8", "algorithm.total_timesteps=32"]


def run(script, *overrides, cwd=ROOT, **environment):
    command = [sys.executable, str(ROOT / script), *overrides]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900, env=os.environ | environment)


@pytest.fixture
def run_here(capsys, monkeypatch):
    """As `run`, in this process: half a dozen seconds of imports less. Nothing of one command is left for the next."""

    def run_here(script, *overrides, **environment):
        logging = [
            "hydra/job_logging=disabled",
            "~hydra.job_logging.handlers",
            "hydra/hydra_logging=disabled",
        ]  # which stays
        status = 0
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a command's own run, where they are no errors
            patch.setattr(sys, "argv", [script, *overrides, *logging])
            for name, value in environment.items():
                patch.setenv(name, value)
            try:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            except SystemExit as end:
                status = end.code
        printed = capsys.readouterr()
        return subprocess.CompletedProcess([script, *overrides], status, printed.out, printed.err)

    return run_here


def added(settings):
    """Settings of the environment as additions to ``env.kwargs``."""
    return [f"+env.kwargs.{name}={value}" for name, value in settings.items()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_kwargs):
    elsewhere = tmp_path_factory.mktemp("else where")
    (elsewhere / "mine.csv").write_text("seed,prompt\n1,a red circle\n2,two blue squares\n")
    folder = tmp_path_factory.mktemp("train")
    options = [*LITTLE, *added(small_kwargs), "calibration_steps=3", "progress_bar=false", f"hydra.run.dir={folder}"]
    result = run("train_sb3.py", *options, "prompts.source=mine.csv", cwd=elsewhere)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_training_leaves_a_bundle_logs_and_its_configuration(trained):
    folder, printed = trained
    agent = Agent.load(folder / "agent")
    assert agent.fingerprint in printed and str(folder / "agent") in printed
    assert agent.config["training"]["timesteps"] == 32
    assert list(folder.glob("events.out.tfevents.*")) and (folder / ".hydra" / "config.yaml").exists()
    header = (folder / "progress.csv").read_text().splitlines()[0]
    for key in ("action/refine", "reward/terminal", "reward/efficiency", "episode/nfe_std"):
        assert key in header


def test_evaluation_writes_rows_table_and_pictures_and_goes_on_after_a_kill(trained, run_here, tmp_path):
    options = [
        f"agent={trained[0] / 'agent'}",
        "benchmark.limit=8",
        "methods=[ddim-2,ddim-3,agent]",
        "num_envs=4",
        "filmstrips=2",
    ]
    first = run("evaluate.py", *options, f"hydra.run.dir={tmp_path}")
    assert first.returncode == 0, first.stderr
    rows = read_rows(tmp_path / "rows.jsonl")
    assert len(rows) == 40 and len({row.key for row in rows}) == 40
    controls = {"agent, mask=full", "agent, continued"}
    assert {row.method for row in rows} == {"ddim-2", "ddim-3", "agent", *controls}
    spent = {name: [row.nfe for row in rows if row.method == name] for name in ("agent", *controls)}
    assert sorted(spent["agent"]) == sorted(spent["agent, mask=full"]) == sorted(spent["agent, continued"])
    assert all(f"{hypothesis}: " in first.stdout for hypothesis in ("H1", "H2", "H3", "H4"))
    assert all((tmp_path / row.image).exists() for row in rows)
    plain = ("table.txt", "quality_vs_compute.png", "filmstrips.png", "verdicts.json")
    for name in (*plain, "report.html", "table.tex", "table.csv"):
        assert str(tmp_path / name) in first.stdout and (tmp_path / name).stat().st_size > 100
    assert {row.key: row for row in reported_rows(tmp_path)} == {row.key: row for row in rows}
    assert len(read_trajectories(tmp_path)) == 2

    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:10]) + lines[10][:40])  # as a kill leaves it
    assert run_here("evaluate.py", *options, f"hydra.run.dir={tmp_path}").returncode == 0
    again = read_rows(tmp_path / "rows.jsonl")
    assert again[:10] == rows[:10]
    resumed, whole = {row.key: row for row in again}, {row.key: row for row in rows}
    assert resumed.keys() == whole.keys()
    for key, row in whole.items():
        assert (resumed[key].actions, resumed[key].nfe) == (row.actions, row.nfe)
        # What was missing travelled in a smaller batch, which moves the last digits.
        assert resumed[key].scores == pytest.approx(row.scores, abs=1e-2)


def test_the_pages_are_made_from_a_run_that_goes_on_after_ctrl_c(trained, tmp_path, monkeypatch, capsys):
    folder, pages = tmp_path / "a run", [tmp_path / "my pages" / name for name in ("README.md", "results.md")]
    pages[0].parent.mkdir()
    for page, part in zip(pages, ("summary", "plot"), strict=True):
        page.write_text(f"before\n<!-- results: main/{part} -->\n<!-- end: main/{part} -->\nbehind\n")
    words = ["reproduce", "--benchmark", "tiny-dev", "--limit", "8", "--methods", "ddim-2", "agent"]
    words += ["--folder", str(folder), "--pages", *map(str, pages), "--set", f"agent={trained[0] / 'agent'}"]
    words += ["num_envs=4", "filmstrips=0", "hydra/job_logging=disabled", "~hydra.job_logging.handlers"]
    words += ["hydra/hydra_logging=disabled"]
    before = [page.read_text() for page in pages]

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr("addiff_env.evaluation.run.runner.controls_of", interrupt)
        cli.main(words)
    assert ended.value.code == 130 and "16 rows are kept" in capsys.readouterr().err
    assert [page.read_text() for page in pages] == before
    kept = (folder / "rows.jsonl").read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cli.main(words) == 0
    assert (folder / "rows.jsonl").read_bytes().startswith(kept)
    assert len(read_rows(folder / "rows.jsonl")) == 32
    text = pages[0].read_text()
    assert text.startswith("before\n<!--") and text.endswith("-->\nbehind\n") and "8 pictures (8 prompts)" in text
    assert "`ddim-2`" in text and "`agent`" in text and "mask=full" not in text
    plot = pages[0].parent / "quality_vs_compute_main.png"
    assert f"({plot.name})" in pages[1].read_text() and plot.stat().st_size > 1000


def test_reproducing_refuses_before_any_picture(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- results: main/table -->\n<!-- end: main/table -->\n")
    words = ["reproduce", "--folder", str(tmp_path / "run"), "--pages", str(page)]
    for wrong, said in (
        (["--benchmark", "tiny-finale"], "unknown benchmark 'tiny-finale'"),
        (["--methods", "all"], "no part of 'all'"),
        (["--pages", str(tmp_path / "none.md")], "none.md"),
        (["--methods", "ddim-10", "no-such-method"], "no-such-method"),
    ):
        assert cli.main([*words, *wrong]) == 1 and said in capsys.readouterr().err
        assert not list(tmp_path.glob("run/rows*"))
    with pytest.raises(SystemExit):
        cli.main([*words, "--limit", "0"])
    assert "must be at least 1, got 0" in capsys.readouterr().err


def test_shards_merge_into_one_run(trained, run_here, tmp_path):
    sizes = ["benchmark.limit=8", "num_envs=4", "filmstrips=0", "save_images=false", "shard.count=2"]
    options = [f"agent={trained[0] / 'agent'}", "methods=[ddim-2,words-2,agent]", *sizes, f"hydra.run.dir={tmp_path}"]
    first = run_here("evaluate.py", *options, "benchmark.limit=4", "methods=[words-2]", "shard.index=0")
    assert first.returncode == 0, first.stderr  # the limit may grow, and these rows stay good
    assert run_here("evaluate.py", *options, "shard.index=0").returncode == 0
    early = run_here("evaluate.py", *options, "shard.merge=true")
    assert early.returncode != 0 and "1 of 2 shards left no file" in early.stderr
    assert run_here("evaluate.py", *options, "shard.index=1").returncode == 0
    merged = run_here("evaluate.py", *options, "shard.merge=true")
    assert merged.returncode == 0, merged.stderr
    rows = read_rows(tmp_path / "rows.jsonl")
    assert len(rows) == 5 * 8 and len({row.key for row in rows}) == 5 * 8
    assert "H4: " in merged.stdout
    whole = run_here("evaluate.py", *options, "shard.count=1", "methods=[words-3]", "controls=false", "filmstrips=0")
    assert whole.returncode == 0, whole.stderr  # as does a later command that is not split ...
    assert run_here("evaluate.py", *options, "shard.merge=true").returncode == 0
    assert {row.method for row in read_rows(tmp_path / "rows.jsonl")} >= {"words-3", "agent"}  # ... which a merge keeps
    assert run_here("evaluate.py", *options, "+rules.margin=0.05", "shard.merge=true").returncode == 0
    assert read_rules(tmp_path, "success").margin == 0.05  # a merge says by which rules it decides

    other = run_here("evaluate.py", *options, "+env.guidance_scale=7", "shard.merge=true")
    assert other.returncode != 0 and "environment.guidance_scale: 4.0 there, 7 now" in other.stderr
    other = run_here("evaluate.py", *options, "+env.guidance_scale=7", "shard.index=0")
    assert other.returncode != 0 and "hydra.run.dir" in other.stderr
    for path in tmp_path.glob("rows-*"):  # as if all shards had died before the controls
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if '"agent, ' not in line))
    cut = run_here("evaluate.py", *options, "shard.merge=true")
    assert cut.returncode != 0 and "16 of 40 rows are missing" in cut.stderr and "agent, mask=full" in cut.stderr


def test_shards_that_could_never_be_merged_are_none(trained, run_here, tmp_path):
    """One that has nothing to make leaves a file all the same; one with rows of other code is refused beforehand."""
    options = [f"agent={trained[0] / 'agent'}", "methods=[ddim-2]", "benchmark.limit=2", "controls=false"]
    options += ["filmstrips=0", "shard.count=3", f"hydra.run.dir={tmp_path}"]
    nothing = run_here("evaluate.py", *options, "shard.index=2")
    assert nothing.returncode == 0, nothing.stderr
    assert shard_path(tmp_path, 2, 3).read_text() == ""
    append_rows(shard_path(tmp_path, 0, 3), [ResultRow("ddim-2", "x", 0, "c", "b", "s", "", "float32", "older")])
    refused = run_here("evaluate.py", *options, "shard.index=0")
    assert refused.returncode != 0 and "holds rows of code version older, this is" in refused.stderr
    assert len(read_rows(shard_path(tmp_path, 0, 3))) == 1  # before any picture was made


def test_processes_of_a_launcher_share_the_work_and_the_last_one_merges(trained, run_here, tmp_path):
    """As ``accelerate launch`` and ``torchrun`` start them: each with its rank, all with the same command."""
    sizes = ["benchmark.limit=4", "num_envs=2", "filmstrips=0", "controls=false"]
    options = [f"agent={trained[0] / 'agent'}", "methods=[ddim-2,words-2]", *sizes, f"hydra.run.dir={tmp_path}"]
    first = run_here("evaluate.py", *options, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    assert first.returncode == 0, first.stderr
    assert "the process that finishes last merges" in first.stdout and not (tmp_path / "rows.jsonl").exists()
    last = run_here("evaluate.py", *options, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")
    assert last.returncode == 0, last.stderr
    rows = read_rows(tmp_path / "rows.jsonl")
    assert len(rows) == 8 and str(tmp_path / "table.txt") in last.stdout
    assert all(row.peak_memory > 50_000_000 for row in rows)

    (tmp_path / ".reported").unlink()  # now both find everything made, and end together
    command = [sys.executable, str(ROOT / "evaluate.py"), *options]
    places = [{"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)} for rank in range(2)]
    pipes = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    both = [subprocess.Popen(command, env=os.environ | place, **pipes) for place in places]
    said = [process.communicate(timeout=900) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted("wrote" in out for out, _ in said) == [False, True]
    assert sorted("another process reported" in out for out, _ in said) == [False, True]
    assert len((tmp_path / "items.jsonl").read_text().splitlines()) == 4


def test_what_is_missing_stops_an_evaluation_before_any_picture(trained, run_here, tmp_path):
    options = [f"agent={trained[0] / 'agent'}", "benchmark.limit=2", f"hydra.run.dir={tmp_path}", "filmstrips=0"]
    options += [
        "methods=[ddim-2,random:auto,lcm-2]",
        "controls=false",
        "method_options.lcm_lora=/nowhere/lora.safetensors",
    ]
    refused = run_here("evaluate.py", *options)
    assert refused.returncode != 0 and not (tmp_path / "rows.jsonl").exists()
    assert "method 'lcm-2'" in refused.stderr and "allow_missing=true" in refused.stderr
    assert not (tmp_path / "tuning.json").exists()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A cat wearing sunglasses\nAn astronaut on a horse\n")
    metrics = ["metrics=[clip_score,reward_score,pickscore:/nowhere/pickscore]", f"benchmark.name={prompts}"]
    refused = run_here("evaluate.py", *options, *metrics)
    assert refused.returncode != 0 and "metric 'pickscore:/nowhere/pickscore'" in refused.stderr
    options.append("methods=[ddim-2,lcm-2]")
    allowed = run_here("evaluate.py", *options, *metrics, "allow_missing=true")
    assert allowed.returncode == 0, allowed.stderr
    assert "left out method 'lcm-2'" in allowed.stdout and "left out metric 'pickscore" in allowed.stdout
    method, metric = json.loads((tmp_path / "provenance.json").read_text())["left_out"]
    assert method.startswith("method 'lcm-2': ") and metric.startswith("metric 'pickscore:/nowhere/pickscore': ")
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [sorted(row.scores) for row in rows] == [["clip_score", "reward_score"]] * 2  # no success without a checker
    assert "clip_score" in (tmp_path / "table.txt").read_text().splitlines()[0]
    again = run_here("evaluate.py", *options, metrics[1], "metrics=[clip_score]", "methods=[ddim-2]")
    assert again.returncode == 0, again.stderr
    other = run_here("evaluate.py", *options, "methods=[ddim-2]", f"benchmark.name={prompts}",
                "metrics=[clip_score,'clipscore:addiff_env:tiny/weights/clip']")  # fmt: skip
    assert other.returncode != 0 and "metrics.clipscore: nothing there, clipscore:addiff_env:tiny" in other.stderr
    assert "hydra.run.dir" in other.stderr


@pytest.mark.slow
def test_the_shipped_agent_is_evaluated_from_any_folder(tmp_path):
    (tmp_path / "else where").mkdir()
    (tmp_path / "else where" / "mine.txt").write_text("a red circle\n")
    options = ["benchmark.name=mine.txt", "methods=[agent]", "controls=false", "filmstrips=0"]
    result = run("evaluate.py", *options, cwd=tmp_path / "else where")
    assert result.returncode == 0, result.stderr
    (row,) = read_rows(tmp_path / "else where" / "runs" / "evaluate" / "rows.jsonl")
    assert row.prompt == "a red circle"


@pytest.mark.slow
def test_all_methods_and_several_agents_in_one_command(trained, tmp_path):
    shutil.copytree(trained[0] / "agent", tmp_path / "second")
    description = json.loads((tmp_path / "second" / "agent.json").read_text())
    description["training"]["seed"] = 1
    (tmp_path / "second" / "agent.json").write_text(json.dumps(description))
    agents = f"agents=[{trained[0] / 'agent'},{tmp_path / 'second'}]"
    sizes = ["benchmark.limit=8", "num_envs=4", "filmstrips=1", "save_images=false", "tune.limit=7"]
    result = run("evaluate.py", agents, "methods=all", *sizes, f"hydra.run.dir={tmp_path / 'run'}")
    assert result.returncode == 0, result.stderr
    methods = list(dict.fromkeys(row.method for row in read_rows(tmp_path / "run" / "rows.jsonl")))
    assert {"agent-s0", "agent-s1", "agent-s0, mask=full", "sag-10", "pndm-20", "ddim-50"} <= set(methods)
    assert any(name.startswith("threshold:") for name in methods) and "words-auto" not in methods
    assert all(f"{hypothesis}: " in result.stdout for hypothesis in ("H1", "H2", "H3", "H4"))


AUTOMATIC = "words-auto,threshold:auto,random:auto,best-of-auto"
COMPARED = [f"methods=[ddim-2,best-of-2:ddim-2,{AUTOMATIC},agent]", "tune.limit=4"]


def same(rows, others):
    """Rows are equal but for time and memory, which are measured, and the last digits of networks' outputs."""

    def plain(row):
        return replace(row, seconds=0.0, peak_memory=0, scores={}, net_flops=round(row.net_flops))

    ours, theirs = ({row.key: row for row in part} for part in (rows, others))
    assert len(ours) == len(rows) and ours.keys() == theirs.keys()
    for key, row in ours.items():
        assert plain(row) == plain(theirs[key])
        # A row that was missing travelled in another batch, which moves the last digits.
        assert row.scores == pytest.approx(theirs[key].scores, abs=2e-3)


@pytest.fixture(scope="module")
def uninterrupted(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    sizes = ["benchmark.limit=16", "num_envs=3", "filmstrips=0", "threads=1"]
    options = [f"agent={trained[0] / 'agent'}", *COMPARED, *sizes]
    result = run("evaluate.py", *options, f"hydra.run.dir={folder}")
    assert result.returncode == 0, result.stderr
    tuned = json.loads((folder / "tuning.json").read_text())
    rows = read_rows(folder / "rows.jsonl")
    assert {tuned["threshold"], tuned["random"], tuned["words"]} < {row.method for row in rows} | {tuned["words"]}
    return options, rows


@pytest.mark.slow
def test_an_evaluation_killed_ten_times_equals_an_uninterrupted_one(uninterrupted, tmp_path):
    options, whole = uninterrupted
    path, rng, kills = tmp_path / "rows.jsonl", random.Random(0), 0
    command = [sys.executable, str(ROOT / "evaluate.py"), *options, f"hydra.run.dir={tmp_path}"]
    while kills < 10:
        begun = path.stat().st_size if path.exists() else 0
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and (path.stat().st_size if path.exists() else 0) <= begun:
            time.sleep(0.002)  # until it has written a row more
        time.sleep(rng.uniform(0, 0.02))
        assert process.poll() is None, f"it ended before the {kills + 1}th kill: make the run longer"
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert run("evaluate.py", *options, f"hydra.run.dir={tmp_path}").returncode == 0
    same(read_rows(path), whole)
    assert all(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.slow
def test_four_shards_merged_equal_one_run(uninterrupted, tmp_path):
    options, whole = uninterrupted
    options = [*options, "shard.count=4", f"hydra.run.dir={tmp_path}"]
    for index in (2, 0, 3, 1):
        assert run("evaluate.py", *options, f"shard.index={index}").returncode == 0
    merged = run("evaluate.py", *options, "shard.merge=true")
    assert merged.returncode == 0, merged.stderr
    same(read_rows(tmp_path / "rows.jsonl"), whole)


def test_mistakes_are_named(run_here, tmp_path):
    result = run_here("evaluate.py", "agent=/nowhere/agent", f"hydra.run.dir={tmp_path}")
    assert result.returncode != 0 and "/nowhere/agent" in result.stderr and "addiff train" in result.stderr
    result = run_here("train_sb3.py", "+env.kwargs.mask=nose", f"hydra.run.dir={tmp_path}")
    assert result.returncode != 0 and "nose" in result.stderr and "low_attention" in result.stderr
