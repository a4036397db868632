"""Other libraries drive the environment; each test runs where its library is installed (SB3's are in test_sb3.py).

    pip install 'addiff-env[torchrl]'    # or tianshou, or rllib: each in an environment of its own

RLlib's runs are in test_rllib.py, and the documentation's examples in test_docs.py.
"""

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import addiff_env  # noqa: F401, registers the ids

ID = "AdDiffusion-Tiny-v0"
CONTINUE, STOP, REFINE = range(3)
Kwargs = dict[str, Any]


def replay(kwargs: Kwargs, prompt: str, seed: int, actions: list[int]) -> tuple[list[float], list[bool]]:
    """Rewards and ends of these actions in the plain environment."""
    env = gym.make(ID, **kwargs)
    env.reset(options={"prompt": prompt, "seed": seed})
    steps = [env.step(action) for action in actions]
    return [float(step[1]) for step in steps], [step[2] for step in steps]


def test_a_cleanrl_style_loop_on_torch_observations(small_kwargs: Kwargs) -> None:
    """Rollout, GAE and one PPO update as CleanRL's ``ppo.py`` has them; nothing is turned into NumPy on the way."""
    envs = gym.make_vec(ID, num_envs=3, obs_backend="torch", **small_kwargs)
    width = envs.single_observation_space.shape[0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        actor, critic = (torch.nn.Linear(width, outputs) for outputs in (3, 1))
        optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], lr=1e-2)
        steps = 10
        rewards, ends, values, log_probs = (torch.zeros(steps, 3) for _ in range(4))
        seen, chosen = torch.zeros(steps, 3, width), torch.zeros(steps, 3, dtype=torch.long)
        observation, _ = envs.reset(seed=0)
        done = torch.zeros(3)
        for t in range(steps):
            assert isinstance(observation, torch.Tensor) and observation.device == actor.weight.device
            seen[t], ends[t] = observation, done
            with torch.no_grad():
                choice = torch.distributions.Categorical(logits=actor(observation))
                chosen[t] = choice.sample()
                log_probs[t], values[t] = choice.log_prob(chosen[t]), critic(observation)[:, 0]
            observation, reward, terminated, truncated, _ = envs.step(chosen[t])
            rewards[t], done = torch.as_tensor(reward), torch.as_tensor(terminated | truncated).float()
        assert ends.sum() > 0  # episodes ended and began on the way
        advantages, last = torch.zeros(steps, 3), torch.zeros(3)
        with torch.no_grad():
            following = critic(observation)[:, 0]
        for t in reversed(range(steps)):
            going = 1 - (done if t == steps - 1 else ends[t + 1])
            delta = rewards[t] + (following if t == steps - 1 else values[t + 1]) * going - values[t]
            last = delta + 0.95 * going * last
            advantages[t] = last
    before = actor.weight.detach().clone()
    ratio = (torch.distributions.Categorical(logits=actor(seen)).log_prob(chosen) - log_probs).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio))  # the first update is on-policy
    loss = -torch.min(advantages * ratio, advantages * ratio.clamp(0.8, 1.2)).mean()
    (loss + (critic(seen)[..., 0] - (advantages + values)).square().mean()).backward()
    optimizer.step()
    assert torch.isfinite(actor.weight).all() and not torch.equal(actor.weight, before)
    envs.close()


@pytest.mark.filterwarnings("default")  # the library's own
def test_torchrl(small_kwargs: Kwargs) -> None:
    pytest.importorskip("torchrl.envs", reason="pip install 'addiff-env[torchrl]'")
    from torchrl.envs import GymEnv
    from torchrl.envs.utils import check_env_specs

    env = GymEnv(ID, categorical_action_encoding=True, **small_kwargs)
    check_env_specs(env)
    plan: Iterator[int] = iter([CONTINUE, REFINE, CONTINUE, STOP])
    rollout = env.rollout(10, lambda observation: torch.tensor(next(plan)))
    lanes = env._env.unwrapped.vector
    rewards, ends = replay(small_kwargs, lanes.prompt[0], int(lanes.seed[0]), rollout["action"].tolist())
    assert rollout["observation"].shape == (4, *env.observation_spec["observation"].shape)
    assert rollout["next", "reward"].flatten().tolist() == pytest.approx(rewards, abs=1e-5)
    assert rollout["next", "terminated"].flatten().tolist() == ends == [False, False, False, True]
    env.close()


@pytest.mark.filterwarnings("default")  # the library's own
def test_tianshou(small_kwargs: Kwargs) -> None:
    pytest.importorskip("tianshou.algorithm", reason="pip install 'addiff-env[tianshou]'")
    from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy, Reinforce
    from tianshou.algorithm.optim import AdamOptimizerFactory
    from tianshou.data import Collector, VectorReplayBuffer
    from tianshou.env import DummyVectorEnv
    from tianshou.utils.net.common import Net
    from tianshou.utils.torch_utils import policy_within_training_step

    envs = DummyVectorEnv([lambda: gym.make(ID, **small_kwargs)] * 2)
    observation, action = envs.observation_space[0], envs.action_space[0]
    net = Net(state_shape=observation.shape, action_shape=action.n, hidden_sizes=[16])
    algorithm = Reinforce(
        policy=DiscreteActorPolicy(actor=net, action_space=action), gamma=1.0, optim=AdamOptimizerFactory(lr=1e-2)
    )
    collector = Collector(algorithm, envs, VectorReplayBuffer(100, 2))
    stats = collector.collect(n_episode=4, reset_before_collect=True)
    assert stats.n_collected_episodes == 4 and np.isfinite(stats.returns).all()
    batch, _ = collector.buffer.sample(0)
    first = slice(0, int(np.flatnonzero(batch.terminated)[0]) + 1)  # one lane's first episode
    rewards, ends = replay(small_kwargs, batch.info.prompt[0], int(batch.info.seed[0]), batch.act[first].tolist())
    assert batch.rew[first].tolist() == pytest.approx(rewards, abs=1e-5) and ends[-1]
    before = net.state_dict()[next(iter(net.state_dict()))].clone()
    with policy_within_training_step(algorithm.policy):
        algorithm.update(collector.buffer, batch_size=8, repeat=1)
    assert not torch.equal(before, next(iter(net.state_dict().values())))
    envs.close()
