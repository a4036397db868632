"""RLlib's side of the environment; the training itself needs Ray, which has an environment of its own."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from composed import rllib_config
from gymnasium.wrappers.vector import DictInfoToList
from omegaconf import OmegaConf

from addiff_env import cli, rllib
from addiff_env.agent import Agent, PolicyNet
from addiff_env.pipeline import AdaptivePipeline
from addiff_env.rllib import checkpoint
from addiff_env.rllib.lanes import Survey, survey
from addiff_env.rllib.settings import ALLOWED, UNUSED, check_settings, claim, share_gpus, train_batch_size
from addiff_env.rllib.training import Progress, bundle, make_config, ppo_options

ID = "AdDiffusion-Tiny-v0"
HAS_RAY = importlib.util.find_spec("ray") is not None
LITTLE = ["num_envs=4", "algorithm.n_steps=5"]


def test_lanes_are_as_an_env_runner_takes_them(small_kwargs):
    """Infos split into one dictionary per lane, and an ended lane restarts in the next step."""
    env = DictInfoToList(rllib.make_lanes({"id": ID, "kwargs": small_kwargs, "num_envs": 2}))
    observations, infos = env.reset(seed=3)
    assert observations.shape[0] == len(infos) == env.num_envs == 2
    assert {"seed", "nfe", "action_mask"} <= set(infos[0])
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


def test_runners_draw_prices_and_the_policy_reads_them(small_kwargs):
    context = {"id": ID, "kwargs": {**small_kwargs, "price_range": [0.001, 0.016]}, "num_envs": 3}
    seen = survey(context, steps=2, seed=0)
    at = [*seen.norm.parts].index("price")
    part = torch.split(seen.norm.scale, [*seen.norm.parts.values()])[at]
    assert part.item() == pytest.approx(2 * 3**0.5)  # of a uniform number, however few episodes were seen
    _, infos = DictInfoToList(rllib.make_lanes(context)).reset(seed=0)
    assert len({info["price"] for info in infos}) == 3


# --------------------------------------------------------------------------- settings


def test_rllib_refuses_recorded_attempts():
    with pytest.raises(ValueError, match="attempts.folder=runs/tiny/attempts: .* replays no recorded attempts"):
        check_settings(rllib_config("env=tiny_attempts"))


@pytest.mark.parametrize("env", ["tiny", "tiny_prices", "sd15", "sdxl", "flux_schnell"])
@pytest.mark.parametrize("group", ["env", "num_envs", "policy", "algorithm", "reward", "prompts", "seed"])
def test_both_trainers_take_the_same_groups(env, group):
    """All but what RLlib's has no use for, which its configuration leaves empty."""
    ours, theirs = (rllib_config(f"env={env}", name=name) for name in ("train_rllib", "train"))
    check_settings(ours)
    for name in [name for name in UNUSED if name.startswith(f"{group}.")]:
        for cfg in (ours, theirs):
            OmegaConf.update(cfg, name, None)
    assert OmegaConf.select(ours, group) == OmegaConf.select(theirs, group)


def test_rllib_trains_with_the_groups_values():
    cfg = rllib_config(
        *LITTLE, "rllib.num_env_runners=3", *["algorithm.total_timesteps=600", "algorithm.ent_coef_end=0.01"]
    )
    assert train_batch_size(cfg) == 60
    assert ppo_options(cfg) == {
        "lr": [[0, 1e-3], [600, 0.0]],
        "entropy_coeff": 0.01,  # the same at the end
        "gamma": 1.0,
        "lambda_": 0.95,
        "clip_param": 0.3,
        "vf_loss_coeff": 0.5,
        "grad_clip": 0.5,
        "num_epochs": 8,
        "minibatch_size": 60,  # not the 256 of larger batches
        "train_batch_size_per_learner": 60,
    }
    assert train_batch_size(rllib_config(*LITTLE, "rllib.num_env_runners=0")) == 20  # plays in the main process


OTHERWISE = {
    "algorithm.name": "maskable_ppo",
    "algorithm.gae_lambda_end": 0.95,
    "reward.normalisation": "running",
    "reward.target_nfe": 15,
    "reward.dual_rate": 0.3,
    "reward.baselines": "b.jsonl",
    "attempts.folder": "runs/tiny/attempts",
    "prompts.stages": [{"name": "simple", "until": 0.2, "most": 1}],
    "prompts.held_out.source": "p.txt",
    "prompts.held_out.number": 8,
}


@pytest.mark.parametrize("name", UNUSED)
def test_what_rllibs_trainer_has_no_use_for_is_refused(name, tmp_path):
    cfg = rllib_config()
    OmegaConf.update(cfg, name, OTHERWISE[name])
    with pytest.raises(ValueError) as error:
        rllib.train(cfg, tmp_path / "run")
    assert str(error.value).startswith(f"{name}={OTHERWISE[name]}: ") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name in ALLOWED if name not in ("policy.gains", "rllib.address")])
