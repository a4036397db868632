"""Baselines by hand: what is decided, what it costs, and that all start from the same noise."""

from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from gymnasium.vector import AutoresetMode
from hypothesis import given
from hypothesis import strategies as st

from addiff_env.diffusion.backbones import to_uint8
from addiff_env.env import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.methods.controls import MatchedSteps, Replay
from addiff_env.evaluation.methods.diffusers_methods import DiffusersSolver
from addiff_env.evaluation.methods.policy_method import PolicyMethod
from addiff_env.evaluation.methods.registry import fitting, known_methods, make_method, method
from addiff_env.evaluation.methods.rule_policies import RandomPolicy, RefineAlways, StopAt, ThresholdRule, TwoStepRule
from addiff_env.evaluation.methods.samplers import FixedSteps
from addiff_env.evaluation.methods.search import SEED_STRIDE
from addiff_env.evaluation.statistics.families import CONTINUED, FULL_IMAGE
from addiff_env.perception.features import QUALITY
from addiff_env.types import Action, Generated, ResultRow

ITEMS = [
    Item("a red circle", 3, "colors"),
    Item("two blue squares", 1, "counting"),
    Item("a star above a green ring", 4, "position"),
]
CONTINUE, STOP, REFINE = (int(action) for action in Action)


@pytest.fixture(scope="module")
def env(small_kwargs: dict[str, Any]) -> DiffusionDenoiseVectorEnv:
    made = gym.make_vec("AdDiffusion-Tiny-v0", 2, autoreset_mode=AutoresetMode.DISABLED, **small_kwargs).unwrapped
    assert isinstance(made, DiffusionDenoiseVectorEnv)
    return made


def results(spec: str, env: DiffusionDenoiseVectorEnv, items: list[Item] = ITEMS) -> list[Generated]:
    """Results in the items' order."""
    made = {
        item.seed: result
        for group in make_method(spec, env, benchmark=ITEMS).make(list(items))
        for item, result in group
    }
    assert len(made) == len(items)
    return [made[item.seed] for item in items]


def observations(scores: list[float], steps: list[int], number: int) -> np.ndarray:
    obs = np.zeros((len(scores), 20), np.float32)
    obs[:, QUALITY.index("reward_score") - 8] = scores
    obs[:, QUALITY.index("step_ratio") - 8] = np.array(steps) / number
    return obs


# ------------------------------------------------------------------ policies


def test_threshold_rule_by_hand() -> None:
    rule = ThresholdRule(look_at=9, tau=0.5, num_inference_steps=10)
    obs = observations([-1, 0.4, 0.6, 0.4], [8, 9, 9, 9], 10)
    mask = np.ones((4, 3), bool)
    mask[3, REFINE] = False
    assert rule.act(obs, mask).tolist() == [CONTINUE, REFINE, STOP, STOP]
    assert rule.act(obs).tolist() == [CONTINUE, REFINE, STOP, REFINE]
    assert rule.fingerprint == "threshold-9-0.5"


def test_two_step_rule_by_hand() -> None:
    rule = TwoStepRule(early=0.2, turn=6, late=0.5, enough=0.9, num_inference_steps=10, outlook=0)
    obs = observations([0, 3, 3, 0, 3, 3], [4, 4, 4, 6, 6, 6], 10)  # a score of 3: 0.95
    obs[:, 0] = [-2, -1, -2, -0.1, 0.1, -0.1]  # 0.12, 0.27, 0.12, 0.48, 0.52, 0.48
    mask = np.ones((6, 3), bool)
    assert rule.act(obs, mask).tolist() == [REFINE, STOP, REFINE, REFINE, STOP, REFINE]
    mask[[2, 5], REFINE] = False
    assert rule.act(obs, mask).tolist() == [REFINE, STOP, CONTINUE, REFINE, STOP, CONTINUE]
    never = TwoStepRule(early=0, turn=6, late=0.5, enough=2, num_inference_steps=10, outlook=0)
    assert never.act(obs).tolist() == [CONTINUE] * 3 + [REFINE, CONTINUE, REFINE]
    assert rule.sees(obs).all()


def test_a_two_step_rule_wants_a_scorer_that_foretells(env: DiffusionDenoiseVectorEnv) -> None:
    with pytest.raises(ValueError, match="foretells"):
        results("two-step:0.2:6:0.5:0.9", env)


