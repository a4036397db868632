"""Whole runs from a configuration: what they leave behind, and that a killed one goes on as if nothing had happened."""

import json
import os
import pickle
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from models import save
from omegaconf import OmegaConf
from stable_baselines3.common.callbacks import BaseCallback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainings import LITTLE, PROMPTS, ROOT, KillAt, Killed, configure

import addiff_env
from addiff_env.agent import Agent
from addiff_env.env import baseline_cache
from addiff_env.env.baseline_cache import BaselineCache, compute_baselines
from addiff_env.env.prompts import load_prompts
from addiff_env.env.trajectories import record_trajectories
from addiff_env.pipeline import AdaptivePipeline, make_agent_env
from addiff_env.sb3 import command as train_command
from addiff_env.sb3 import held_out
from addiff_env.sb3.checkpoint import FILE, load_checkpoint, random_state, save_checkpoint, set_random_state
from addiff_env.sb3.held_out import HELD_OUT_SEED
from addiff_env.sb3.training import CONFIG_FILE, train, weights_and_biases
from addiff_env.sb3.vec_env import make_lanes
from addiff_env.stats import spread
from addiff_env.storage.files import FolderBusyError, claim
from addiff_env.storage.inputs import flatten

# Everything that has a memory at once.
EVERYTHING = [
    "algorithm=maskable_ppo",
    "algorithm.ent_coef_end=0.001",
    "prompts=curriculum",
    "reward=running",
    "reward.target_nfe=5",
]


class AdvantagesByHand(BaseCallback):
    """Compares every rollout's advantages with the recursion of Schulman et al. 2016 (eq. 16, backwards)."""

    def __init__(self, lambdas):
        super().__init__()
        self.lambdas, self.compared = list(lambdas), 0

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        buffer, lam = self.model.rollout_buffer, self.lambdas.pop(0)
        goes_on = 1 - buffer.episode_starts[1:]
        delta = buffer.rewards[:-1] + goes_on * buffer.values[1:] - buffer.values[:-1]
        for t in reversed(range(len(delta))):
            expected = delta[t] + lam * goes_on[t] * buffer.advantages[t + 1]
            np.testing.assert_allclose(buffer.advantages[t], expected, atol=1e-5)
            self.compared += int(goes_on[t].sum())


def weights(folder):
    return torch.load(folder / FILE, weights_only=True)["policy"]


def scramble():
    """A new process has other random streams."""
    random.seed(77)
    np.random.seed(77)
    torch.manual_seed(77)


@pytest.fixture(autouse=True)
def _collapse_is_no_matter_here():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the policy has collapsed")
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small_kwargs):
    """An uninterrupted run with everything on."""
    folder = tmp_path_factory.mktemp("whole")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the policy has collapsed")
        train(
            configure(small_kwargs, *EVERYTHING), folder, metric=lambda pictures, prompts: {"bright": pictures.mean()}
        )
    return folder


@pytest.mark.parametrize("kills", [[7], [40], [31, 62, 89]], ids=str)
def test_killed_and_resumed_equals_uninterrupted(whole, small_kwargs, tmp_path, kills):
    cfg = configure(small_kwargs, *EVERYTHING)
    for kill in kills:
        with pytest.raises(Killed):
            train(cfg, tmp_path, metric=lambda p, t: {"bright": p.mean()}, callbacks=[KillAt(kill)])
        scramble()
    result = train(cfg, tmp_path, metric=lambda p, t: {"bright": p.mean()})
    assert result.timesteps == 90
    ours, theirs = weights(tmp_path), weights(whole)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    rows = [(folder / "progress.csv").read_text().splitlines() for folder in (tmp_path, whole)]
    assert len(rows[0]) == len(rows[1]) == 8  # a header, six rollouts, none of them twice, and the last look
    assert column(tmp_path, "reward/terminal") == pytest.approx(column(whole, "reward/terminal"), rel=1e-12)
    assert column(tmp_path, "dual/price") == pytest.approx(column(whole, "dual/price"), rel=1e-12)
    assert column(tmp_path, "train/loss") == pytest.approx(column(whole, "train/loss"), rel=1e-12)


