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


# ------------------------------------------------------------------ prices


class PricedAgent(Agent):
    """Stops the sooner the dearer an evaluation is."""

    def act(self, obs, action_mask=None, deterministic=True, rng=None):
        price, step = obs[:, -9], np.rint(obs[:, -3] * 6)
        return np.where(step >= 4 - price, 1, 0).astype(np.int64)


def priced_agent(kwargs, table=None):
    env = {"id": "AdDiffusion-Tiny-v0", "kwargs": {**kwargs, "price_range": [0.001, 0.016]}}
    parts = {"clip_image": 128, "clip_text": 128, "timestep": 128, "price": 1, "quality": 8}
    kept = {} if table is None else {"prices": table}
    return PricedAgent(PolicyNet(parts, 4), {"env": env, "hidden": 4, "observation": parts} | kept)


def test_a_price_decides_what_a_picture_costs(small_kwargs):
    points = [
        {"price": price, "nfe": nfe, "net_flops": nfe, "reward": 0.5, "quality": 0.5}
        for price, nfe in ((0.001, 5), (0.004, 4), (0.016, 3))
    ]
    agent = priced_agent(small_kwargs, {"points": points, "measured_on": {}})
    pipeline = AdaptivePipeline(make_agent_env(agent, 2), agent)
    for price, nfe in ((0.001, 5), (0.004, 4), (0.016, 3)):
        made = pipeline(PROMPTS, SEEDS, price=price)
        assert {(picture.nfe, picture.price) for picture in made} == {(nfe, price)}
        assert [picture.nfe for picture in pipeline(PROMPTS[:1], SEEDS[:1], target_nfe=nfe)] == [nfe]
    named, drawn = (pipeline.env.reset(options=o)[1]["price"] for o in ({"price": 0.002}, {"seed": [1, 2]}))
    assert named.tolist() == [0.002] * 2 and len(set(drawn)) == 2  # the environment is as it was


def test_a_call_names_price_or_target(agent, small_kwargs):
    priced = AdaptivePipeline(make_agent_env(priced_agent(small_kwargs), 1), priced_agent(small_kwargs))
    for asked in ({}, {"price": 0.004, "target_nfe": 4}):
        with pytest.raises(ValueError, match="price or target_nfe"):
            priced("a star", 0, **asked)
    for price in (0.1, 0, -1, float("nan"), "0.004"):
        with pytest.raises(ValueError, match="price must"):
            priced("a star", 0, price=price)
    with pytest.raises(ValueError, match="addiff agent table"):
        priced("a star", 0, target_nfe=4)
    plain = AdaptivePipeline(make_agent_env(agent, 1), agent)
    for asked in ({"price": 0.004}, {"target_nfe": 4}):
        with pytest.raises(ValueError, match="no price input"):
            plain("a star", 0, **asked)
    with pytest.raises(ValueError, match=r"price_range \[0.001, 0.016\], the environment has \[0.001, 0.1\]"):
        AdaptivePipeline(make_agent_env(priced_agent(small_kwargs), 1, price_range=[0.001, 0.1]), priced.agent)
    rule = AdaptivePipeline(make_agent_env(agent, 1), StopAt(3, 6))
    with pytest.raises(ValueError, match="target_nfe=4"):
        rule("a star", 0, target_nfe=4)
    cheap, dear = (rule("a star", 0, price=price)[0] for price in (0.25, 0.5))
    assert cheap.reward - dear.reward == pytest.approx(0.25 * (cheap.nfe - 2))  # the warm-up is not charged
