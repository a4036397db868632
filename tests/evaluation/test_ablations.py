"""Agents that lack something, beside those that lack nothing: who is one group, what is kept, what the table says."""

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from composed import rllib_config

from addiff_env.agent import Agent, PolicyNet
from addiff_env.agent.networks import PartNorm
from addiff_env.env.training_settings import check_numbers, env_settings
from addiff_env.evaluation import ablations
from addiff_env.evaluation.benchmarks.items import load_benchmark
from addiff_env.loading.paths import configs_folder

PRICE = 0.01
PRICED = {"price_range": [0.001, 0.02]}


def save(folder: Path, kwargs: dict[str, Any], stops: bool) -> None:
    """An agent that always stops, or never."""
    parts = dict(gym.make_vec("AdDiffusion-Tiny-v0", 1, **kwargs).unwrapped.parts)  # type: ignore[attr-defined]
    net = PolicyNet(parts, 8)
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias.copy_(torch.tensor([0.0, 1.0, 0.0] if stops else [1.0, 0.0, 0.0]))
    env = {"id": "AdDiffusion-Tiny-v0", "kwargs": kwargs}
    Agent(net, {"env": env, "observation": parts, "hidden": 8}).save(folder / "agent")


@pytest.fixture
def sweep(small_kwargs: dict[str, Any], tmp_path: Path) -> Path:
    """Two seeds with a price that lack nothing; one without a price, which stops at once."""
    save(tmp_path / "none-0", small_kwargs | PRICED, stops=False)
    save(tmp_path / "none-1", small_kwargs | PRICED, stops=True)
    save(tmp_path / "no_price-0", small_kwargs, stops=True)
    return tmp_path


def test_seeds_are_one_group_and_the_difference_is_of_pairs(
    sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = [(one.name, sorted(one.runs)) for one in ablations.found_in(sweep)]
    assert groups == [("none", ["0", "1"]), ("no_price", ["0"])]
    words = [str(sweep), "--price", str(PRICE), "--number", "4"]
    assert ablations.main(words) == 0
    printed = capsys.readouterr().out
    none, lacking = (line.split() for line in printed.splitlines()[2:])
    read = {run: json.loads((sweep / run / "ablation.json").read_text()) for run in ("none-0", "none-1", "no_price-0")}
    kept = {run: np.array(found["outcomes"]) for run, found in read.items()}
    assert kept["none-0"].shape == (4, 3) and (kept["none-0"][:, 1] > kept["none-1"][:, 1]).all()
    np.testing.assert_array_equal(kept["no_price-0"][:, :2], kept["none-1"][:, :2])  # policies differ in width
    returns = {run: (found[:, 0] - PRICE * found[:, 1]).mean() for run, found in kept.items()}
    assert none[:2] == ["none", "2"] and lacking[:2] == ["no_price", "1"]
    assert float(none[5]) == pytest.approx((returns["none-0"] + returns["none-1"]) / 2, abs=1e-4)
    assert float(lacking[6]) == pytest.approx((returns["no_price-0"] - returns["none-0"]) / 2, abs=1e-4)

    def play(*_: Any) -> np.ndarray:
        raise AssertionError("was kept")

    monkeypatch.setattr(ablations, "play", play)
    assert ablations.main(words) == 0 and capsys.readouterr().out == printed
    with pytest.raises(AssertionError, match="was kept"):
        ablations.main([*words[:2], "0.02", *words[3:]])


def test_another_agent_is_played_anew(sweep: Path, small_kwargs: dict[str, Any]) -> None:
    items = load_benchmark("tiny-dev", 2)
    before = ablations.outcomes_of(sweep / "none-0", items, PRICE)
    save(sweep / "none-0", small_kwargs | PRICED, stops=True)
    after = ablations.outcomes_of(sweep / "none-0", items, PRICE)
    assert (after[:, 1] < before[:, 1]).all()


def test_without_agents_that_lack_nothing_there_is_no_comparison(sweep: Path) -> None:
    (sweep / "part").mkdir()
    (sweep / "no_price-0").rename(sweep / "part" / "no_price-0")
    with pytest.raises(ValueError, match="only: no_price"):
        ablations.found_in(sweep / "part")
    with pytest.raises(ValueError, match="nothing"):
        ablations.found_in(sweep / "gone")


NAMES = sorted(path.stem for path in (configs_folder() / "ablation").glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_every_ablation_is_one_that_can_be_trained(name: str) -> None:
    whole, lacking = (rllib_config("env=tiny_prices", f"+ablation={one}", name="train") for one in ("none", name))
    assert (whole == lacking) == (name == "none")
    check_numbers(lacking)
    env = gym.make_vec(lacking.env.id, num_envs=1, vectorization_mode="vector_entry_point", **env_settings(lacking))
    parts = env.unwrapped.parts  # type: ignore[attr-defined]
    named = {part for part, gain in lacking.policy.gains.items() if gain is not None}
    assert named <= set(parts) and ("outlook" in parts) == (name != "no_early_verdicts")
    assert ("price" in parts) == (name != "no_price")
    width = sum(parts.values())
    PartNorm(parts).set_statistics(torch.zeros(width), torch.ones(width), lacking.policy.gains)
