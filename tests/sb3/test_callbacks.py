"""Callbacks and prompt order by themselves, and that the whole learns where the best action is known."""

import json
import warnings
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

import addiff_env
from addiff_env.agent import Agent
from addiff_env.env.config import EnvConfig
from addiff_env.env.reward import RewardConfig
from addiff_env.sb3 import CollapseAlarm, CollapseWarning, EpisodeLog, PromptOrder, Stage, prompt_complexity
from addiff_env.sb3.callbacks import LinearSchedule, TargetNFE
from addiff_env.sb3.episodes import complexity_group
from addiff_env.sb3.policies import ALGORITHMS, calibrate

PARTS = {"wide": 12, "narrow": 3}


class StandIn(VecEnv):
    """One decision an episode; three numbers among much noise say which action pays."""

    render_mode = None

    def __init__(self, num_envs=16):
        width = sum(PARTS.values())
        self._rng = np.random.default_rng(0)
        super().__init__(num_envs, gym.spaces.Box(-10, 10, (width,)), gym.spaces.Discrete(3))

    def _draw(self):
        self.best = self._rng.integers(3, size=self.num_envs)
        wide = self._rng.normal(size=(self.num_envs, PARTS["wide"]))
        narrow = 0.1 * np.eye(3)[self.best] + 0.01 * self._rng.normal(size=(self.num_envs, 3))
        return np.concatenate([wide, narrow], axis=1).astype(np.float32)

    def reset(self):
        return self._draw()

    def step_async(self, actions):
        self._actions = actions

    def step_wait(self):
        right = self._actions == self.best
        reward = {"shaping": 0.0, "instability": 0.0, "efficiency": 0.0, "terminal": 1.0, "fault": 0.0}
        observations = self._draw()
        infos = [
            {
                "action_taken": int(action),
                "nfe": 3 + int(action),
                "reward_score": float(hit),
                "prompt": "a red circle",
                "reward_components": reward,
                "terminal_observation": observations[lane],
            }
            for lane, (action, hit) in enumerate(zip(self._actions, right, strict=True))
        ]
        return observations, right.astype(np.float32), np.ones(self.num_envs, bool), infos

    def seed(self, seed=None):
        self._rng = np.random.default_rng(seed)
        return [seed] * self.num_envs

    def get_attr(self, attr_name, indices=None):
        return [getattr(self, attr_name)] * self.num_envs

    def set_attr(self, attr_name, value, indices=None):
        setattr(self, attr_name, value)

    def action_masks(self):
        return np.ones((self.num_envs, 3), bool)

    def env_method(self, method_name, *args, indices=None, **kwargs):
        return list(getattr(self, method_name)(*args, **kwargs))

    def env_is_wrapped(self, wrapper_class, indices=None):
        return [False] * self.num_envs

    def close(self):
        pass


def learner(name, env, n_steps=16, learning_rate=3e-3):
    algorithm, policy = ALGORITHMS[name]
    options = {"parts": PARTS, "hidden": 32, "action_bias": [2.2, -1.4, -0.6]}
    return algorithm(
        policy,
        VecMonitor(env),
        n_steps=n_steps,
        batch_size=64,
        n_epochs=6,
        gamma=1.0,
        learning_rate=LinearSchedule(learning_rate, 0.0),
        ent_coef=0.01,
        seed=0,
        device="cpu",
        policy_kwargs=options,
    )


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_the_known_best_action_is_learned(name):
    env = StandIn()
    model = learner(name, env)
    calibrate(model, 20, (0.6, 0.2, 0.2), seed=1)
    log = EpisodeLog()
    model.learn(8000, callback=log)
    agent = Agent(model.policy.export(), {"observation": PARTS})
    observations = env.reset()
    right = [agent.act(observations) == env.best]
    for _ in range(20):
        observations = env.step(agent.act(observations))[0]
        right.append(agent.act(observations) == env.best)
    assert np.mean(right) > 0.97
    assert all(log.summary[f"action/{name}"] > 0.2 for name in ("continue", "stop", "refine"))
    assert (
        log.summary["episode/nfe_std"] > 0.5 and log.summary["nfe_by_complexity/1"] == log.summary["episode/nfe_mean"]
    )


# ------------------------------------------------------------------ collapse alarm


