"""The Stable-Baselines3 adapter, the custom policy, and what the training script leaves behind."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecMonitor

from addiff_env.agent import Agent
from addiff_env.sb3 import DenoisePolicy, DenoiseVecEnv, EpisodeLog, calibrate, make_vec_env, observation_parts

ID = "AdDiffusion-Tiny-v0"


@pytest.fixture
def vec_env(small_kwargs):
    env = make_vec_env(ID, 3, **small_kwargs)
    env.seed(5)
    return env


def ppo(env, parts, seed=0, batch_size=6):
    return PPO(
        DenoisePolicy,
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
    masks = vec_env.env_method("action_masks", indices=[1])
    assert len(masks) == 1 and masks[0].shape == (3,)


def test_other_autoreset_modes_are_refused(small_kwargs):
    envs = gym.make_vec(ID, num_envs=1, autoreset_mode=AutoresetMode.NEXT_STEP, **small_kwargs)
    with pytest.raises(ValueError, match="SAME_STEP"):
        DenoiseVecEnv(envs.unwrapped)


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
