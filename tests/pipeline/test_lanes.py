"""Lanes that refill against one lane driven by hand, what is charged, and who may watch and stop them."""

from itertools import islice

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from addiff_env.agent import Agent, PolicyNet
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.methods.policy_method import PolicyMethod
from addiff_env.evaluation.methods.rule_policies import RandomPolicy, RefineAlways, StopAt, ThresholdRule
from addiff_env.evaluation.methods.samplers import FixedSteps
from addiff_env.pipeline import LaneScheduler, Request, make_agent_env
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


def play(env, policy, prompts=PROMPTS, seeds=SEEDS, **options):
    """Every picture, in the order of its prompt."""
    requests = [Request(index, *what) for index, what in enumerate(zip(prompts, seeds, strict=True))]
    made = dict(pair for group in LaneScheduler(env, policy, **options).run(requests) for pair in group)
    return [made[index] for index in range(len(requests))]


@pytest.fixture(scope="module")
def agent(small_kwargs):
    config = {"env": {"id": "AdDiffusion-Tiny-v0", "kwargs": small_kwargs}, "hidden": 16}
    parts = observation_parts(make_agent_env(Agent(PolicyNet({"x": 1}), config), 1))
    return ScriptedAgent(PolicyNet(parts, 16), config | {"observation": parts})


def by_hand(agent, env, prompt, seed):
    observation, info = env.reset(options={"prompt": [prompt], "seed": [seed]})
    actions, ended = [], False
    while not ended:
        observation, _, terminated, _, info = env.step(agent.act(observation, info["action_mask"]))
        actions.append(int(info["action_taken"][0]))
        ended = bool(terminated[0])
    return actions, int(info["nfe"][0]), env.final_image(0), float(info["net_flops"][0])


@pytest.fixture(scope="module")
def lanes(agent):
    """Environments of one to four lanes."""
    return {number: make_agent_env(agent, number) for number in (1, 2, 3, 4)}


@pytest.mark.parametrize("defer", [False, True])
def test_lanes_that_refill_give_what_one_lane_gives(agent, lanes, defer):
    results = play(lanes[2], agent, full_batches=defer)
    for result, prompt, seed in zip(results, PROMPTS, SEEDS, strict=True):
        actions, nfe, picture, flops = by_hand(agent, lanes[1], prompt, seed)
        assert (result.prompt, result.seed, result.actions, result.nfe) == (prompt, seed, actions, nfe)
        assert np.abs(result.picture.astype(int) - picture).max() <= 1
        assert result.net_flops == pytest.approx(flops + len(actions) * agent.flops)
        assert result.seconds > 0
    assert len({len(result.actions) for result in results}) > 1  # lanes really ended at different times
    assert any(2 in result.actions for result in results)


@pytest.fixture(scope="module")
def alone(agent, lanes):
    """Each picture made with nobody beside it."""
    made = {}

    def of(prompt, seed):
        if (prompt, seed) not in made:
            made[prompt, seed] = play(lanes[1], agent, [prompt], [seed])[0]
        return made[prompt, seed]

    return of


@settings(max_examples=8)
@given(st.data())
def test_neither_neighbours_nor_the_number_of_lanes_change_a_picture(agent, lanes, alone, data):
    number, defer = data.draw(st.sampled_from([1, 2, 3, 4])), data.draw(st.booleans())
    pairs = data.draw(st.lists(st.tuples(st.sampled_from(PROMPTS), st.integers(0, 2)), min_size=1, max_size=6))
    results = play(lanes[number], agent, *zip(*pairs, strict=True), full_batches=defer)
    for result, pair in zip(results, pairs, strict=True):
        expected = alone(*pair)
        assert (result.actions, result.nfe, result.net_flops) == (expected.actions, expected.nfe, expected.net_flops)
        assert np.abs(result.picture.astype(int) - expected.picture).max() <= 1
        assert result.reward_score == pytest.approx(expected.reward_score, abs=1e-3)
        assert result.reward == pytest.approx(expected.reward, abs=1e-3)


