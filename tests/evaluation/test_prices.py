"""Rules and agents at every price: which rule is chosen, what it does in an environment, what the table says."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from addiff_env.agent import Agent, PolicyNet
from addiff_env.evaluation import prices
from addiff_env.evaluation.benchmarks.items import load_benchmark
from addiff_env.evaluation.methods.registry import make_method
from addiff_env.perception.scorers import LatentTextReward
from addiff_env.tiny.measures.optimal_stopping import Walks
from addiff_env.tiny.tokenizer import MAX_LENGTH, build_tokenizer

CHEAP = {"reads": ["clip_text", "reward"], "reward": {"clip_weight": 0, "instability": 0}, "price_range": [0.001, 0.02]}


def walks(prompts: int = 40) -> Walks:
    """Every picture of six steps satisfies if it goes on to the end, half of them if they are stopped after three."""
    stopped = np.full((prompts, 6), np.nan)
    stopped[:, 3], stopped[:, 4:] = np.arange(prompts) % 2, 1.0
    told = np.where(np.isnan(stopped), np.nan, 0.8)
    none = np.full(prompts, -1)
    return Walks(np.arange(prompts), none * 0, told, told, stopped, np.ones(prompts, bool), none, none, finish_steps=1)


def test_dearer_evaluations_choose_shorter_rules() -> None:
    kinds = {price: prices.finalists(walks(), [price], 1) for price in (0.01, 0.9)}
    assert kinds[0.01]["fixed"] == ["stop-4"] and kinds[0.9]["fixed"] == ["stop-3"]
    both = prices.finalists(walks(), [0.01, 0.9], 1)
    assert list(both) == ["fixed", "threshold", "two-step"] and both["fixed"] == ["stop-4", "stop-3"]


def test_what_was_chosen_is_read_again(tmp_path: Path) -> None:
    chosen = {0.001: {"fixed": "stop-9"}, 0.016: {"fixed": "stop-3", "two-step": "two-step:0:4:0.5:2"}}
    prices.keep_rules(tmp_path / "rules.json", chosen, training_prompts=2)
    assert prices.read_rules(tmp_path / "rules.json") == chosen
    (tmp_path / "other.json").write_text('{"rules": 3}')
    with pytest.raises(ValueError, match="other.json"):
        prices.read_rules(tmp_path / "other.json")


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
    items = load_benchmark("tiny-dev", 3)
    steps = env.config.num_inference_steps
    going_on = prices.play(make_method("agent@0.002", env, made), items)
    assert going_on.shape == (3, 3) and (going_on[:, 1] == steps).all() and (going_on[:, 2] > 0).all()
    blind, stopped = (prices.play(make_method(f"stop-{step}", env), items) for step in (steps, 3))
    np.testing.assert_array_equal(blind[:, :2], going_on[:, :2])
    assert (blind[:, 2] < going_on[:, 2]).all()  # it does not pay for looks
    assert (stopped[:, 1] == 3 + env.config.finish_steps).all() and (stopped[:, 2] < blind[:, 2]).all()
    made.save(tmp_path / "agent")
    words = ["--agent", str(tmp_path / "agent"), "--number", "3", "--tune", "6", "--num-envs", "2", "--prices", "0.002"]
    words += ["--record", str(tmp_path / "record.npz"), "--rules", str(tmp_path / "rules.json"), "--finalists", "1"]
    assert prices.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 3 + 1 and str(tmp_path / "agent") in lines[-1]
    chosen = prices.read_rules(tmp_path / "rules.json")[0.002]
    assert [line.split()[1] for line in lines[2:5]] == list(chosen.values())
    assert prices.main(words) == 0 and capsys.readouterr().out.splitlines() == lines


def test_rules_want_a_scorer_that_foretells(small_kwargs: dict[str, Any], verifier: Path) -> None:
    made = agent(small_kwargs, str(verifier))
    del made.config["env"]["kwargs"]["scorer"]
    made.config["env"]["kwargs"]["reads"] = ["clip_image", "clip_text", "dino", "reward"]
    with pytest.raises(ValueError, match="reads latents"):
        prices.world_of(made, 1)


def test_a_single_prompt_has_no_interval() -> None:
    outcomes, rival = np.array([[1.0, 5, 1e9]]), np.array([[0.0, 4, 1e9]])
    assert prices.line(0.002, "agent", outcomes, rival, ["p"]).endswith("+0.9980 [n/a: one prompt]")
