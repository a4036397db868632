"""Every program that writes in a folder: refused where another is at work, named for what it does, ended by Ctrl-C."""

import os
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from composed import rllib_config
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from processes import everything, held

from addiff_env import cli, offline
from addiff_env.env import baseline_cache
from addiff_env.evaluation import share
from addiff_env.evaluation.report import html
from addiff_env.evaluation.run import runner
from addiff_env.evaluation.vlm_judge import judging
from addiff_env.rllib import training as rllib_training
from addiff_env.sb3 import command as train_command
from addiff_env.sb3 import search
from addiff_env.storage.files import FolderBusyError
from addiff_env.storage.hydra_app import sweep_folder

PARSER = OverridesParser.create()
ROOT = Path(__file__).resolve().parents[3]


def run(verb, monkeypatch, *overrides):
    """A verb as the command line calls it; its exit status."""
    monkeypatch.setattr(sys, "argv", ["addiff", verb, *overrides])
    monkeypatch.setattr(sys, "orig_argv", ["python", "bin/addiff", verb, *overrides])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # as the command sets it, for this test alone
    try:
        return cli.main()
    except SystemExit as ended:
        return ended.code or 0


@pytest.fixture
def folder(tmp_path):
    """A run folder with a blank, as another process has left it so far."""
    folder = tmp_path / "a run"
    for name in ("rows.jsonl", "config.yaml", "tuning.json", "methods.json", "items.jsonl", ".hydra/overrides.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    return folder


def in_folder(path):
    return f"hydra.run.dir='{path}'"


# --------------------------------------------------------------------------- two programs


@pytest.mark.parametrize("script", ["evaluate", "train"])
@pytest.mark.parametrize("flags", [(), ("-m", "hydra.sweep.subdir=.")])
def test_a_script_is_refused_where_another_is_at_work(script, flags, folder, monkeypatch, capsys):
    place = in_folder(folder) if not flags else f"hydra.sweep.dir='{folder}'"
    if flags:
        (folder / "multirun.yaml").write_text("")  # of every sweep's, and Hydra's own
    with held("claim", folder, "evaluate.py"):
        before = everything(folder)
        assert run(script, monkeypatch, *flags, place) != 0
        after = everything(folder)
        assert {path: after[path] for path in before if path.name != "multirun.yaml"} == {
            path: state for path, state in before.items() if path.name != "multirun.yaml"
        }
        assert set(after) == set(before)
    said = capsys.readouterr().err
    assert str(folder) in said and "hydra.run.dir" in said and "evaluate.py, process" in said


def test_shards_of_one_split_work_side_by_side_and_nothing_else(folder, monkeypatch):
    begun = []
    monkeypatch.setattr(runner, "run", lambda cfg, folder, place, launched: begun.append((place, launched)))
    split = ["shard.count=4", in_folder(folder)]
    with held("claim", folder, "evaluate.py", "shards of 4", "1"):
        assert run("evaluate", monkeypatch, "shard.index=0", *split) == 0
        with monkeypatch.context() as launched:
            launched.setenv("RANK", "2")
            launched.setenv("WORLD_SIZE", "4")
            assert run("evaluate", launched, in_folder(folder)) == 0
        assert begun == [((0, 4), False), ((2, 4), True)]
        for others in (["shard.index=1"], ["shard.merge=true"], ["shard.index=1", "shard.count=5"], ["shard.count=1"]):
            assert run("evaluate", monkeypatch, *split, *others) != 0
    assert len(begun) == 2
    assert run("evaluate", monkeypatch, "shard.index=1", *split) == 0  # whose process was killed


def programs(folder, tmp_path, monkeypatch):
    """What else writes in a folder, as calls, with what each of them writes to."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setattr(rllib_training, "require_ray", lambda: None)
    space = ["--space", str(ROOT / "configs/search/ppo.yaml"), "--configs", str(ROOT / "configs")]
    return {
        "html": ("claim", folder, lambda: html.main([str(folder)])),
        "judging": ("claim", folder, lambda: judging.main([str(folder), "--judges", "x"])),
        "rllib": ("claim", folder, lambda: rllib_training.train(rllib_config(), folder)),
        "search": ("claim", folder, lambda: search.main([str(folder), "--seed", "3", *space])),
        "baselines": (
            "claim_file",
            tmp_path / "b.jsonl",
            lambda: baseline_cache.compute_baselines(tmp_path / "b.jsonl", None, 2, [], []),
        ),
        "offline": ("claim_file", tmp_path / "minari" / "own" / "data-v0", lambda: offline.main(["own/data-v0"])),
    }


@pytest.mark.parametrize("name", ["html", "judging", "rllib", "search", "baselines", "offline"])
def test_every_other_program_is_refused_too(name, folder, tmp_path, monkeypatch, capsys):
    kind, place, program = programs(folder, tmp_path, monkeypatch)[name]
    with held(kind, place, "another one"):
        before = everything(tmp_path)
        with pytest.raises((FolderBusyError, SystemExit)) as refused:
            program()
        assert "another one, process" in str(refused.value) + capsys.readouterr().err
        assert everything(tmp_path) == before


def test_workers_of_a_search_are_told_apart_by_their_seeds(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "_work", lambda *_: None)
    with held("claim", folder, "a search's worker", "workers", "3"):
        search.main([str(folder), "--seed", "4"])
        search.main([str(folder)])
        with pytest.raises(FolderBusyError, match="--seed"):
            search.main([str(folder), "--seed", "3"])


def test_results_are_recorded_by_one_process_at_a_time(tmp_path, monkeypatch):
    bundle = tmp_path / "agent"
    share.Agent.load(ROOT / "addiff_env/tiny/weights/agent").save(bundle)
    monkeypatch.setattr(share, "measured", lambda agent, evaluation: {evaluation.name: {"success": 0.5}})
    with held("claim", bundle, "share"):
        before = everything(tmp_path)
        assert cli.main(["share", str(bundle), "--evaluation", str(tmp_path / "x")]) == 1
        assert everything(tmp_path) == before
    assert share.main([str(bundle), "--evaluation", str(tmp_path / "x")]) == 0
    assert share.Agent.load(bundle).config["results"] == {"x": {"success": 0.5}}


# --------------------------------------------------------------------------- sweeps

KEYS = st.from_regex(r"\A\+?[a-z_]{1,8}(\.[a-z_]{1,8}){0,2}\Z")
VALUES = st.text(st.sampled_from("ab01_-./=+ ,[]{}'\"é"), max_size=12)
OVERRIDES = st.dictionaries(KEYS, VALUES, min_size=1, max_size=14).map(
    lambda chosen: [f"{name}={value}" for name, value in chosen.items()]
)


@settings(max_examples=50)
@given(st.lists(OVERRIDES, min_size=2, max_size=4, unique_by=lambda words: tuple(sorted(words))))
@example([["a=b_c-d"], ["a=b", "c=d"], ["a=b_c", "d=e"], ["a=b", "c_d=e"]])
@example([["p=a/b"], ["p=a_b"], ["p=a-b"], ["p=../b"], ["p='a b'"], ["p=[1,2]"], ["p=x=y"]])
def test_other_overrides_have_other_folders_and_the_same_ones_the_same(jobs):
    names = [sweep_folder(job) for job in jobs]
    assert len(set(names)) == len(jobs) and names == [sweep_folder(job[::-1]) for job in jobs]
    for name in names:
        assert len(name.encode()) <= 143 and Path(name).name == name
        assert PARSER.parse_override(f"agent=runs/{name}/agent").value() == f"runs/{name}/agent"


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["seed=0"], "seed-0"),
        (["seed=1", "algorithm.learning_rate=1e-3"], "algorithm.learning_rate-1e-3_seed-1"),
        (["seed=0", "env=flux_schnell"], None),
        (["algorithm=maskable_ppo"], "algorithm-maskable_ppo"),
        (["seed=0", "resume=false"], "seed-0"),
        ([], "defaults"),
    ],
)
def test_usual_folders_can_be_read(overrides, name):
    found = sweep_folder(overrides, ["resume"])
    assert found == name or (name is None and found.startswith("env-flux_schnell_seed-0."))


MANY = [
    "algorithm.learning_rate=0.0003,0.0007",
    "algorithm.n_epochs=3",
    "algorithm.ent_coef=0.003",
    "algorithm.ent_coef_end=0.0001",
    "algorithm.gae_lambda=0.93",
    "algorithm.gae_lambda_end=0.52",
    "algorithm.clip_range=0.25",
    "algorithm.total_timesteps=64512",
    "algorithm.max_grad_norm=0.7",
    "policy.action_bias=[2.2,-1.4,-0.6]",
    "prompts.source='data/my prompts (a=b).txt'",
    "+env.kwargs.renoise='relative:0.5'",
    "+reward.weights.efficiency=0.004",
    "calibration_steps=36",
]


def test_a_sweep_over_many_overrides_finds_its_folders_again(tmp_path, monkeypatch, capsys):
    trained = []

    def train(cfg, run, metric):
        trained.append(run)
        return SimpleNamespace(collapsed=None, agent=SimpleNamespace(fingerprint="f", price_range=None))

    monkeypatch.setattr(train_command, "train", train)
    monkeypatch.setattr(train_command, "success_metric", lambda cfg: None)
    command = ["-m", f"hydra.sweep.dir='{tmp_path}/a sweep'", *MANY]
    assert run("train", monkeypatch, *command) == 0
    assert run("train", monkeypatch, *command, "resume=true") == 0
    assert len(set(trained)) == 2 and trained[:2] == trained[2:]
    assert all(path.is_dir() and path.parent == tmp_path / "a sweep" for path in trained)
    looks = re.findall(r"\(TensorBoard: (.*)\)$", capsys.readouterr().out, re.MULTILINE)
    assert [shlex.split(look) for look in looks] == [["tensorboard", "--logdir", str(path)] for path in trained]


# --------------------------------------------------------------------------- Ctrl-C


@pytest.mark.parametrize("resume", [True, False])
def test_an_interrupted_training_says_how_to_go_on(resume, folder, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_command, "train", interrupt)
    monkeypatch.setattr(train_command, "success_metric", lambda cfg: None)
    given = [in_folder(folder), f"resume={str(resume).lower()}"]
    assert run("train", monkeypatch, *given) == 130
    said = capsys.readouterr().err
    again = shlex.split(said.partition("go on with: ")[2])
    assert again == ["bin/addiff", "train", *given, *([] if resume else ["resume=true"])]
    assert f"no checkpoint yet in {folder}" in said and "Traceback" not in said


def test_an_interrupted_evaluation_says_what_it_kept(folder, monkeypatch, capsys):
    def interrupt(*_):
        (folder / "rows.jsonl").write_bytes(b"{}\n{}\n{")
        raise KeyboardInterrupt

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(runner, "run", interrupt)
    assert run("evaluate", monkeypatch, in_folder(folder)) == 130
    said = capsys.readouterr().err
    assert f"2 rows are kept in {folder / 'rows.jsonl'}" in said and "Traceback" not in said
    assert shlex.split(said.partition("go on with: ")[2]) == ["bin/addiff", "evaluate", in_folder(folder)]
    assert [path for path in os.listdir(folder) if "held" in path] == []
