"""The adaptive pipeline against one lane driven by hand, and its errors."""

import gymnasium as gym
import numpy as np
import pytest

from addiff_env.agent import Agent, PolicyNet
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.methods.policy_method import PolicyMethod
from addiff_env.evaluation.methods.rule_policies import RandomPolicy, RefineAlways, StopAt, ThresholdRule
from addiff_env.evaluation.methods.samplers import FixedSteps
from addiff_env.pipeline import AdaptivePipeline, make_agent_env
from addiff_env.sb3 import observation_parts

PROMPTS = ["a red circle", "two blue squares", "a star above a green ring", "a pink cross", "a large circle"]
SEEDS = [3, 1, 4, 1, 5]


class ScriptedAgent(Agent):
    """Stops after a number of steps that depends on the prompt alone, and refines once where it is even."""

    def act(self, obs, action_mask=None, deterministic=True, rng=None):
        width = self.config["observation"]["clip_text"]
        count = (obs[:, width : 2 * width] > 0).sum(1)
        step, nfe = np.rint(obs[:, -3] * 6), np.rint(obs[:, -2] * 12)
        refine = (count % 2 == 0) & (nfe == 3)
        return np.where(refine, 2, np.where(step >= 3 + count % 3, 1, 0)).astype(np.int64)


@pytest.fixture(scope="module")
def agent(small_kwargs):
    config = {"env": {"id": "AdDiffusion-Tiny-v0", "kwargs": small_kwargs}, "hidden": 16}
    parts = observation_parts(make_agent_env(Agent(PolicyNet({"x": 1}), config), 1))
    return ScriptedAgent(PolicyNet(parts, 16), config | {"observation": parts})


def by_hand(agent, prompt, seed):
    env = make_agent_env(agent, 1)
    observation, info = env.reset(options={"prompt": [prompt], "seed": [seed]})
    actions, ended = [], False
    while not ended:
        observation, _, terminated, _, info = env.step(agent.act(observation, info["action_mask"]))
        actions.append(int(info["action_taken"][0]))
        ended = bool(terminated[0])
    return actions, int(info["nfe"][0]), env.final_image(0), float(info["net_flops"][0])


def test_lanes_that_refill_give_what_one_lane_gives(agent):
    results = AdaptivePipeline(make_agent_env(agent, 2), agent)(PROMPTS, SEEDS)
    for result, prompt, seed in zip(results, PROMPTS, SEEDS, strict=True):
        actions, nfe, picture, flops = by_hand(agent, prompt, seed)
        assert (result.prompt, result.seed, result.actions, result.nfe) == (prompt, seed, actions, nfe)
        assert np.abs(result.picture.astype(int) - picture).max() <= 1
        assert result.net_flops == pytest.approx(flops + len(actions) * agent.flops)
        assert result.seconds > 0
    assert len({len(result.actions) for result in results}) > 1  # lanes really ended at different times
    assert any(2 in result.actions for result in results)


def test_one_prompt_is_enough_and_numbers_must_agree(agent):
    pipeline = AdaptivePipeline(make_agent_env(agent, 2), agent)
    assert pipeline("a red circle", seeds=3)[0].actions == pipeline(["a red circle"], seeds=[3])[0].actions
    assert len(pipeline(["a star", "a ring"])) == 2  # seeds drawn
    with pytest.raises(ValueError, match="2 prompts but 1 seeds"):
        pipeline(["a", "b"], seeds=[1])
    with pytest.raises(TypeError, match="7"):
        pipeline(["a red circle", 7], seeds=[1, 2])


def test_fixed_steps_equal_an_episode_of_continues(agent):
    env = make_agent_env(agent, 1)
    item = Item("a red circle", 5, "colors")
    ((_, made),) = next(iter(FixedSteps(env, env.config.num_inference_steps).make([item])))
    env.reset(options={"prompt": [item.prompt], "seed": [item.seed]})
    while not env.done[0]:
        env.step(np.array([0]))
    assert np.abs(made.picture.astype(int) - env.final_image(0)).max() <= 1
    assert made.nfe == env.nfe[0] == 6 and made.forward_passes == 12
    assert made.net_flops < env.net_flops[0]  # nobody looked


def test_agent_method_names_every_item_once(agent):
    items = [Item(p, s, "colors") for p, s in zip(PROMPTS, SEEDS, strict=True)]
    made = [pair for group in PolicyMethod(make_agent_env(agent, 3), agent).make(items) for pair in group]
    assert sorted((i.prompt, g.prompt) for i, g in made) == sorted((p, p) for p in PROMPTS)


def bill(env, made, read):
    """What a program of a rule alone would spend: only the looks that it reads, and only the reward model's part."""
    verdict = env.flops_per_call["preview"] + env.perception.scorer_flops(64, 64)
    text = env.flops_per_call["start"] - env.perception.text_flops()
    return made.forward_passes * env.flops_per_call["denoiser"] + env.flops_per_call["decode"] + text + read * verdict


class Noted(ThresholdRule):
    """A rule that refines without end, and counts the looks that it reads."""

    read = 0

    def sees(self, obs):
        looks = super().sees(obs)
        type(self).read += int(looks.sum())
        return looks

    def act(self, obs, action_mask=None):
        before, actions = type(self).read, super().act(obs, action_mask)
        type(self).read = before  # asked once more in there
        return actions


def test_rules_pay_for_the_looks_that_they_read(agent):
    env = make_agent_env(agent, 2)  # 6 steps, the first 2 mandatory
    for rule in (StopAt(5, 6), RefineAlways(), RandomPolicy([0.6, 0.1, 0.3])):
        for made in AdaptivePipeline(env, rule)(PROMPTS, SEEDS):
            assert made.net_flops == pytest.approx(bill(env, made, 0)), rule.fingerprint
    for made in AdaptivePipeline(env, ThresholdRule(4, -100.0, 6))(PROMPTS, SEEDS):
        assert made.actions == [0, 0, 1] and made.net_flops == pytest.approx(bill(env, made, 1))
    (made,) = AdaptivePipeline(env, Noted(4, 100.0, 6))(PROMPTS[:1], SEEDS[:1])
    assert 1 < Noted.read < len(made.actions)  # a refinement rewinds to before its look, whence it goes on blindly
    assert made.net_flops == pytest.approx(bill(env, made, Noted.read))


def test_looks_are_paid_as_often_as_the_environment_looks(agent):
    env = make_agent_env(agent, 1, observe_every=2)
    (made,) = AdaptivePipeline(env, ThresholdRule(2, 100.0, 6))(PROMPTS[:1], SEEDS[:1])
    looks = 1 + (len(made.actions) - 1) // 2  # after the warm-up, and after every other decision but the last
    assert len(made.actions) > 3 and made.net_flops == pytest.approx(bill(env, made, looks))


def test_an_environment_of_one_lane_is_refused_by_name(small_kwargs):
    env = gym.make("AdDiffusion-Tiny-v0", **small_kwargs)
    with pytest.raises(TypeError, match="DiffusionDenoiseVectorEnv"):
        AdaptivePipeline(env, StopAt(2, 4))