def column(folder, name):
    header, *rows = [line.split(",") for line in (folder / "progress.csv").read_text().splitlines()]
    at = header.index(name)
    return [float(row[at]) for row in rows if at < len(row) and row[at]]


def test_a_run_leaves_logs_configuration_and_agent(whole):
    events = EventAccumulator(str(whole)).Reload()
    scalars = set(events.Tags()["scalars"])
    for name in ("episode/nfe_mean", "episode/nfe_std", "action/continue", "action/stop", "action/refine"):
        assert name in scalars
    for name in ("shaping", "instability", "efficiency", "terminal", "fault"):
        assert f"reward/{name}" in scalars
    for name in ("held_out/quality", "held_out/bright", "held_out/nfe_mean", "dual/price", "normalisation/clip_mean"):
        assert name in scalars
    assert {"nfe_by_complexity/1", "curriculum/stage", "collapse/alarm", "train/ent_coef"} <= scalars
    assert events.Tags()["images"] == ["held_out/filmstrips"]
    picture = events.Images("held_out/filmstrips")[-1]
    assert picture.height == pytest.approx(2 * 1.75 * 110, abs=1) and picture.width > 2 * 1.25 * 110  # two strips
    stages = [event.value for event in events.Scalars("curriculum/stage")]
    assert stages == sorted(stages) and stages[0] == 0 and stages[-1] == 2
    entropy = [event.value for event in events.Scalars("train/ent_coef")]
    assert entropy == pytest.approx([0.01 - 0.009 * k / 6 for k in range(6)])
    assert column(whole, "train/gae_lambda") == pytest.approx([0.95 - 0.45 * k / 6 for k in range(6)])

    saved = OmegaConf.load(whole / CONFIG_FILE)
    assert saved.algorithm.name == "maskable_ppo" and saved.reward.target_nfe == 5
    agent = Agent.load(whole / "agent")
    assert agent.config["training"]["timesteps"] == 90 and "bright" in agent.config["training"]["held_out"]
    assert not {"prompts", "device"} & set(agent.config["env"]["kwargs"])  # those are the trainer's own
    assert agent.config["training"]["release"] == addiff_env.__version__
    assert agent.config["reward"]["efficiency"] == pytest.approx(column(whole, "dual/price")[-1])


def test_advantages_follow_the_lambda_of_their_rollout(small_kwargs, tmp_path):
    by_hand = AdvantagesByHand([0.9, 0.75, 0.6, 0.45, 0.3, 0.15])
    cfg = configure(small_kwargs, "algorithm.gae_lambda=0.9", "algorithm.gae_lambda_end=0.0")
    train(cfg, tmp_path, callbacks=[by_hand])
    assert not by_hand.lambdas and by_hand.compared > 20


def test_a_complete_run_is_only_exported_again(whole, small_kwargs):
    before, agent = (whole / "progress.csv").read_text(), Agent.load(whole / "agent")
    agent.config["results"] = {"tiny-test": {"success": 0.5}}  # as addiff_env.evaluation.share leaves it
    agent.save(whole / "agent")
    result = train(configure(small_kwargs, *EVERYTHING), whole, metric=lambda p, t: {"bright": p.mean()})
    assert result.timesteps == 90 and result.agent.fingerprint == agent.fingerprint
    assert len((whole / "progress.csv").read_text().splitlines()) == len(before.splitlines())
    again = Agent.load(whole / "agent")
    assert again.config["results"] == agent.config["results"]  # nothing measured is lost
    assert again.config["training"]["held_out"] == agent.config["training"]["held_out"]
    assert again.config["training"]["seconds"] == agent.config["training"]["seconds"] > 0