def test_numbers_out_of_bounds_are_refused_before_ray_is_started(name, tmp_path):
    for value in (-2, "8", True, [1, 2], float("nan"), *[None] * (name != "rllib.gpus_per_runner")):
        cfg = rllib_config()
        OmegaConf.update(cfg, name, value)
        with pytest.raises(ValueError, match=name):
            rllib.train(cfg, tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["policy.action_bias=[1,2,x]"], "policy.action_bias.*'x'"),
        (["policy.gains=3"], "policy.gains.*3"),
        (["rllib.address=6379"], "rllib.address.*6379"),
        (["+env.kwargs.prompts=[a star]"], "set prompts.source instead"),
        (["+env.kwargs.reward={efficiency: 1}"], "set reward.weights instead"),
        (["reward.price_range=[0.01,0.001]"], "price_range must be"),
        (["algorithm.gamma=0.9"], "algorithm.gamma is 0.9, the reward's gamma 1.0"),
        (["+reward.weights.gamma=0.9"], "algorithm.gamma is 1.0, the reward's gamma 0.9"),
        (["+reward.weights.colour=1"], "colour"),
    ],
)
def test_wrong_settings_are_refused_before_ray_is_started(overrides, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        rllib.train(rllib_config(*overrides), tmp_path / "run")
    assert not list(tmp_path.iterdir())
    if "gamma" in message:
        check_settings(rllib_config("algorithm.gamma=0.9", "+reward.weights.gamma=0.9"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rllib.num_env_runners=-1"], "rllib.num_env_runners must be at least 0, got -1"),
        (["prompts=curriculum"], "prompts.stages="),
        (["algorithm=maskable_ppo"], "algorithm.name=maskable_ppo"),
        (["reward=running"], "reward.normalisation=running"),
        (["rllib.colour=1"], "colour"),
        (["runs/ray"], "runs/ray"),
    ],
)
def test_the_command_says_what_is_wrong(words, said, tmp_path, capsys):
    assert cli.main(["train-rllib", f"hydra.run.dir={tmp_path}", *words]) == 1
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


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
    cfg = rllib_config(f"rllib.num_env_runners={runners}", f"rllib.gpus_per_runner={asked or 'null'}")
    assert share_gpus(cfg, [{"CPU": cpus, "GPU": gpus} for cpus, gpus in nodes]) == share


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
    cfg = rllib_config(f"rllib.num_env_runners={runners}", f"rllib.gpus_per_runner={asked or 'null'}")
    with pytest.raises(ValueError, match=message):
        share_gpus(cfg, [{"CPU": cpus, "GPU": gpus} for cpus, gpus in nodes])


def test_a_folder_keeps_its_configuration(tmp_path):
    claim(tmp_path, rllib_config("seed=1"))
    claim(tmp_path, rllib_config())  # nothing was trained yet
    (tmp_path / "checkpoint").mkdir()
    claim(tmp_path, rllib_config())
    elsewhere = ["rllib.gpus_per_runner=0.5", "rllib.address=auto", "rllib.nodes=2", "rllib.checkpoint_every=1"]
    claim(tmp_path, rllib_config(*elsewhere))  # decides no result
    with pytest.raises(ValueError) as error:
        claim(tmp_path, rllib_config("policy.hidden=64", "rllib.num_env_runners=3", mask="full"))
    found = ("policy.hidden: 128 there, 64 now", "rllib.num_env_runners: 2 there, 3 now", "env.kwargs.mask: nothing")
    assert all(value in str(error.value) for value in found)
    assert OmegaConf.load(tmp_path / "config.yaml").policy.hidden == 128


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
    cfg = rllib_config("policy.hidden=4", "prompts.source=[a star]", device="cuda", mask="full")
    seen = Survey(policy.norm, {"model": "m", "revision": "main", "dtype": "float32"}, {"gamma": 1.0})
    agent = bundle(SimpleNamespace(learner_group=group, iteration=2), cfg, seen, {"nfe": 7.0})
    assert agent.config["env"] == {"id": ID, "kwargs": {"mask": "full"}}
    assert agent.config["training"]["algorithm"]["name"] == "rllib_ppo" and "a star" not in json.dumps(agent.config)
    assert agent.config["backbone"]["revision"] == "main" and agent.fingerprint == Agent(policy, {}).fingerprint


# --------------------------------------------------------------------------- training


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_without_ray_the_message_says_what_to_install(tmp_path, capsys):
    assert cli.main(["train-rllib", f"hydra.run.dir={tmp_path}"]) == 1
    assert "an environment of its own" in capsys.readouterr().err and not list(tmp_path.iterdir())


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


def schedule_state(algorithm):
    """Learning rate and entropy weight that RLlib's learner works with."""
    learner = algorithm.learner_group._learner
    (optimizer,) = learner._named_optimizers.values()
    entropy = learner.entropy_coeff_schedulers_per_module["default_policy"].get_current_value()
    return optimizer.param_groups[0]["lr"], float(entropy)


class Interrupted(Exception):
    """Somebody stops the run."""


@pytest.mark.filterwarnings("ignore")
def test_the_bundle_acts_as_the_module_and_a_run_goes_on(ray, small_kwargs, tmp_path, monkeypatch):
    little = ["num_envs=4", "algorithm.n_steps=6", "calibration_steps=4", "algorithm.total_timesteps=72"]
    runners, often = "rllib.num_env_runners=1", "rllib.checkpoint_every=1"
    cfg = rllib_config(*little, runners, often, **small_kwargs)

    def stop_after_two(progress, iteration, means, add=Progress.add):
        if iteration == 3:
            raise Interrupted
        return add(progress, iteration, means)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "add", stop_after_two)
        with pytest.raises(Interrupted):
            rllib.train(cfg, tmp_path)
    agent = Agent.load(tmp_path / "agent")
    observations, infos = rllib.make_lanes({"id": ID, "kwargs": small_kwargs, "num_envs": 4}).reset(seed=5)
    assert agent.logits(observations) == pytest.approx(module_logits(tmp_path, observations), abs=1e-6)
    assert agent.act(observations, infos["action_mask"]).shape == (4,)
    assert agent.config["training"]["timesteps"] == 48 and agent.config["env"]["id"] == ID
    (picture,) = AdaptivePipeline.from_pretrained(tmp_path / "agent", num_envs=1)("a red circle", 0).images
    assert picture.size == (64, 64)

    assert len(rllib.train(cfg, tmp_path)) == 1
    continued = Agent.load(tmp_path / "agent")
    assert continued.fingerprint != agent.fingerprint and torch.equal(
        continued.policy.norm.mean, agent.policy.norm.mean
    )
    assert len((tmp_path / "progress.jsonl").read_text().splitlines()) == 3
    assert rllib.train(cfg, tmp_path) == []  # complete
    with pytest.raises(ValueError, match="policy.hidden: 128 there, 64 now"):
        rllib.train(rllib_config(*little, runners, "policy.hidden=64", **small_kwargs), tmp_path)
    with pytest.raises(ValueError, match="room for 2"):
        rllib.train(rllib_config(*little, "rllib.num_env_runners=3", **small_kwargs), tmp_path / "other")