def test_starting_lanes_share_the_batch_of_those_that_run(agent, monkeypatch):
    """Every denoiser call serves all lanes that there is work for."""
    env, sizes = make_agent_env(agent, 2), []
    predict = env.backbone.predict

    def counted(latents, *args, **kwargs):
        sizes.append(len(latents))
        return predict(latents, *args, **kwargs)

    monkeypatch.setattr(env.backbone, "predict", counted)
    play(env, StopAt(4, 6), PROMPTS[:4], SEEDS[:4], full_batches=True)
    assert sizes == [2] * 8
    sizes.clear()
    play(env, StopAtWords(), ["a star", "a red star"] * 2, range(4), full_batches=True)
    # The lanes evaluate 3 and 4 times in turn, and stop in a step of their own, in which the other one is alone.
    assert sizes == [2, 2, 2, 1, 1, 2, 2, 1, 1]


class StopAtWords(StopAt):
    """Stops after one step more than the prompt has words."""

    def __init__(self):
        super().__init__(3, 6)

    def act_in(self, obs, action_mask, episodes):
        done = np.rint(np.asarray(obs)[:, -3] * 6)
        return np.where(done >= [1 + len(made.prompt.split()) for made in episodes], 1, 0)


def test_lanes_that_nobody_waits_for_do_not_run_on(agent):
    env = make_agent_env(agent, 2)
    requests = [Request(index, prompt, 1) for index, prompt in enumerate(PROMPTS)]
    stream = LaneScheduler(env, agent, True).run(requests)
    next(stream)
    stream.close()
    assert env.done.all()

    def failing(step):
        raise KeyError("watcher")

    with pytest.raises(KeyError, match="watcher"):
        list(LaneScheduler(env, agent, True, failing).run(requests))
    assert env.done.all()
    assert [made.prompt for made in play(env, agent)] == PROMPTS


def test_requests_are_taken_as_lanes_become_free(agent):
    taken = []

    def requests():
        for index in range(1000):
            taken.append(index)
            yield Request(index, "a star", index)

    stream = LaneScheduler(make_agent_env(agent, 3), StopAt(3, 6), True).run(requests())
    made = [pair for group in islice(stream, 2) for pair in group]
    assert len(made) == 6 and len(taken) == 6  # not a thousand


def test_whoever_watches_sees_each_step_and_may_stop_a_lane(agent):
    env, seen = make_agent_env(agent, 2), {}

    def watch(step):
        seen.setdefault(step.episode.request.index, []).append(
            (step.action, step.step_index, step.nfe, step.timestep, step.finished)
        )
        assert step.latents.shape == env.latent_shape and step.preview.shape == (64, 64, 3)
        assert step.probabilities is None or step.probabilities.sum() == pytest.approx(1)
        assert (step.probabilities is None) == (step.action is None)
        return step.episode.request.index == 1 and step.step_index == 1

    grid = env.denoiser.timesteps
    results = play(env, agent, watch=watch, full_batches=True, probabilities=True)
    for index, result in enumerate(results):
        assert [action for action, *_ in seen[index]] == [None, None, *result.actions]
        assert [step[4] for step in seen[index]] == [False] * (len(seen[index]) - 1) + [True]
        assert seen[index][0] == (None, 1, 1, grid[1], False)
    assert results[1].actions == [1] and results[1].nfe == 2  # at its first decision
    assert [made.actions for made in results[:1] + results[2:]] == [
        made.actions for index, made in enumerate(play(env, agent)) if index != 1
    ]


def test_previews_are_those_that_were_decided_at_and_masks_those_of_refinements(agent):
    for defer in (False, True):
        for made in play(make_agent_env(agent, 2), agent, previews=True, masks=True, full_batches=defer):
            assert len(made.previews) == len(made.actions) and len(made.masks) == made.actions.count(2)
            assert all(preview.shape == (64, 64, 3) and preview.dtype == np.uint8 for preview in made.previews)
            assert all(mask.shape == (16, 16) and 0 <= mask.min() and mask.max() <= 1 for mask in made.masks)
    assert not any(made.previews or made.masks for made in play(make_agent_env(agent, 2), agent))


