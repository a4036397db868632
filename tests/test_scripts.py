"""The two scripts as a user runs them: train a little, evaluate the result, kill and go on."""

import subprocess
import sys
from pathlib import Path

import pytest

from addiff_env.agent import Agent
from addiff_env.evaluation.rows import read_rows
from addiff_env.evaluation.runs import read_strips, reported_rows

ROOT = Path(__file__).parent.parent
LITTLE = ["num_envs=4", "algorithm.n_steps=4", "algorithm.batch_size=8", "algorithm.total_timesteps=32"]


def run(script, *overrides):
    command = [sys.executable, str(ROOT / script), *overrides]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def added(settings):
    """Settings of the environment as additions to ``env.kwargs``."""
    return [f"+env.kwargs.{name}={value}" for name, value in settings.items()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_kwargs):
    folder = tmp_path_factory.mktemp("train")
    options = [*LITTLE, *added(small_kwargs), "calibration_steps=3", "progress_bar=false", f"hydra.run.dir={folder}"]
    result = run("train_sb3.py", *options)
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


def test_evaluation_writes_rows_table_and_pictures_and_goes_on_after_a_kill(trained, tmp_path):
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
    assert len(read_strips(tmp_path)) == 2

    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:10]) + lines[10][:40])  # as a kill leaves it
    assert run("evaluate.py", *options, f"hydra.run.dir={tmp_path}").returncode == 0
    again = read_rows(tmp_path / "rows.jsonl")
    assert again[:10] == rows[:10]
    resumed, whole = {row.key: row for row in again}, {row.key: row for row in rows}
    assert resumed.keys() == whole.keys()
    for key, row in whole.items():
        assert (resumed[key].actions, resumed[key].nfe) == (row.actions, row.nfe)
        # What was missing travelled in a smaller batch, which moves the last digits.
        assert resumed[key].scores == pytest.approx(row.scores, abs=1e-2)


def test_shards_merge_into_one_run(trained, tmp_path):
    sizes = ["benchmark.limit=8", "num_envs=4", "filmstrips=0", "save_images=false", "shard.count=2"]
    options = [f"agent={trained[0] / 'agent'}", "methods=[ddim-2,agent]", *sizes, f"hydra.run.dir={tmp_path}"]
    assert run("evaluate.py", *options, "shard.index=0").returncode == 0
    early = run("evaluate.py", *options, "shard.merge=true")
    assert early.returncode != 0 and "1 of 2 shards left no file" in early.stderr
    assert run("evaluate.py", *options, "shard.index=1").returncode == 0
    merged = run("evaluate.py", *options, "shard.merge=true")
    assert merged.returncode == 0, merged.stderr
    rows = read_rows(tmp_path / "rows.jsonl")
    assert len(rows) == 4 * 8 and len({row.key for row in rows}) == 4 * 8
    assert "H4: " in merged.stdout


def test_mistakes_are_named(tmp_path):
    result = run("evaluate.py", "agent=/nowhere/agent", f"hydra.run.dir={tmp_path}")
    assert result.returncode != 0 and "/nowhere/agent" in result.stderr and "make train" in result.stderr
    result = run("train_sb3.py", "+env.kwargs.mask=nose", f"hydra.run.dir={tmp_path}")
    assert result.returncode != 0 and "nose" in result.stderr and "low_attention" in result.stderr
