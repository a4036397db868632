"""What is left to learn in recorded attempts: attempts written by hand, whose outcomes can be counted."""

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from addiff_env.agent import Agent, PolicyNet
from addiff_env.evaluation import replay
from addiff_env.perception.scorers import LatentTextReward
from addiff_env.tiny.attempts import RecordedLanes, environment_of
from addiff_env.tiny.measures.optimal_stopping import Walks, two_step
from addiff_env.tiny.tokenizer import MAX_LENGTH, build_tokenizer
from addiff_env.types import Action

STEPS, FIRST, BUDGET = 6, 2, 12
CHEAP: dict[str, Any] = {
    "reads": ["clip_text", "reward"],
    "price_range": [0.001, 0.016],
    "reward": {"clip_weight": 0, "reward_weight": 1, "instability": 0},
    "finish_steps": 2,
}


def attempts() -> Walks:
    """Picture 0 satisfies from step 4 on, and the verifier says so; picture 1 fails, its second attempt satisfies."""
    never, late, soon = [0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]
    stopped = np.full((3, STEPS), np.nan)
    stopped[:, FIRST:] = [late, never, soon]
    sure = np.where(np.isnan(stopped), np.nan, np.where(stopped == 1, 0.99, 0.01))
    ended = np.array([True, False, True])
    go_on = np.where(np.isnan(stopped), np.nan, np.where(ended[:, None], 0.98, 0.02))
    row, refines, source, left_at = (np.array(v) for v in ([0, 1, 1], [0, 0, 1], [-1, -1, 1], [-1, -1, 3]))
    return Walks(row, refines, sure, go_on, stopped, ended, source, left_at, first=FIRST)


@pytest.fixture(scope="module")
def kwargs(small_kwargs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, tokenizer = tmp_path_factory.mktemp("verifier"), build_tokenizer()
    model = LatentTextReward(len(tokenizer), MAX_LENGTH, width=16, layers=1, heads=2, channels=4, stem=8)
    model.save_pretrained(folder, tokenizer)
    assert (small_kwargs["num_inference_steps"], small_kwargs["warmup_steps"]) == (STEPS, FIRST)
    return small_kwargs | CHEAP | {"scorer": str(folder), "max_nfe": BUDGET}


@pytest.fixture
def lanes(kwargs: dict[str, Any]) -> RecordedLanes:
    env: Any = gym.make_vec("AdDiffusion-Tiny-v0", 1, **kwargs).unwrapped
    return RecordedLanes(env, attempts(), 2 * 3)


def constant(action: Action) -> replay.Act:
    return lambda lanes: np.full(lanes.num_envs, int(action))


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (constant(Action.STOP), [[0, FIRST + 2], [0, FIRST + 2]]),
        (constant(Action.CONTINUE), [[1, STEPS], [0, STEPS]]),
        # the doomed one is refined at once, for two evaluations, and stopped for two; the other goes on to step 4
        (replay.by_rule(two_step(0.5, 0.5, 4, 0.9)), [[1, 4 + 2], [1, FIRST + 2 + 2]]),
        (replay.foresee, [[1, 4 + 2], [1, FIRST + 2 + 2]]),
    ],
)
def test_outcomes_are_those_counted_by_hand(lanes: RecordedLanes, act: replay.Act, expected: list[list[int]]) -> None:
    np.testing.assert_allclose(replay.outcomes(lanes, act, 0.004, 3), expected)


def test_refining_ends_with_the_budget(lanes: RecordedLanes) -> None:
    """2, 4, 6, 8: at 10 there is no room for a step and its finish, so that the picture is finished there."""
    success, nfe = replay.outcomes(lanes, constant(Action.REFINE), 0.004, 3).T
    assert (nfe == BUDGET).all() and (success == 1).all()  # of every attempt that follows, a stop satisfies


def test_the_table_sets_agents_beside_the_best_rule(
    kwargs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    env: Any = gym.make_vec("AdDiffusion-Tiny-v0", 1, **kwargs).unwrapped
    net = PolicyNet(dict(env.parts), 8)
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))  # always goes on
    config = {"env": {"id": "AdDiffusion-Tiny-v0", "kwargs": kwargs}, "observation": dict(env.parts), "hidden": 8}
    Agent(net, config).save(tmp_path / "agent")
    folder = tmp_path / "attempts"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"environment": environment_of(env.config)}))
    for chunk in range(2):
        np.savez(folder / f"chunk_{chunk:05d}.npz", prompt=np.array(["a", "b"]), seed=np.zeros(2), **vars(attempts()))
    options = ["--attempts", str(folder), "--agent", str(tmp_path / "agent"), "--prices", "0.004"]
    assert replay.main([*options, "--number", "2", "--repeats", "2"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:1] == ["2"] and lines[0][-2:] == ["2", "others"]
    for place in ("learned", "held"):
        rule, agent, foresight = [line for line in lines if place in line[2:4]]
        rule, agent, foresight = (
            [float(x) for x in row[row.index(place) + 1 + (place == "held") :][:3]] for row in (rule, agent, foresight)
        )
        assert agent == [0.5, 6.0, pytest.approx(0.5 - 0.004 * 6, abs=1e-4)]
        assert rule[:2] == [1.0, 6.0] and foresight[:2] == [1.0, 6.0]
    with pytest.raises(SystemExit):
        replay.main([*options, "--number", "4"])
    assert "4 pictures" in capsys.readouterr().err