def test_noise_that_is_brought_along_is_that_of_its_seed(agent):
    env = make_agent_env(agent, 2)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(1, *env.latent_shape, generator=generator)[0]
    both = [Request(0, "a star", 5), Request(1, "a star", 77, latents=noise), Request(2, "a ring", 6)]
    for request in (both, both[::-1]):
        made = dict(pair for group in LaneScheduler(env, StopAt(4, 6)).run(request) for pair in group)
        assert np.abs(made[0].picture.astype(int) - made[1].picture).max() <= 1
        assert np.abs(made[0].picture.astype(int) - made[2].picture).max() > 1


def test_a_lane_that_breaks_down_is_alone_in_it(agent, monkeypatch):
    """In the warm-up or later; the others do not notice, and it says so."""
    env = make_agent_env(agent, 2)
    expected, evaluate = play(env, StopAt(5, 6)), env.denoiser.evaluate
    bad = PROMPTS[1]
    for breaks_at in (1, 4):

        def broken(state, lanes, timesteps, *args, at=env.denoiser.timesteps[breaks_at]):
            evaluate(state, lanes, timesteps, *args)
            state.nonfinite[
                [lane for lane, t in zip(lanes, timesteps, strict=True) if (env.prompt[lane], t) == (bad, at)]
            ] = True

        with monkeypatch.context() as patch:
            patch.setattr(env.denoiser, "evaluate", broken)
            results = play(env, StopAt(5, 6), full_batches=True)
        assert [made.fault for made in results] == [prompt == bad for prompt in PROMPTS]
        assert "finite" in results[1].note and results[1].picture.shape == (64, 64, 3)
        for index in (0, 2, 3, 4):
            assert np.abs(results[index].picture.astype(int) - expected[index].picture).max() <= 1


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
        for made in play(env, rule):
            assert made.net_flops == pytest.approx(bill(env, made, 0)), rule.fingerprint
    for made in play(env, ThresholdRule(4, -100.0, 6), full_batches=True):
        assert made.actions == [0, 0, 1] and made.net_flops == pytest.approx(bill(env, made, 1))
    (made,) = play(env, Noted(4, 100.0, 6), PROMPTS[:1], SEEDS[:1], full_batches=True)
    assert 1 < Noted.read < len(made.actions)  # a refinement rewinds to before its look, whence it goes on blindly
    assert made.net_flops == pytest.approx(bill(env, made, Noted.read))


def test_looks_are_paid_as_often_as_the_environment_looks(agent):
    env = make_agent_env(agent, 1, observe_every=2)
    (made,) = play(env, ThresholdRule(2, 100.0, 6), PROMPTS[:1], SEEDS[:1])
    looks = 1 + (len(made.actions) - 1) // 2  # after the warm-up, and after every other decision but the last
    assert len(made.actions) > 3 and made.net_flops == pytest.approx(bill(env, made, looks))


def test_an_environment_of_one_lane_is_refused_by_name(small_kwargs):
    env = gym.make("AdDiffusion-Tiny-v0", **small_kwargs)
    with pytest.raises(TypeError, match="DiffusionDenoiseVectorEnv"):
        LaneScheduler(env, StopAt(2, 4))


def test_whoever_is_asked_for_at_a_price_pays_it(agent):
    env, made = make_agent_env(agent, 2), []
    for price in (0.25, 0.5):
        requests = [Request(0, "a star", 0, price=price)]
        made += [one for group in LaneScheduler(env, StopAt(3, 6)).run(requests) for _, one in group]
    cheap, dear = made
    assert cheap.reward - dear.reward == pytest.approx(0.25 * (cheap.nfe - 2))  # the warm-up is not charged
