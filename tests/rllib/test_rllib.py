"""RLlib's side of the environment; the training itself needs Ray, which has an environment of its own."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium.wrappers.vector import DictInfoToList

from addiff_env import rllib
from addiff_env.agent import Agent, PolicyNet
from addiff_env.pipeline import AdaptivePipeline
from addiff_env.rllib import checkpoint
from addiff_env.rllib.__main__ import build_parser, main
from addiff_env.rllib.lanes import Survey, survey
from addiff_env.rllib.settings import claim, share_gpus
from addiff_env.rllib.training import Progress, bundle

ID = "AdDiffusion-Tiny-v0"
HAS_RAY = importlib.util.find_spec("ray") is not None


def test_lanes_are_as_an_env_runner_takes_them(small_kwargs):
    """Infos split into one dictionary per lane, and an ended lane restarts in the next step."""
    env = DictInfoToList(rllib.make_lanes({"id": ID, "kwargs": small_kwargs, "num_envs": 2}))
    observations, infos = env.reset(seed=3)
    assert observations.shape[0] == len(infos) == env.num_envs == 2
    assert {"prompt", "nfe", "action_mask"} <= set(infos[0])
    _, _, ended, _, infos = env.step(np.array([1, 0]))
    assert ended.tolist() == [True, False] and infos[1]["nfe"] == 3
    _, reward, ended, _, infos = env.step(np.array([0, 0]))
    assert not ended.any() and reward[0] == 0 and infos[0]["nfe"] == 2  # warm-up of the new episode


def test_a_survey_calibrates_and_describes(small_kwargs, small_looks):
    kwargs = {name: value for name, value in small_kwargs.items() if name not in small_looks}  # trained ones' features
    context = {"id": ID, "kwargs": kwargs, "num_envs": 4}
    seen = survey(context, steps=6, seed=0)
    observations, _ = rllib.make_lanes(context).reset(seed=0)
    assert sum(seen.norm.parts.values()) == observations.shape[1]
    assert seen.norm.mean.abs().sum() > 0 and (seen.norm.scale == 0).any()  # quality slots that never vary
    assert seen.backbone == {"model": small_kwargs["model"], "revision": None, "dtype": "float32"}
    assert seen.reward["gamma"] == 1
    assert torch.equal(survey(context, steps=6, seed=0).norm.mean, seen.norm.mean)
    weighed = survey(context, 6, 0, {"quality": 3.0}).norm.scale / seen.norm.scale
    parts = dict(zip(seen.norm.parts, weighed.split(list(seen.norm.parts.values())), strict=True))
    assert all(part.nanmean() == pytest.approx(3.0 if name == "quality" else 1.0) for name, part in parts.items())
    with pytest.raises(ValueError, match="gains .* got {'colour': 2}"):
        survey(context, steps=1, seed=0, gains={"colour": 2})
    with pytest.raises(ValueError, match="obs_mode 'flat'.*'dict'"):
        survey({**context, "kwargs": {**small_kwargs, "obs_mode": "dict"}}, steps=1, seed=0)


# --------------------------------------------------------------------------- settings


def test_batch_sizes():
    settings = rllib.Settings(num_env_runners=3, num_envs_per_runner=4, steps_per_lane=5)
    assert settings.train_batch_size == 60
    assert rllib.Settings(num_env_runners=0, num_envs_per_runner=4, steps_per_lane=5).train_batch_size == 20


def test_every_setting_is_an_option():
    words = ["--learning-rate", "3e-4", "--hidden", "64", "--gpus-per-runner", "0.5", "--action-bias", "1", "-1", "0"]
    words += ["--gains", '{"quality": 3}', "--gae-lambda", "0.9"]
    options = vars(build_parser().parse_args(["runs/x", *words, "--kwargs", '{"mask": "full"}']))
    settings = rllib.Settings(**{name: value for name, value in options.items() if hasattr(rllib.Settings(), name)})
    changed = {"learning_rate": 3e-4, "hidden": 64, "gpus_per_runner": 0.5, "action_bias": [1, -1, 0]}
    changed |= {"gains": {"quality": 3}, "gae_lambda": 0.9}
    assert settings == replace(rllib.Settings(), env_kwargs={"mask": "full"}, **changed)


@pytest.mark.parametrize(
    ("runners", "asked", "nodes", "share"),
    [
        (8, None, [(64, 4), (64, 4)], 1),
        (2, None, [(64, 8)], 1),  # never more than one
        (3, None, [(64, 2)], 0.5),  # not 2/3, of which one GPU holds only one
        (7, None, [(64, 1)], 0.1428),
        (4, None, [(4, 0)], 0),
        (4, 0.25, [(4, 1)], 0.25),
        (3, 0.3, [(4, 1)], 0.3),
        (2, 2.0, [(4, 2), (4, 2)], 2),
        (0, 5.0, [(1, 0)], 0),
    ],
)
def test_gpus_are_shared_out_evenly(runners, asked, nodes, share):
    settings = rllib.Settings(num_env_runners=runners, gpus_per_runner=asked)
    assert share_gpus(settings, [{"CPU": cpus, "GPU": gpus} for cpus, gpus in nodes]) == share


@pytest.mark.parametrize(
    ("runners", "asked", "nodes", "message"),
    [
        (3, 0.6, [(64, 2)], "3 env runners with 1 CPU and 0.6 GPUs each: there is room for 2 on 1 node.* 2 GPUs"),
        (2, 1.0, [(64, 0)], "room for 0 on 1 node"),
        (2, 4.0, [(64, 3), (64, 5)], "room for 1 on 2 node"),
        (3, None, [(2, 0)], "3 env runners.* room for 2 .* 2 CPUs"),
    ],
)
def test_runners_that_do_not_fit_are_refused(runners, asked, nodes, message):
    settings = rllib.Settings(num_env_runners=runners, gpus_per_runner=asked)
    with pytest.raises(ValueError, match=message):
        share_gpus(settings, [{"CPU": cpus, "GPU": gpus} for cpus, gpus in nodes])


def test_a_folder_keeps_its_settings(tmp_path):
    claim(tmp_path, rllib.Settings(seed=1))
    claim(tmp_path, rllib.Settings())  # nothing was trained yet
    (tmp_path / "checkpoint").mkdir()
    claim(tmp_path, rllib.Settings())
    with pytest.raises(ValueError, match=r"\(hidden: 128 there, 64 now; env_kwargs.mask: nothing there, full now\)"):
        claim(tmp_path, rllib.Settings(hidden=64, env_kwargs={"mask": "full"}))
    written = json.loads((tmp_path / "settings.json").read_text())
    assert written.pop("hidden") == 128
    (tmp_path / "settings.json").write_text(json.dumps(written))  # by a version without that setting
    claim(tmp_path, rllib.Settings())


# --------------------------------------------------------------------------- files


class Killed(Exception):
    """The process ends here."""


@pytest.mark.parametrize("moment", range(5))
def test_a_kill_at_any_moment_leaves_a_checkpoint(tmp_path, monkeypatch, moment):
    """Before each change that saving makes to the disk, and after the last."""
    left = moment

    def counted(change):
        def run(*arguments, **options):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return change(*arguments, **options)

        return run

    def write(text):
        return lambda folder: (Path(folder).mkdir(), Path(folder, "a").write_text(text))

    checkpoint.save(tmp_path, write("first"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", counted(Path.write_text))  # killed here, the new folder is not whole
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        try:
            checkpoint.save(tmp_path, write("second"))
        except Killed:
            pass
    found = checkpoint.find(tmp_path)
    assert (found / "a").read_text() == ("first" if moment < 2 else "second")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    checkpoint.save(tmp_path, write("third"))
    assert (checkpoint.find(tmp_path) / "a").read_text() == "third"


def test_only_a_whole_checkpoint_is_one(tmp_path):
    assert checkpoint.find(tmp_path) is None
    (tmp_path / "checkpoint.new").mkdir()  # the first one, killed while it was written
    assert checkpoint.find(tmp_path) is None and not list(tmp_path.iterdir())
    (tmp_path / "checkpoint.old").mkdir()
    assert checkpoint.find(tmp_path) == tmp_path / "checkpoint"


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # TensorBoard's own
def test_progress_goes_on_after_the_checkpoint(tmp_path):
    progress = Progress(tmp_path, 0)
    assert progress.add(1, {"nfe": float("nan")}) == {}  # no episode has ended
    progress.add(2, {"nfe": 7.0})
    with progress.path.open("a") as file:
        file.write('{"iteration": 3, "nf')  # killed
    Progress(tmp_path, 2).add(3, {"nfe": 6.0, "episode_return_mean": 0.5})
    rows = [json.loads(line) for line in progress.path.read_text().splitlines()]
    assert rows == [
        {"iteration": 1},
        {"iteration": 2, "nfe": 7},
        {"iteration": 3, "nfe": 6, "episode_return_mean": 0.5},
    ]
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_a_bundle_leaves_the_trainers_prompts_and_device_out():
    """Neither its environment nor the settings it was trained with name them."""
    policy = PolicyNet({"quality": 8}, 4)
    weights = {f"policy.{name}": value.numpy() for name, value in policy.state_dict().items()}
    group = SimpleNamespace(get_weights=lambda: {"default_policy": weights})
    kwargs = {"prompts": ["a star"], "device": "cuda", "mask": "full"}
    settings = rllib.Settings(env_kwargs=kwargs, hidden=4)
    seen = Survey(policy.norm, {"model": "m", "revision": "main", "dtype": "float32"}, {"gamma": 1.0})
    agent = bundle(SimpleNamespace(learner_group=group, iteration=2), settings, seen, {"nfe": 7.0})
    assert agent.config["env"] == {"id": ID, "kwargs": {"mask": "full"}}
    assert agent.config["training"]["algorithm"]["env_kwargs"] == {"mask": "full"}
    assert agent.config["backbone"]["revision"] == "main" and agent.fingerprint == Agent(policy, {}).fingerprint


# --------------------------------------------------------------------------- training


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_without_ray_the_message_says_what_to_install(tmp_path):
    with pytest.raises(ImportError, match="an environment of its own"):
        main([str(tmp_path)])


@pytest.mark.parametrize("name", ["iterations", "checkpoint_every"])
def test_numbers_below_one_are_refused_before_ray_is_started(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        main([str(tmp_path), f"--{name.replace('_', '-')}", "0"])
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got -2"):
        rllib.train(rllib.Settings(), tmp_path, **{"iterations": 1, name: -2})
    assert not list(tmp_path.iterdir())


@pytest.fixture
def ray():
    """A local Ray with two CPUs, or a skipped test."""
    pytest.importorskip("ray.rllib", reason="pip install 'addiff-env[rllib]', in an environment of its own")
    import ray

    ray.init(num_cpus=2, num_gpus=0)
    yield ray
    ray.shutdown()


def module_logits(folder, observations):
    """Of the policy in the run's checkpoint, as RLlib restores it."""
    from ray.rllib.core.rl_module import RLModule

    path = folder / "checkpoint/learner_group/learner/rl_module/default_policy"
    module = RLModule.from_checkpoint(str(path))
    with torch.no_grad():
        return module.forward_inference({"obs": torch.as_tensor(observations)})["action_dist_inputs"].numpy()