def test_the_last_look_is_at_the_policy_that_is_saved(whole, small_kwargs):
    """Played again by hand from the bundle: 90 timesteps are six rollouts, and the last look during them was before."""
    agent = Agent.load(whole / "agent")
    quality = column(whole, "held_out/quality")
    assert len(quality) == 4  # after rollouts 2, 4 and 6, and at the end
    assert agent.config["training"]["held_out"]["quality"] == pytest.approx(quality[-1], abs=1e-4)
    prompts = spread(load_prompts(configure(small_kwargs, *EVERYTHING).prompts.held_out.source), 2)
    lanes = make_lanes("AdDiffusion-Tiny-v0", 2, **small_kwargs | {"reward": agent.config["reward"]})
    record_trajectories(lanes, agent.act, prompts, [HELD_OUT_SEED, HELD_OUT_SEED + 1])
    assert lanes.nfe.mean() == column(whole, "held_out/nfe_mean")[-1]
    assert lanes.reward_score.mean() == pytest.approx(column(whole, "held_out/reward_score")[-1], abs=1e-5)


def test_the_filmstrips_are_of_prompts_from_all_over_the_list(small_kwargs, tmp_path, monkeypatch):
    """The list begins with what needs one object only."""
    seen, draw = [], held_out.filmstrip_figure
    monkeypatch.setattr(held_out, "filmstrip_figure", lambda strips: (seen.append(strips), draw(strips))[1])
    sizes = ["algorithm.total_timesteps=15", "prompts.held_out.number=5", "logging.filmstrips=2"]
    cfg = configure(small_kwargs, *sizes)
    train(cfg, tmp_path)
    prompts = load_prompts(cfg.prompts.held_out.source)
    ((first, _), (last, frames)) = seen[-1]
    assert (first, last) == (prompts[0], prompts[-1])
    lanes = make_lanes("AdDiffusion-Tiny-v0", 1, **small_kwargs)
    agent = Agent.load(tmp_path / "agent")
    (own,) = record_trajectories(lanes, agent.act, [last], [HELD_OUT_SEED + 4])  # the last of five lanes
    assert [frame["action"] for frame in frames] == [frame["action"] for frame in own]
    assert np.abs(frames[-1]["picture"].astype(int) - own[-1]["picture"]).max() <= 1


