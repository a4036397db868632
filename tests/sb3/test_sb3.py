"""The Stable-Baselines3 adapter, the custom policy, and what the training script leaves behind."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecMonitor

from addiff_env.agent import Agent
from addiff_env.env.baseline_cache import compute_baselines
from addiff_env.env.reward import quality
from addiff_env.sb3 import (
    DenoisePolicy,
    DenoiseVecEnv,
    EpisodeLog,
    MaskableDenoisePolicy,
    PromptOrder,
    calibrate,
    make_lanes,
    make_vec_env,
    observation_parts,
)

ID = "AdDiffusion-Tiny-v0"


@pytest.fixture
def vec_env(small_kwargs):
    env = make_vec_env(ID, 3, **small_kwargs)
    env.seed(5)
    return env


def ppo(env, parts, seed=0, batch_size=6, masked=False):
    return (MaskablePPO if masked else PPO)(
        MaskableDenoisePolicy if masked else DenoisePolicy,
        VecMonitor(env),
        n_steps=4,
        batch_size=batch_size,
        n_epochs=1,
        gamma=1.0,
        seed=seed,
        policy_kwargs={"parts": parts, "hidden": 16, "action_bias": [1.5, -1.0, -0.5]},
    )


def test_vec_env_contract(vec_env):
    first = vec_env.reset()
    assert first.shape == (3, *vec_env.observation_space.shape)
    observations, rewards, dones, infos = vec_env.step(np.array([0, 1, 2]))
    assert dones.tolist() == [False, True, False] and rewards.dtype == np.float32
    assert "terminal_observation" not in infos[0]
    assert infos[1]["terminal_observation"].shape == vec_env.observation_space.shape
    assert not np.array_equal(infos[1]["terminal_observation"], observations[1])
    assert infos[1]["TimeLimit.truncated"] is False
    assert [info["action_taken"] for info in infos] == [0, 1, 2]
    assert infos[2]["nfe"] == 4 and infos[1]["nfe"] == 2  # warm-up 2, refinement 2; the ended episode's own count
    assert vec_env.env_is_wrapped(gym.Wrapper) == [False] * 3
    assert vec_env.get_attr("num_envs", [0, 2]) == [3, 3]
    assert vec_env.get_attr("nfe", [2, 1]) == [4, 2]  # a lane's own
    masks = vec_env.env_method("action_masks", indices=[1])
    assert len(masks) == 1 and masks[0].shape == (3,)
    assert vec_env.has_attr("action_masks") and not vec_env.has_attr("nothing")
    assert all("TimeLimit.truncated" in info for info in infos)


@pytest.mark.parametrize("more", [{}, {"price_range": [0.001, 0.016]}], ids=str)
def test_vec_env_restarts_what_the_environment_itself_would(small_kwargs, more):
    """The same seed gives the same prompts, noises and rewards as an environment that restarts lanes itself."""
    adapter = make_vec_env(ID, 2, **small_kwargs, **more)
    adapter.seed(8)
    own = gym.make_vec(ID, num_envs=2, autoreset_mode=AutoresetMode.SAME_STEP, **small_kwargs, **more)
    np.testing.assert_array_equal(adapter.reset(), own.reset(seed=8)[0])
    for action in np.random.default_rng(0).choice(3, size=(10, 2), p=[0.5, 0.3, 0.2]):
        observations, rewards, dones, infos = adapter.step(action)
        expected = own.step(action)
        np.testing.assert_array_equal(observations, expected[0])
        np.testing.assert_allclose(rewards, expected[1], rtol=1e-6)
        np.testing.assert_array_equal(dones, expected[2])
        for lane in np.flatnonzero(dones):
            np.testing.assert_array_equal(infos[lane]["terminal_observation"], expected[4]["final_obs"][lane])


def test_vec_env_options_attributes_and_pictures(small_kwargs):
    env = make_vec_env(ID, 2, render_mode="rgb_array", **small_kwargs)
    env.set_options([{"prompt": "a red circle", "seed": 4}, {"seed": 5}])
    env.reset()
    assert env.reset_infos[0]["prompt"] == "a red circle" and [i["seed"] for i in env.reset_infos] == [4, 5]
    env.reset()
    assert [info["seed"] for info in env.reset_infos] != [4, 5]  # options hold for one reset
    assert [picture.shape for picture in env.get_images()] == [(64, 64, 3)] * 2
    env.set_attr("prompts", ["a star"])
    assert env.get_attr("prompts") == [["a star"]] * 2
    with pytest.raises(ValueError, match=r"'prompts' was set for \[1\] only"):
        env.set_attr("prompts", [], indices=1)
    with pytest.raises(AttributeError, match="nothing"):
        env.get_attr("nothing")
    env.set_options({"picture": 1})
    with pytest.raises(ValueError, match="picture"):
        env.reset()


def test_a_lane_that_fails_in_its_warm_up_is_drawn_again(vec_env, monkeypatch):
    """Nothing was decided yet, so there is nothing to be blamed for."""
    reset, failures = vec_env.env.reset, [np.array([True, False, True]), np.array([True, False, False])]

    def failing(**options):
        result = reset(**options)
        vec_env.env.done[:] = failures.pop(0) if failures else False
        return result

    monkeypatch.setattr(vec_env.env, "reset", failing)
    with pytest.warns(UserWarning, match="warm-up") as warned:
        vec_env.reset()
    assert [str(warning.message)[:7] for warning in warned] == ["2 lanes", "1 lanes"]
    assert not vec_env.env.done.any() and all(info["nfe"] == 2 for info in vec_env.reset_infos)
    failures += [np.array([False, True, False])] * 3 + [np.array([False, False, False])]
    with pytest.warns(UserWarning) as warned:
        with pytest.raises(RuntimeError, match="1 lanes were not finite in 3 warm-ups.*float32"):
            vec_env.reset()
    assert len(warned) == 2 and len(failures) == 1  # nothing is drawn that nobody looks at


def test_terminal_quality_is_counted_from_the_baseline(small_kwargs, tmp_path):
    lanes = make_lanes(ID, 2, **small_kwargs | {"prompts": ["a red circle", "a green star"]})
    cache = compute_baselines(tmp_path / "b.jsonl", lanes, 3, lanes.prompts, [0, 1, 2])
    env = DenoiseVecEnv(lanes, PromptOrder(lanes.prompts, seeds=cache.seeds), cache)
    env.seed(0)
    env.reset()
    config = env.reward_config
    _, rewards, dones, infos = env.step(np.array([1, 0]))
    assert dones.tolist() == [True, False] and infos[0]["seed"] in (0, 1, 2)
    made = quality(*(np.array([infos[0][name]]) for name in ("clip_score", "reward_score")), config)
    plain = quality(*np.array([cache.scores[infos[0]["prompt"], infos[0]["seed"]]]).T, config)
    assert infos[0]["reward_components"]["terminal"] == pytest.approx((made - plain)[0])
    assert rewards[0] == pytest.approx(sum(infos[0]["reward_components"].values()), rel=1e-5)
    assert infos[1]["reward_components"]["terminal"] == 0


def test_prices_are_many_where_seeds_are_few(small_kwargs):
    """The environment draws a price by the seed; baselines have few of those."""
    lanes = make_lanes(ID, 3, **small_kwargs | {"prompts": ["a red circle"], "price_range": [0.001, 0.016]})
    order = PromptOrder(lanes.prompts, seeds=lambda prompt: [0, 1], price_range=lanes.config.price_range)
    env = DenoiseVecEnv(lanes, order)
    env.seed(3)
    env.reset()
    seen = {info["price"] for info in env.reset_infos}
    saved, plan = env.state_dict(), [np.array(actions) for actions in ([1, 1, 1], [1, 0, 1], [0, 1, 1])]
    first = [env.step(actions) for actions in plan]
    env.load_state_dict(saved)
    for (observations, rewards, *_), actions in zip(first, plan, strict=True):
        again = env.step(actions)
        np.testing.assert_array_equal(again[0], observations)
        np.testing.assert_array_equal(again[1], rewards)
        seen |= {info["price"] for info in env.reset_infos}
    assert len(seen) > 6 and all(0.001 <= price <= 0.016 for price in seen)
    env.set_options({"price": 0.002})
    env.reset()
    assert {info["price"] for info in env.reset_infos} == {0.002}


def test_other_autoreset_modes_are_refused(small_kwargs):
    envs = gym.make_vec(ID, num_envs=1, autoreset_mode=AutoresetMode.NEXT_STEP, **small_kwargs)
    with pytest.raises(ValueError, match="NEXT_STEP"):
        DenoiseVecEnv(envs.unwrapped)


@pytest.mark.parametrize("layout", [{"obs_mode": "dict"}, {"obs_backend": "torch"}])
def test_other_observations_are_refused(small_kwargs, layout):
    with pytest.raises(ValueError, match="dict|torch"):
        make_vec_env(ID, 1, **small_kwargs, **layout)


def test_untrained_policy_starts_at_its_action_bias(vec_env):
    model = ppo(vec_env, observation_parts(vec_env.env))
    observations = torch.as_tensor(vec_env.reset())
    shares = model.policy.get_distribution(observations).distribution.probs.detach().mean(0)
    wanted = torch.softmax(torch.tensor([1.5, -1.0, -0.5]), 0)
    assert shares == pytest.approx(wanted, abs=0.05)


def test_learning_changes_the_policy_and_the_bundle_acts_alike(vec_env, tmp_path):
    parts = observation_parts(vec_env.env)
    assert sum(parts.values()) == vec_env.observation_space.shape[0]
    model, log = ppo(vec_env, parts), EpisodeLog()
    calibrate(model, 3, (0.6, 0.2, 0.2), seed=1)
    before = model.policy.action_net.weight.detach().clone()
    model.learn(24, callback=log)
    assert not torch.equal(before, model.policy.action_net.weight)
    assert sum(log.summary[f"action/{name}"] for name in ("continue", "stop", "refine")) == pytest.approx(1)

    agent = Agent(model.policy.export(), {"observation": parts, "hidden": 16, "env": {"id": ID, "kwargs": {}}})
    agent.save(tmp_path)
    observations = vec_env.reset()
    expected = model.policy.get_distribution(torch.as_tensor(observations)).distribution.logits.detach().numpy()
    logits = Agent.load(tmp_path).logits(observations)
    centred = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert centred == pytest.approx(expected, abs=1e-5)
    assert (Agent.load(tmp_path).act(observations) == model.predict(observations, deterministic=True)[0]).all()


def test_same_seed_trains_the_same_policy(small_kwargs):
    weights = []
    for _ in range(2):
        env = make_vec_env(ID, 2, **small_kwargs)
        model = ppo(env, observation_parts(env.env), seed=3, batch_size=4)
        calibrate(model, 2, (0.6, 0.2, 0.2), seed=3)
        model.learn(8)
        weights.append(model.policy.action_net.weight.detach().clone())
    assert torch.equal(*weights)


def test_masked_policy_never_takes_an_inadmissible_action(small_kwargs):
    env = make_vec_env(ID, 2, **small_kwargs | {"max_refines": 0})
    model = ppo(env, observation_parts(env.env), batch_size=4, masked=True)
    taken = []
    model.learn(16, callback=lambda local, _: taken.extend(local["actions"].tolist()) or True)
    assert set(taken) <= {0, 1}
    net = model.policy.export()
    observations = env.reset()
    logits = model.policy.get_distribution(torch.as_tensor(observations)).distribution.logits
    exported = torch.log_softmax(net(torch.as_tensor(observations)), 1)
    assert exported.detach().numpy() == pytest.approx(logits.detach().numpy(), abs=1e-5)