def test_other_rules_by_hand() -> None:
    obs, mask = observations([0, 0], [3, 4], 10), np.array([[True] * 3, [True, True, False]])
    assert StopAt(4, 10).act(obs, mask).tolist() == [CONTINUE, STOP]
    assert RefineAlways().act(obs, mask).tolist() == [REFINE, CONTINUE]


def test_random_policy_has_its_shares_and_respects_the_mask() -> None:
    obs, shares = np.zeros((20_000, 20), np.float32), [0.7, 0.1, 0.2]
    drawn = RandomPolicy(shares, seed=0).act(obs)
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / len(drawn), shares, atol=0.015)
    assert RandomPolicy(shares, seed=0).act(obs).tolist() == drawn.tolist()
    mask = np.tile([True, True, False], (20_000, 1))
    drawn = RandomPolicy(shares, seed=0).act(obs, mask)
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / len(drawn), [0.875, 0.125, 0], atol=0.015)
    assert RandomPolicy([0, 0, 1]).act(obs[:2], mask[:2]).tolist() == [CONTINUE, CONTINUE]
    with pytest.raises(ValueError, match=r"0\.5, 0\.2"):
        RandomPolicy([0.5, 0.2])


# ------------------------------------------------------------------ methods


@pytest.mark.parametrize("spec", ["stop-3", "threshold:5:0.0", "refine-always", "random:0.7:0.1:0.2"])
def test_rules_run_on_the_environment(spec: str, env: DiffusionDenoiseVectorEnv) -> None:
    made = results(spec, env)
    assert all(r.picture.shape == (64, 64, 3) and r.actions and r.nfe > 0 for r in made)
    if spec == "stop-3":
        assert [r.nfe for r in made] == [3, 3, 3] and all(r.actions == [CONTINUE, STOP] for r in made)
    if spec == "refine-always":
        assert all(REFINE in r.actions for r in made)


def test_fixed_steps_and_diffusers_agree(env: DiffusionDenoiseVectorEnv) -> None:
    ours = FixedSteps(env, 6)
    theirs = DiffusersSolver(env, "ddim", 6, DDIMScheduler)
    for (_, a), (_, b) in zip(*(next(iter(m.make(ITEMS))) for m in (ours, theirs)), strict=True):
        assert np.abs(a.picture.astype(int) - b.picture).max() <= 1
        assert (a.nfe, a.forward_passes) == (b.nfe, b.forward_passes) == (6, 12)
        assert a.net_flops == pytest.approx(b.net_flops)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' own, under NumPy 2
@pytest.mark.parametrize(("spec", "nfe"), [("euler-4", 4), ("unipc-4", 4), ("pndm-5", 6), ("dpmpp_2m-4", 4)])
def test_other_solvers_count_their_evaluations(spec: str, nfe: int, env: DiffusionDenoiseVectorEnv) -> None:
    made = results(spec, env)
    assert [r.nfe for r in made] == [nfe] * 3 and [r.forward_passes for r in made] == [2 * nfe] * 3
    fixed = results("ddim-4", env)
    assert made[0].net_flops - fixed[0].net_flops == pytest.approx(2 * (nfe - 4) * env.flops_per_call["denoiser"])


def test_best_of_keeps_the_best(env: DiffusionDenoiseVectorEnv) -> None:
    made = results("best-of-3:ddim-4", env)
    for item, result in zip(ITEMS, made, strict=True):
        tries = [Item(item.prompt, item.seed + SEED_STRIDE * k, "") for k in range(3)]
        pictures = np.stack([r.picture for r in results("ddim-4", env, tries)])
        tensor = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
        best = int(env.perception.look(tensor, [item.prompt] * 3).reward_score.argmax())
        assert np.abs(result.picture.astype(int) - pictures[best]).max() <= 1
        assert result.nfe == 12 and result.seed == item.seed


def test_best_of_asks_the_reward_model_alone(env: DiffusionDenoiseVectorEnv) -> None:
    one, two = results("ddim-8", env)[0], results("best-of-2:ddim-4", env)[0]
    verdict = env.perception.scorer_flops(64, 64)
    assert 0 < verdict < env.flops_per_call["look"] - env.flops_per_call["preview"]
    assert two.net_flops - one.net_flops == pytest.approx(env.flops_per_call["decode"] + 2 * verdict)