@pytest.mark.filterwarnings("ignore")
def test_schedules_reach_their_ends(ray, small_kwargs):
    little = ["num_envs=4", "algorithm.n_steps=6", "rllib.num_env_runners=0", "algorithm.total_timesteps=48"]
    cfg = rllib_config(*little, **small_kwargs)
    seen = survey({"id": ID, "kwargs": small_kwargs, "num_envs": 4}, 4, 0)
    algorithm = make_config(cfg, 0.0, seen, 0).build_algo()
    assert schedule_state(algorithm) == pytest.approx((1e-3, 0.01))
    algorithm.train()
    halfway = schedule_state(algorithm)
    algorithm.train()
    algorithm.stop()
    assert 0 < halfway[0] < 1e-3 and 0.001 < halfway[1] < 0.01
    assert schedule_state(algorithm) == pytest.approx((0.0, 0.001), abs=1e-7)


@pytest.mark.filterwarnings("ignore")
def test_dear_evaluations_are_saved(ray, small_kwargs, tmp_path):
    """A trivial task, in the main process: what costs this much is better stopped."""
    little = ["num_envs=8", "algorithm.n_steps=12", "rllib.num_env_runners=0", "algorithm.total_timesteps=1152"]
    rates = ["algorithm.learning_rate=3e-3", "algorithm.learning_rate_end=3e-3", "algorithm.batch_size=192"]
    rllib.train(rllib_config(*little, *rates, "+reward.weights.efficiency=0.3", **small_kwargs), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert rows[-1]["episode_return_mean"] > rows[0]["episode_return_mean"] + 0.3
    assert rows[-1]["nfe"] < rows[0]["nfe"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_env_runners_improve_the_return(ray, tmp_path):
    """On the embedded world; two runners on one machine."""
    returns = rllib.train(rllib_config("num_envs=16", "algorithm.total_timesteps=15360"), tmp_path)
    assert len(returns) == 20 and np.mean(returns[-4:]) > np.mean(returns[:4])
