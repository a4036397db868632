"""Rules and agents at every price: which rule is chosen, what it does in an environment, what the table says."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from addiff_env.agent import Agent, PolicyNet
from addiff_env.evaluation import prices
from addiff_env.perception.scorers import LatentTextReward
from addiff_env.tiny.measures.optimal_stopping import Walks, fixed, threshold, two_step
from addiff_env.tiny.prompt_splits import balanced, load_split
from addiff_env.tiny.tokenizer import MAX_LENGTH, build_tokenizer
from addiff_env.types import Action

CHEAP = {"reads": ["clip_text", "reward"], "reward": {"clip_weight": 0, "instability": 0}, "price_range": [0.001, 0.02]}


def walks(prompts: int = 40) -> Walks:
    """Every picture of six steps satisfies if it goes on to the end, half of them if they are stopped after three."""
    stopped = np.full((prompts, 6), np.nan)
    stopped[:, 3], stopped[:, 4:] = np.arange(prompts) % 2, 1.0
    told = np.where(np.isnan(stopped), np.nan, 0.8)
    none = np.full(prompts, -1)
    return Walks(np.arange(prompts), none * 0, told, told, stopped, np.ones(prompts, bool), none, none, finish_steps=1)


def test_dearer_evaluations_choose_shorter_rules() -> None:
    chosen = prices.best_rules(walks(), [0.01, 0.9])
    names = {price: next(name for name in found if name.startswith("fixed")) for price, found in chosen.items()}
    assert names == {0.01: "fixed: stop after 4", 0.9: "fixed: stop after 3"}
    assert all(
        [name.split(":")[0] for name in found] == ["fixed", "threshold", "two-step"] for found in chosen.values()
    )


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (fixed(4), [Action.CONTINUE, Action.STOP, Action.CONTINUE]),
        (threshold(4, 0.5), [Action.CONTINUE, Action.REFINE, Action.CONTINUE]),  # the last may not refine
        (two_step(0.5, 0.2, 4, 0.55), [Action.REFINE, Action.STOP, Action.STOP]),
    ],
)
def test_a_rule_acts_on_each_lane_by_its_own_step(rule: Any, expected: list[Action]) -> None:
    outlook = torch.tensor([-1.0, -1.0, -1.0])  # 0.27
    env: Any = SimpleNamespace(
        num_envs=3,
        features=SimpleNamespace(outlook=outlook),
        reward_score=np.array([0.4, 0.4, 0.4]),  # 0.6
        step_index=np.array([3, 4, 5]),
        done=np.zeros(3, bool),
    )
    mask = np.array([[True, True, True], [True, True, True], [True, True, False]])
    assert prices.by_rule(rule)(env, np.empty(0), mask).tolist() == expected


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("verifier"), build_tokenizer()
    model = LatentTextReward(len(tokenizer), MAX_LENGTH, width=16, layers=1, heads=2, channels=4, stem=8)
    model.save_pretrained(folder, tokenizer)
    return folder


def agent(kwargs: dict[str, Any], scorer: str) -> Agent:
    """One that always goes on."""
    settings = kwargs | CHEAP | {"scorer": scorer}
    parts = dict(gym.make_vec("AdDiffusion-Tiny-v0", 1, **settings).unwrapped.parts)  # type: ignore[attr-defined]
    net = PolicyNet(parts, 8)
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    return Agent(net, {"env": {"id": "AdDiffusion-Tiny-v0", "kwargs": settings}, "observation": parts, "hidden": 8})


def test_rules_and_agents_make_the_same_pictures_at_every_price(
    small_kwargs: dict[str, Any], verifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = agent(small_kwargs, str(verifier))
    env = prices.world_of(made, 2)
    rows = balanced(load_split("dev"), 3)  # the last batch is padded
    steps = env.config.num_inference_steps
    going_on = prices.play(env, prices.by_agent(made), rows, 0.002)
    assert going_on.shape == (3, 3) and (going_on[:, 1] == steps).all() and (going_on[:, 2] > 0).all()
    np.testing.assert_array_equal(prices.play(env, prices.by_rule(fixed(steps)), rows), going_on)
    stopped = prices.play(env, prices.by_rule(fixed(3)), rows)
    assert (stopped[:, 1] == 3 + env.config.finish_steps).all() and (stopped[:, 2] < going_on[:, 2]).all()
    made.save(tmp_path / "agent")
    words = ["--agent", str(tmp_path / "agent"), "--number", "3", "--tune", "6", "--num-envs", "2", "--prices", "0.002"]
    assert prices.main([*words, "--record", str(tmp_path / "record.npz")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 3 + 1 and str(tmp_path / "agent") in lines[-1]


def test_rules_want_a_scorer_that_foretells(small_kwargs: dict[str, Any], verifier: Path) -> None:
    made = agent(small_kwargs, str(verifier))
    del made.config["env"]["kwargs"]["scorer"]
    made.config["env"]["kwargs"]["reads"] = ["clip_image", "clip_text", "dino", "reward"]
    with pytest.raises(ValueError, match="reads latents"):
        prices.world_of(made, 1)