def stages(env: DiffusionDenoiseVectorEnv, item: Item) -> list[torch.Tensor]:
    """The decoded x0 of every step of DDIM-6."""
    seen: list[torch.Tensor] = []
    FixedSteps(env, 6).latents([item.prompt], [item.seed], lambda i, x, now: seen.append(env.backbone.decode(now.x0)))
    return seen


def test_oracle_stop_is_the_best_stop(env: DiffusionDenoiseVectorEnv) -> None:
    for item, result in zip(ITEMS, results("oracle-stop:ddim-6", env), strict=True):
        previews = stages(env, item)
        scores = [float(env.perception.look(picture, [item.prompt]).reward_score) for picture in previews]
        best = int(np.argmax(scores))
        assert result.nfe == best + 1
        assert np.abs(result.picture.astype(int) - to_uint8(previews[best])[0]).max() <= 1


def test_oracle_stop_finishes_as_the_environment_does(small_kwargs: dict[str, Any]) -> None:
    settings = {**small_kwargs, "finish_steps": 2}
    env: Any = gym.make_vec("AdDiffusion-Tiny-v0", 2, autoreset_mode=AutoresetMode.DISABLED, **settings).unwrapped
    for chosen, spec in ((3, "stop-3"), (6, "ddim-6")):
        method: Any = make_method("oracle-stop:ddim-6", env)
        looks: list[int] = []

        def likes(pictures: torch.Tensor, prompts: list[str], looks: list[int] = looks, k: int = chosen) -> Any:
            looks.append(len(looks) + 1)
            return torch.full((len(prompts),), float(looks[-1] == k))

        method.score = likes
        made = {item.seed: result for group in method.make(list(ITEMS)) for item, result in group}
        assert looks == [1, 2, 3, 4, 5, 6]
        for item, wanted in zip(ITEMS, results(spec, env), strict=True):
            assert np.abs(made[item.seed].picture.astype(int) - wanted.picture).max() <= 1
            assert made[item.seed].nfe == wanted.nfe == (chosen + 2 if chosen < 6 else 6)
            assert made[item.seed].net_flops == pytest.approx(wanted.net_flops)


def test_oracle_stop_takes_a_named_scorer(env: DiffusionDenoiseVectorEnv) -> None:
    spec = f"oracle-stop:ddim-6@clipscore:{env.config.clip}"
    named = make_method(spec, env)
    assert named.name == spec
    ((_, made),) = next(iter(named.make(ITEMS[:1])))
    clip, prompt = env.perception.clip, ITEMS[0].prompt
    seen = stages(env, ITEMS[0])
    scores = [float((clip.image_features(picture) * clip.text_features([prompt])).sum()) for picture in seen]
    assert made.nfe == int(np.argmax(scores)) + 1
    with pytest.raises(FileNotFoundError, match="no scorer 'beauty'.*imagereward"):
        make_method("oracle-stop:ddim-6@beauty", env)


def test_longer_prompts_get_more_steps(env: DiffusionDenoiseVectorEnv) -> None:
    made = results("words-6", env)  # 3, 3 and 6 words: mean 4
    assert [r.nfe for r in made] == [4, 4, 9]
    assert [r.nfe for r in results("words-6", env, ITEMS[1:])] == [4, 9]  # as in the whole benchmark
    assert [r.nfe for r in results("words-6.8", env)] == [5, 5, 10]
    whole, part = (make_method("words-6.8", env, benchmark=items) for items in (ITEMS, ITEMS[1:]))
    assert whole.name == part.name == "words-6.8" and whole.policy != part.policy  # no row of one is one of the other


def test_random_actions_do_not_depend_on_the_batch(env: DiffusionDenoiseVectorEnv) -> None:
    whole = results("random:0.6:0.1:0.3", env)
    assert len({tuple(made.actions) for made in whole}) > 1
    for item, made in zip(ITEMS, whole, strict=True):
        (alone,) = results("random:0.6:0.1:0.3", env, [item])
        assert alone.actions == made.actions