def test_two_processes_do_not_train_in_one_folder(small_kwargs, tmp_path):
    with claim(tmp_path, "a training"):
        with pytest.raises(FolderBusyError, match="another process") as error:
            train(configure(small_kwargs), tmp_path)
        assert str(tmp_path) in str(error.value)
    code = "import sys, time; from pathlib import Path; from addiff_env.storage.files import claim\n"
    code += "with claim(Path(sys.argv[1]), 'a training'): print('held', flush=True), time.sleep(60)"
    holder = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(holder, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(FolderBusyError, match="another process"), claim(tmp_path, "a training"):
            pass
        process.send_signal(signal.SIGKILL)
    with claim(tmp_path, "a training"):  # a killed process lets go
        pass


def test_the_alarm_ends_a_run_for_good(small_kwargs, tmp_path):
    overrides = ["alarm.window=1", "alarm.share=0.01", "alarm.stop=true"]
    first = train(configure(small_kwargs, *overrides), tmp_path)
    assert first.collapsed and first.timesteps < 90
    again = train(configure(small_kwargs, *overrides), tmp_path)
    assert again.collapsed == first.collapsed and again.timesteps == first.timesteps
    assert again.agent.fingerprint == first.agent.fingerprint


def test_a_rollout_beyond_the_asked_timesteps_does_not_climb_back(small_kwargs, tmp_path):
    """80 timesteps are five rollouts and a third of the sixth: the learning rate ends at 0, not below."""
    train(configure(small_kwargs, "algorithm.total_timesteps=80"), tmp_path)
    rates = column(tmp_path, "train/learning_rate")
    assert rates == pytest.approx([1e-3 * min(1, 1 - 15 * k / 80) for k in range(6)])  # of updates 1 to 6


def test_looks_have_no_part_in_what_is_learned(small_kwargs, tmp_path):
    """Also where a run goes on without them."""
    looking, blind = (
        configure(small_kwargs, "algorithm.total_timesteps=45", f"logging.held_out_every={every}") for every in (1, 0)
    )
    assert train(looking, tmp_path / "often").held_out
    assert not train(blind, tmp_path / "never").held_out
    with pytest.raises(Killed):
        train(looking, tmp_path / "partly", callbacks=[KillAt(20)])
    train(blind, tmp_path / "partly")
    often, never, partly = (weights(tmp_path / name) for name in ("often", "never", "partly"))
    assert all(torch.equal(often[name], never[name]) and torch.equal(often[name], partly[name]) for name in often)


def test_every_stage_of_a_curriculum_has_a_part_in_the_statistics(small_kwargs, tmp_path):
    """Prompts of the first stage alone would leave other text features than those of all."""
    means = []
    for name, prompts in (("full", "full"), ("curriculum", "curriculum"), ("simple", "full")):
        sizes = ["algorithm.total_timesteps=15", "calibration_steps=40", "logging.held_out_every=0"]
        cfg = configure(small_kwargs, f"prompts={prompts}", *sizes)
        if name == "simple":
            cfg.prompts.source = PROMPTS[:2]
        means.append(train(cfg, tmp_path / name).agent.policy.norm.mean)
    assert torch.equal(means[0], means[1]) and not torch.allclose(means[0], means[2], atol=1e-3)


def test_another_configuration_is_refused_with_its_values(whole, small_kwargs):
    with pytest.raises(ValueError, match="resume=false") as error:
        train(configure(small_kwargs, *EVERYTHING, "seed=3", "algorithm.gae_lambda=0.9"), whole)
    assert "algorithm.gae_lambda: 0.95 there, 0.9 now" in str(error.value) and "seed: 0 there, 3 now" in str(
        error.value
    )
    assert "logging" not in str(error.value)


def test_only_a_training_that_begins_takes_the_place_of_another(whole, small_kwargs, tmp_path):
    for name in (FILE, CONFIG_FILE, "progress.csv"):
        shutil.copy(whole / name, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for mistake, complaint in [("algorithm.name=sac", "sac"), ("prompts.held_out.source=no.txt", "no.txt")]:
        with pytest.raises((ValueError, FileNotFoundError), match=complaint):
            train(configure(small_kwargs, "resume=false", mistake), tmp_path)
        assert {name: (tmp_path / name).read_bytes() for name in before} == before
    cfg = configure(small_kwargs, "resume=false", "logging.held_out_every=0")
    with pytest.raises(Killed):
        train(cfg, tmp_path, callbacks=[KillAt(1)])
    assert load_checkpoint(tmp_path / FILE)["num_timesteps"] == 0  # anew
    assert OmegaConf.load(tmp_path / CONFIG_FILE).algorithm.name == "ppo"


@pytest.mark.parametrize("damage", ["truncate", "empty", "text", "version"])
def test_a_damaged_checkpoint_is_named(whole, small_kwargs, tmp_path, damage):
    path, data = tmp_path / FILE, (whole / FILE).read_bytes()
    if damage == "version":
        torch.save({"format_version": 99}, path)
    else:
        path.write_bytes({"truncate": data[: len(data) // 2], "empty": b"", "text": b"hello"}[damage])
    with pytest.raises(ValueError, match=FILE) as error:
        train(configure(small_kwargs, *EVERYTHING), tmp_path)
    assert "resume=false" in str(error.value) or "99" in str(error.value)


class Sing:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("how", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_checkpoint_is_never_unpickled(tmp_path, how):
    sung = tmp_path / "sung"
    how({"format_version": 1, "evil": Sing(sung)}, tmp_path / FILE)
    with pytest.raises(ValueError, match=FILE):
        load_checkpoint(tmp_path / FILE)
    assert not sung.exists()
    if how is torch.save:
        torch.load(tmp_path / FILE, weights_only=False)
        assert sung.exists()  # it does sing where it is trusted


def test_an_interrupted_save_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / FILE, {"value": 1}, "a: 1")

    def half(value, file):
        file.write_bytes(b"PK half a file")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(tmp_path / FILE, {"value": 2}, "a: 1")
    assert load_checkpoint(tmp_path / FILE)["value"] == 1
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_what_could_not_be_read_back_is_not_written(tmp_path):
    save_checkpoint(tmp_path / FILE, {"value": (np.float64(2.5), None), "betas": {1: True}}, "a: 1")
    assert load_checkpoint(tmp_path / FILE)["value"] == [2.5, None]
    with pytest.raises(TypeError, match="PosixPath"):
        save_checkpoint(tmp_path / FILE, {"value": [tmp_path]}, "a: 1")
    assert load_checkpoint(tmp_path / FILE)["betas"] == {1: True}


def test_random_streams_are_restored():
    scramble()
    np.random.normal()  # leaves half of a pair waiting
    state = random_state()

    def draw():
        return random.random(), random.gauss(0, 1), np.random.normal(), np.random.rand(), torch.rand(3).tolist()

    first = draw()
    set_random_state(state)
    assert draw() == first


def test_baselines_and_reward_weights_come_from_the_configuration(small_kwargs, tmp_path):
    lanes = make_lanes("AdDiffusion-Tiny-v0", 1, **small_kwargs | {"prompts": PROMPTS})
    compute_baselines(tmp_path / "b.jsonl", lanes, 3, PROMPTS, [0])
    options = [f"reward.baselines={tmp_path / 'b.jsonl'}", "+reward.weights.efficiency=0.5", "logging.held_out_every=0"]
    result = train(configure(small_kwargs, *options, "algorithm.total_timesteps=15"), tmp_path / "run")
    reward = result.agent.config["env"]["kwargs"]["reward"]
    assert reward["efficiency"] == 0.5 and reward["clip_mean"] == 0.64  # over the id's own preset
    assert result.held_out == {}


def test_baselines_must_cover_every_prompt_before_the_run_begins(small_kwargs, tmp_path, monkeypatch):
    path = tmp_path / "b.jsonl"
    options = [f"reward.baselines={path}", "logging.held_out_every=0", "algorithm.total_timesteps=15"]
    with pytest.raises(FileNotFoundError, match=f"no baselines '{path}'") as error:
        train(configure(small_kwargs, *options), tmp_path / "run")
    scored = {}
    with monkeypatch.context() as patch:
        patch.setattr(
            baseline_cache, "compute_baselines", lambda path, env, *_: scored.update(env=env) or BaselineCache({})
        )
        baseline_cache.main(shlex.split(str(error.value).split("make them with: ")[1])[2:])
    assert scored["env"].config.model == small_kwargs["model"] and scored["env"].prompts == PROMPTS
    lanes = make_lanes("AdDiffusion-Tiny-v0", 1, **small_kwargs | {"prompts": PROMPTS})
    compute_baselines(path, lanes, 3, PROMPTS[:1], [0])
    with pytest.raises(ValueError, match=f"3 of 4 prompts have no baseline in {path}, e.g. 'a star'") as error:
        train(configure(small_kwargs, *options), tmp_path / "run")
    command = shlex.split(str(error.value).split("add them with: ")[1])
    assert command[:2] == ["addiff", "baselines"]
    baseline_cache.main(command[2:])  # what it says does help
    train(configure(small_kwargs, *options), tmp_path / "run")
    discounted = ["algorithm.gamma=0.9", "+reward.weights.gamma=0.9"]
    with pytest.raises(ValueError, match="baselines need gamma 1, got 0.9"):
        train(configure(small_kwargs, *options, *discounted), tmp_path / "discounted")


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["+env.kwargs.reward={terminal: 2}"], "reward.weights"),
        (["+env.kwargs.prompts=[a]"], "prompts.source"),
        (["algorithm.gamma=0.9"], "0.9.*1.0"),
        (["algorithm.name=sac"], "'sac'.*maskable_ppo"),
        (["reward.normalisation=batch"], "'batch'.*running"),
        (["logging.formats=[paper]"], "'paper'"),
        (["alarm.share=1.5"], "1.5"),
        (["reward.target_nfe=-2"], "-2"),
        (["+env.kwargs.price_range=[0.001,0.01]"], "set reward.price_range instead"),
    ],
)
def test_mistakes_are_named(small_kwargs, tmp_path, overrides, complaint):
    with pytest.raises(ValueError, match=complaint):
        train(configure(small_kwargs, *overrides), tmp_path)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["prompts.held_out.source=[a red circle,a cat on a mat]"], "'a cat on a mat'"),
        (["+env.kwargs.height=128"], "64x64, these have 128x64, e.g. of '.*'"),
        (["prompts.held_out.source=[a cat]", "logging.held_out_every=0"], None),
        (["prompts.held_out.source=[a red circle]"], None),
        ([], None),
    ],
)
def test_what_the_checker_cannot_judge_is_said_before_training(overrides, complaint):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", overrides)
    with pytest.warns(UserWarning, match=complaint) if complaint else nullcontext():
        metric = train_command.success_metric(cfg)
    assert metric is (None if complaint else train_command.success_share)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        assert train_command.success_metric(compose("train", ["env=sd15"])) is None


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("algorithm.total_timesteps=0", "total_timesteps must be at least 1, got 0"),
        ("algorithm.total_timesteps=-5", "total_timesteps .* got -5"),
        ("algorithm.total_timesteps=nan", "total_timesteps .* got nan"),
        ("algorithm.total_timesteps=10k", "total_timesteps .* got '10k'"),
        ("reward.target_nfe=few", "target_nfe must be .* got 'few'"),
        ("policy.hidden=0", "policy.hidden must be at least 1, got 0"),
        ("policy.hidden=-3", "policy.hidden .* got -3"),
        ("policy.action_bias=[0,0]", "policy.action_bias must be .*three"),
        ("algorithm.learning_rate=nan", "learning_rate must be .* got nan"),
        ("algorithm.gae_lambda_end=2", "gae_lambda_end must be .* got 2"),
        ("calibration_steps=0", "calibration_steps must be at least 1, got 0"),
        ("reward.target_nfe=true", "target_nfe .* got True"),
        ("reward.price_range=[0.01,0.001]", r"price_range must be .* got \[0.01, 0.001\]"),
        ("reward.price_range=0.004", "price_range must be .* got 0.004"),
        ("reward={price_range: [0.001, 0.01], target_nfe: 5}", "target_nfe=5 searches one price.*0.01. draws many"),
    ],
)
def test_numbers_are_checked_before_models_are_loaded(small_kwargs, tmp_path, override, complaint):
    with pytest.raises(ValueError, match=complaint):
        train(configure(small_kwargs | {"model": "/nowhere"}, override), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def script_on(settings):
    """The command that trains on the environment and prompts of ``settings``."""
    command = [sys.executable, str(ROOT / "train_sb3.py"), *LITTLE, "threads=1"]
    command += [f"+env.kwargs.{name}={value}" for name, value in settings.env.kwargs.items()]
    return [*command, f"prompts.source={json.dumps(PROMPTS)}"]


def test_a_sweep_trains_what_single_runs_would(small_kwargs, tmp_path):
    """In a folder of its preset; nothing of a training is left for the next one in the same process."""
    alike = ["algorithm.total_timesteps=30", "logging.formats=[csv]"]
    command = [*script_on(configure(small_kwargs)), *alike, "seed=0,1", "hydra.sweep.subdir=${seed}", "-m"]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    for seed in (0, 1):
        train(configure(small_kwargs, *alike, "threads=1", f"seed={seed}"), alone := tmp_path / f"alone-{seed}")
        swept = tmp_path / "runs" / "sweep" / "tiny" / str(seed)
        assert Agent.load(swept / "agent").fingerprint == Agent.load(alone / "agent").fingerprint


@pytest.mark.slow
def test_killed_with_signal_9_twenty_times(small_kwargs, tmp_path):
    """Real kills of the real script, at random moments of rollouts, updates and saves; the result is the same."""
    settings = configure(small_kwargs, *EVERYTHING)
    command = [*script_on(settings), *EVERYTHING, "algorithm.total_timesteps=1500"]
    options = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "stdout": subprocess.DEVNULL}
    whole, run = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, f"hydra.run.dir={whole}"], check=True, **options)
    rng, command = random.Random(0), [*command, f"hydra.run.dir={run}"]
    for kill in range(20):
        before = stamp(run / FILE)
        process = subprocess.Popen(command, **options)
        while process.poll() is None and stamp(run / FILE) == before:
            time.sleep(0.002)  # until it has gone on
        time.sleep(rng.uniform(0, 1))
        assert process.poll() is None, f"it ended by itself, with {process.returncode}, before kill {kill + 1}"
        process.send_signal(signal.SIGKILL)
        process.wait()
        load_checkpoint(run / FILE)  # readable at every moment
    subprocess.run(command, check=True, **options)
    ours, theirs = weights(run), weights(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert Agent.load(run / "agent").fingerprint == Agent.load(whole / "agent").fingerprint
    assert column(run, "reward/terminal") == pytest.approx(column(whole, "reward/terminal"), rel=1e-12)


def stamp(path):
    return path.stat().st_mtime_ns if path.exists() else 0


def test_weights_and_biases_mirrors_tensorboard(small_kwargs, tmp_path, monkeypatch):
    """A stand-in for the package sees the run folder, the configuration and the wish to mirror TensorBoard."""
    seen = {}

    @contextmanager
    def init(**options):
        seen.update(options)
        yield

    cfg = configure(small_kwargs, "logging=wandb", "logging.wandb.project=mine")
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with weights_and_biases(cfg, tmp_path):
        pass
    assert seen["sync_tensorboard"] and seen["project"] == "mine" and seen["dir"] == str(tmp_path)
    assert seen["config"]["algorithm"]["name"] == "ppo" and seen["resume"] == "allow"
    first = seen["id"]
    with weights_and_biases(cfg, tmp_path, fresh=False):
        assert seen["id"] == first  # a resumed run is the same run
    with weights_and_biases(cfg, tmp_path, fresh=True):
        assert seen["id"] != first  # one that starts anew in the same folder is not
    own = {"dir": "/elsewhere", "id": "mine", "resume": "never", "mode": "offline"}
    chosen = configure(
        small_kwargs, "logging=wandb", *(f"+logging.wandb.{name}={value}" for name, value in own.items())
    )
    with weights_and_biases(chosen, tmp_path):
        assert own.items() <= seen.items()
    for fixed in ("config={a: 1}", "sync_tensorboard=false"):
        refused = configure(small_kwargs, "logging=wandb", f"+logging.wandb.{fixed}")
        with pytest.raises(ValueError, match="logging.wandb." + fixed[:6]), weights_and_biases(refused, tmp_path):
            pass
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"), weights_and_biases(cfg, tmp_path):
        pass


@pytest.mark.filterwarnings("ignore:the tokenizer does not know", "ignore:prompt truncated")
@pytest.mark.parametrize(("env", "kind"), [("sd15", "sd"), ("sdxl", "sdxl"), ("flux_schnell", "flux")])
def test_every_preset_trains(env, kind, tmp_path):
    """A rollout and an update on a small model of the preset's layout; the encoders are the embedded world's."""
    folder = save(kind, tmp_path / "model")
    size = {"model": folder, "height": 64, "width": 64, "device": "cpu", "dtype": "float32", "preview": "latent_rgb"}
    looks = {name: addiff_env.TINY[name] for name in ("clip", "dino", "scorer")}
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        little = [text for text in LITTLE if not text.startswith("algorithm.total")]
        cfg = compose("train", [f"env={env}", *little, "algorithm.total_timesteps=15", "logging.held_out_every=1"])
    OmegaConf.set_struct(cfg, False)
    steps = {} if env == "flux_schnell" else {"num_inference_steps": 6, "max_nfe": 12}
    cfg.env.kwargs = {**cfg.env.kwargs, **{n: str(v) if n == "model" else v for n, v in size.items()}, **looks, **steps}
    result = train(cfg, tmp_path / "run")
    assert result.timesteps == 15 and result.held_out["nfe_mean"] >= 1
    agent = Agent.load(tmp_path / "run" / "agent")
    made = AdaptivePipeline(make_agent_env(agent, 2, device="cpu"), agent)(["a red apple", "two cats"], seeds=[1, 2])
    assert [picture.size for picture in made.images] == [(64, 64)] * 2
    assert EventAccumulator(str(tmp_path / "run")).Reload().Tags()["images"] == ["held_out/filmstrips"]


@pytest.mark.parametrize("env", sorted(path.stem for path in (ROOT / "configs" / "env").glob("*.yaml")))
def test_every_preset_resolves_to_its_own_values(env):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", [f"env={env}"])
    own = OmegaConf.load(ROOT / "configs" / "env" / f"{env}.yaml")
    for name, value in flatten(OmegaConf.to_container(own)).items():
        if not name.startswith("defaults"):  # what train.yaml says itself would win over the preset
            assert OmegaConf.select(cfg, name) == value, name
    assert cfg.env.id.startswith("AdDiffusion-") and "???" not in OmegaConf.to_yaml(cfg, resolve=True)
    assert cfg.num_envs * cfg.algorithm.n_steps % cfg.algorithm.batch_size == 0  # no truncated mini-batch


PRICED = [
    "algorithm=maskable_ppo",
    "algorithm.total_timesteps=45",
    "prompts=curriculum",
    "reward.price_range=[0.001,0.016]",
]


@pytest.fixture(scope="module")
def priced(tmp_path_factory, small_kwargs):
    """An uninterrupted run with a range of prices."""
    folder = tmp_path_factory.mktemp("priced")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the policy has collapsed")
        result = train(configure(small_kwargs, *PRICED), folder, lambda images, prompts: {"bright": images.mean()})
    return folder, result


def test_a_run_with_prices_goes_on_as_if_nothing_had_happened(priced, small_kwargs, tmp_path):
    with pytest.raises(Killed):
        train(configure(small_kwargs, *PRICED), tmp_path, callbacks=[KillAt(22)])
    scramble()
    train(configure(small_kwargs, *PRICED), tmp_path)
    for name, value in weights(priced[0]).items():
        assert torch.equal(weights(tmp_path)[name], value), name


def test_looks_are_at_prices_across_the_range(priced):
    folder, result = priced
    prices = [f"price_{price}/" for price in ("0.001", "0.004", "0.016")]
    for name in ("quality", "nfe_mean", "bright"):
        each = [result.held_out[price + name] for price in prices]
        assert result.held_out[name] == pytest.approx(np.mean(each))
    logged = EventAccumulator(str(folder)).Reload().Tags()["scalars"]
    assert {"held_out/price_0.004/nfe_mean", "nfe_by_price/low", "nfe_by_price/high"} <= set(logged)


def test_an_agent_for_many_prices_says_so(priced):
    agent = Agent.load(priced[0] / "agent")
    assert agent.price_range == (0.001, 0.016) and agent.config["observation"]["price"] == 1
    made = AdaptivePipeline(make_agent_env(agent, 1), agent)("a star", 3, price=0.004)
    assert made.price == [0.004]
    assert AdaptivePipeline(make_agent_env(agent, 1), agent)("a star", 3).price == [0.004]


def test_a_setting_that_is_null_and_one_that_is_not_there_are_the_same(whole, small_kwargs, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    state = load_checkpoint(tmp_path / "run" / FILE)
    before = OmegaConf.create(state.pop("config"))
    del before.reward.price_range, state["format_version"]
    save_checkpoint(tmp_path / "run" / FILE, state, OmegaConf.to_yaml(before), state.pop("inputs"))
    assert train(configure(small_kwargs, *EVERYTHING), tmp_path / "run").timesteps == 90