def feed(alarm, rollouts):
    """Pass rollouts, lists of (action, NFE if the episode ended), to the alarm as SB3 would."""
    model = PPO("MlpPolicy", StandIn(1), n_steps=2, batch_size=2, device="cpu")
    model.set_logger(Logger(None, []))
    alarm.init_callback(model)
    going = True
    for rollout in rollouts:
        for action, nfe in rollout:
            alarm.locals = {"infos": [{"action_taken": action, "nfe": nfe}], "dones": [nfe is not None]}
            going = alarm._on_step()
        alarm._on_rollout_end()
    return going


HEALTHY = [(0, None), (0, 5), (1, 3), (2, 8)]


def test_the_alarm_is_quiet_while_the_policy_varies():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alarm = CollapseAlarm(window=2, share=0.98)
        assert feed(alarm, [HEALTHY] * 4)
        assert alarm.collapsed is None


def test_the_alarm_waits_for_a_full_window():
    alarm = CollapseAlarm(window=3)
    feed(alarm, [[(0, 50)] * 60] * 2)
    assert alarm.collapsed is None


@pytest.mark.parametrize(
    ("rollout", "words"),
    [
        ([(0, None)] * 99 + [(0, 50)], "100.0% of the last 200 decisions were 'continue'"),
        ([(0, None), (1, 4), (2, None), (1, 4)], "every episode of the last 2 rollouts took 4 evaluations"),
    ],
)
def test_the_alarm_says_what_has_collapsed(rollout, words):
    alarm = CollapseAlarm(window=2)
    with pytest.warns(CollapseWarning, match="the policy has collapsed") as caught:
        assert feed(alarm, [rollout] * 2)
    assert words in str(caught[0].message) and alarm.collapsed == words


def test_the_alarm_recovers_and_can_stop_the_run():
    alarm = CollapseAlarm(window=1)
    with pytest.warns(CollapseWarning):
        feed(alarm, [[(0, 50)] * 3, HEALTHY])
    assert alarm.collapsed is None
    model = learner("ppo", StandIn(), n_steps=4, learning_rate=0.0)
    with torch.no_grad():
        model.policy.action_net.bias.copy_(torch.tensor([50.0, 0.0, 0.0]))
    with pytest.warns(CollapseWarning, match="stopping"):
        model.learn(64 * 10, callback=CollapseAlarm(window=2, stop=True))
    assert model.num_timesteps < 64 * 4


def test_the_alarm_is_raised_every_time_and_not_only_once():
    """Python's own filter would show the same words from the same line once in a process."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            feed(CollapseAlarm(window=1), [[(0, 50), (0, 50)]] * 3)
    assert [warning.category for warning in caught] == [CollapseWarning] * 6
    assert len({str(warning.message) for warning in caught}) == 1 and caught[0].filename.endswith("callbacks.py")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CollapseWarning)
        feed(CollapseAlarm(window=1), [[(0, 50), (0, 50)]])


def test_one_ended_episode_is_no_collapse():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        feed(CollapseAlarm(window=2), [[(0, None), (1, 4)], [(2, None), (0, None)]])
    with pytest.warns(CollapseWarning, match="took 4 evaluations"):
        feed(CollapseAlarm(window=2), [[(0, None), (1, 4)], [(2, None), (1, 4)]])


def test_lanes_that_did_not_act_are_not_counted():
    """``action_taken`` is -1 there, which would count as the last action: refine."""
    alarm, log = CollapseAlarm(window=1), EpisodeLog()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        feed(alarm, [[(-1, None)] * 300 + HEALTHY])
        feed(alarm, [[(-1, None)] * 4])  # nobody acted: nothing to divide by
    assert alarm.collapsed is None
    reward = dict.fromkeys(("shaping", "instability", "efficiency", "terminal", "fault"), 0.0)
    log.init_callback(alarm.model)
    for actions in ([-1, -1, 0, 1], [-1]):
        log.locals = {
            "infos": [{"action_taken": a, "reward_components": reward} for a in actions],
            "dones": [False] * len(actions),
        }
        log._on_step()
        log._on_rollout_end()
        assert log.summary["action/refine"] == 0
    assert log.summary["action/continue"] == 0


# ------------------------------------------------------------------ target NFE


class Lanes:
    """The adapter's settings and price, and nothing else."""

    def __init__(self, **settings):
        self.env = SimpleNamespace(config=EnvConfig(**addiff_env.TINY | settings))
        self.reward_config = RewardConfig(efficiency=0.01)