@pytest.mark.filterwarnings("ignore")
def test_the_bundle_acts_as_the_module_and_a_run_goes_on(ray, small_kwargs, tmp_path):
    settings = rllib.Settings(
        env_kwargs=small_kwargs, num_env_runners=1, num_envs_per_runner=4, steps_per_lane=6, calibration_steps=4
    )
    assert len(rllib.train(settings, tmp_path, iterations=2, checkpoint_every=1)) == 2
    agent = Agent.load(tmp_path / "agent")
    observations, infos = rllib.make_lanes({"id": ID, "kwargs": small_kwargs, "num_envs": 4}).reset(seed=5)
    assert agent.logits(observations) == pytest.approx(module_logits(tmp_path, observations), abs=1e-6)
    assert agent.act(observations, infos["action_mask"]).shape == (4,)
    assert agent.config["training"]["timesteps"] == 48 and agent.config["env"]["id"] == ID
    (picture,) = AdaptivePipeline.from_pretrained(tmp_path / "agent", num_envs=1)("a red circle", 0)
    assert picture.picture.shape == (64, 64, 3)

    assert rllib.train(settings, tmp_path, iterations=2) == []
    assert len(rllib.train(settings, tmp_path, iterations=3)) == 1
    continued = Agent.load(tmp_path / "agent")
    assert continued.fingerprint != agent.fingerprint and torch.equal(
        continued.policy.norm.mean, agent.policy.norm.mean
    )
    assert len((tmp_path / "progress.jsonl").read_text().splitlines()) == 3
    with pytest.raises(ValueError, match="hidden: 128 there, 64 now"):
        rllib.train(replace(settings, hidden=64), tmp_path, iterations=4)
    with pytest.raises(ValueError, match="room for 2"):
        rllib.train(replace(settings, num_env_runners=3), tmp_path / "other", iterations=1)


@pytest.mark.filterwarnings("ignore")
def test_dear_evaluations_are_saved(ray, small_kwargs, tmp_path):
    """A trivial task, in the main process: what costs this much is better stopped."""
    kwargs = {**small_kwargs, "reward": {"efficiency": 0.3}}
    settings = rllib.Settings(
        ID, kwargs, num_env_runners=0, num_envs_per_runner=8, steps_per_lane=12, learning_rate=3e-3
    )
    rllib.train(settings, tmp_path, iterations=12, checkpoint_every=12)
    rows = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert rows[-1]["episode_return_mean"] > rows[0]["episode_return_mean"] + 0.3
    assert rows[-1]["nfe"] < rows[0]["nfe"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_env_runners_improve_the_return(ray, tmp_path):
    """On the embedded world; two runners on one machine."""
    settings = rllib.Settings(num_env_runners=2, num_envs_per_runner=16)
    returns = rllib.train(settings, tmp_path, iterations=20, checkpoint_every=10)
    assert np.mean(returns[-4:]) > np.mean(returns[:4])
    assert rllib.train(settings, tmp_path, iterations=21)  # goes on from the checkpoint with one more iteration