@pytest.mark.parametrize(
    "spec",
    [
        "ddim",
        "ddim-x",
        "ddim-0",
        "heun-5",
        "best-of-0:ddim-4",
        "best-of-2:unipc-4",
        "best-of-auto",
        "words-0.5",
        "words-x",
        "words-auto",
        "threshold:auto",
        "threshold:x:1",
        "threshold:5:y",
        "random:auto",
        "ddim--5",
        "ddim-1_0",
        "ddim-5 ",
        "oracle-stop:ddim",
        "",
        "{steps}",
        "agent:ddim-5",
        "threshold:5",
        "random:1:1:1",
        "agent",
        "threshold:5:nan",
        "words-inf",
        "two-step:nan:5:0.5:2",
        "random:nan:0:0",
        "fk-2:ddim-5@nan",
        "restart-15:ddim-10@0.1:1e999",
    ],
)
def test_bad_names_are_quoted(spec: str, env: DiffusionDenoiseVectorEnv) -> None:
    with pytest.raises(ValueError) as error:
        make_method(spec, env)
    assert repr(spec) in str(error.value) and all(pattern in str(error.value) for pattern in known_methods())


@given(
    st.integers(1, 99), st.sampled_from(["ddim", "dpmpp_2m"]), st.integers(1, 99), st.sampled_from(["", "pick:a@b:c-1"])
)
def test_names_are_read_as_their_patterns_say(number: int, solver: str, steps: int, scorer: str) -> None:
    end = {"scorer": scorer} if scorer else {}
    name = f"oracle-stop:{solver}-{steps}" + (f"@{scorer}" if scorer else "")
    pattern, fields = fitting(name)
    assert pattern.convert(fields) == {"solver": solver, "steps": steps, **end}
    pattern, fields = fitting(f"best-of-{number}:{solver}-{steps}")
    assert pattern.convert(fields) == {"number": number, "solver": solver, "steps": steps}


def test_a_method_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'ddim-{steps}' is registered already"):
        method("ddim-{steps}")(lambda setup, steps: None)


# ------------------------------------------------------------------ controls of H4


def rows_of(made: list[Generated]) -> dict[tuple[str, int], ResultRow]:
    named = {"method": "agent", "backbone": "", "solver": "", "policy": "", "dtype": "", "code_version": ""}
    return {
        (item.prompt, item.seed): ResultRow(
            prompt=item.prompt, seed=item.seed, category="", actions=m.actions, nfe=m.nfe, **named
        )
        for item, m in zip(ITEMS, made, strict=True)
    }


def in_order(method: Any) -> list[Generated]:
    made = {item.seed: result for group in method.make(list(ITEMS)) for item, result in group}
    return [made[item.seed] for item in ITEMS]


def test_a_replay_on_the_same_settings_is_the_same(env: DiffusionDenoiseVectorEnv) -> None:
    drawn = RandomPolicy([0.6, 0.05, 0.35])
    looking: Any = SimpleNamespace(act=drawn.act, act_in=drawn.act_in, flops=0.0, fingerprint="looks")  # as an agent
    played = in_order(PolicyMethod(env, looking))
    again = in_order(Replay(env, "again", rows_of(played)))
    for one, other in zip(played, again, strict=True):
        assert (one.actions, one.nfe, one.forward_passes) == (other.actions, other.nfe, other.forward_passes)
        assert one.net_flops == pytest.approx(other.net_flops)
        assert np.abs(one.picture.astype(int) - other.picture).max() <= 1


def test_controls_spend_the_same_evaluations(env: DiffusionDenoiseVectorEnv, small_kwargs: dict[str, Any]) -> None:
    played = results("random:0.6:0.05:0.35", env)
    assert any(REFINE in made.actions for made in played)
    full = gym.make_vec(
        "AdDiffusion-Tiny-v0", 2, autoreset_mode=AutoresetMode.DISABLED, **small_kwargs, mask="full"
    ).unwrapped
    controls = (Replay(full, FULL_IMAGE, rows_of(played)), MatchedSteps(env, CONTINUED, rows_of(played)))
    for control in controls:
        made = in_order(control)
        assert [m.nfe for m in made] == [m.nfe for m in played]
        assert any((a.picture != b.picture).any() for a, b in zip(made, played, strict=True))
    with pytest.raises(ValueError, match="no row for 'a red circle', seed 3"):
        in_order(Replay(env, "again", {}))