def episodes(target, rollouts):
    """Pass rollouts, lists of the NFE of ended episodes, to the callback as SB3 would."""
    model = PPO("MlpPolicy", StandIn(1), n_steps=2, batch_size=2, device="cpu")
    model.set_logger(Logger(None, []))
    target.init_callback(model)
    for rollout in rollouts:
        target.locals = {"infos": [{"nfe": nfe} for nfe in rollout], "dones": [True] * len(rollout)}
        target._on_step()
        target._on_rollout_end()


@pytest.mark.parametrize("target", [0, 2, 4.9, 32.1, -2, 1000, float("nan")])
def test_a_target_that_no_policy_can_meet_is_refused(target):
    with pytest.raises(ValueError, match=r"between 5 .* and 32 .*got") as error:  # 3 warm-up steps and 2 to finish
        TargetNFE(Lanes(), target, 0.3)
    assert str(target) in str(error.value)


def test_one_price_is_not_searched_where_each_episode_draws_its_own():
    with pytest.raises(ValueError, match=r"target_nfe=10 .* price_range \[0.001, 0.01\]"):
        TargetNFE(Lanes(price_range=[0.001, 0.01]), 10, 0.3)


def test_the_price_follows_the_episodes_and_says_where_it_can_go_no_further():
    lanes = Lanes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        episodes(TargetNFE(lanes, 10, 0.3), [[20, 20], [], [5, 15]])
    assert lanes.reward_config.efficiency == pytest.approx(0.01 * np.exp(0.3))
    with pytest.warns(UserWarning, match="its bound, 1, with episodes of 32.0 evaluations instead of 5"):
        episodes(TargetNFE(lanes, 5, 3.0), [[32]])
    assert lanes.reward_config.efficiency == 1.0


def test_the_alarms_memory_travels():
    first, second = CollapseAlarm(window=2), CollapseAlarm(window=2)
    feed(first, [[(0, 50)] * 3])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    with pytest.warns(CollapseWarning):
        feed(second, [[(0, 50)] * 3])


@pytest.mark.parametrize("bad", [{"window": 0}, {"share": 1.0}, {"share": 0}])
def test_a_bad_alarm_is_refused(bad):
    with pytest.raises(ValueError, match="window >= 1"):
        CollapseAlarm(**bad)


# ------------------------------------------------------------------ prompts


@pytest.mark.parametrize(
    ("prompt", "things"),
    [
        ("a photo of a bench", 1),
        ("a red circle", 1),
        ("a triangle and a large cross", 2),
        ("a photo of a bench left of a cat", 2),
        ("a star to the left of a circle", 2),
        ("three dogs", 3),
        ("a blue square, a pink triangle, a purple triangle and a green cross", 4),
        ("two cats on a sofa, and a lamp", 4),
        ("", 1),
    ],
)
def test_prompt_complexity(prompt, things):
    assert prompt_complexity(prompt) == things
    assert complexity_group(prompt) == ("1" if things == 1 else "2" if things == 2 else "3+")


PROMPTS = ["a cat", "a cat and a dog", "a cat, a dog and a cow"]


def test_the_curriculum_opens_with_progress():
    order = PromptOrder(PROMPTS, [Stage(0.2, 1, "simple"), Stage(0.5, 2, "mixed")])
    order.seed(0)
    for progress, allowed in ((0.0, 1), (0.19, 1), (0.2, 2), (0.5, 3), (1.0, 3)):
        order.progress = progress
        assert {order.draw()[0] for _ in range(60)} == set(PROMPTS[:allowed])


def test_the_order_is_a_stream_that_can_be_saved():
    order, again = PromptOrder(PROMPTS), PromptOrder(PROMPTS)
    order.seed(3)
    order.draw()
    order.progress = 0.4
    again.load_state_dict(json.loads(json.dumps(order.state_dict())))
    assert [order.draw() for _ in range(20)] == [again.draw() for _ in range(20)]
    assert again.progress == 0.4


@pytest.mark.parametrize(
    ("stages", "complaint"),
    [
        ([Stage(0.5, 1), Stage(0.2, 2)], r"\[0.5, 0.2\]"),
        ([Stage(0.5, 0, "none")], "'none'.*3 prompts"),
        ([Stage(2, 1)], "2"),
    ],
)
def test_bad_stages_are_named(stages, complaint):
    with pytest.raises(ValueError, match=complaint):
        PromptOrder(PROMPTS, stages)
