"""A lane whose numbers stop being finite: the other pictures are what they are without it, and its own says so."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from addiff_env.env import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.methods.base import NOT_FINITE
from addiff_env.evaluation.methods.controls import Replay
from addiff_env.evaluation.methods.policy_method import PolicyMethod
from addiff_env.evaluation.methods.registry import make_method
from addiff_env.evaluation.metrics.registry import open_metrics
from addiff_env.evaluation.run.progress import RunProgress
from addiff_env.evaluation.run.row_maker import RowMaker
from addiff_env.evaluation.run.rows import read_rows
from addiff_env.pipeline import FAULT
from addiff_env.types import Generated, ResultRow

ITEMS = [Item(prompt, seed, "any") for seed, prompt in enumerate(["a red circle", "two blue stars", "a ring"])]
BROKEN = 1
METHODS = ["ddim-4", "dpmpp_2m-4", "euler-4", "unipc-4", "words-4", "best-of-2:ddim-4", "oracle-stop:ddim-4"]
METHODS += ["fk-2:ddim-4", "rbf-6:ddim-4", "restart-11:ddim-6@0.01:100"]
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' own, under NumPy 2


class Continues:
    """An agent that never stops."""

    flops, fingerprint = 0.0, "none"

    def act(self, observation: Any, action_mask: np.ndarray) -> np.ndarray:
        return np.zeros(len(action_mask), int)


@pytest.fixture(scope="module")
def env(small_kwargs: dict[str, Any]) -> DiffusionDenoiseVectorEnv:
    made = gym.make_vec("AdDiffusion-Tiny-v0", 3, autoreset_mode=AutoresetMode.DISABLED, **small_kwargs).unwrapped
    assert isinstance(made, DiffusionDenoiseVectorEnv)
    return made


@pytest.fixture(params=["denoiser", "decoder"])
def broken(request: pytest.FixtureRequest, env: DiffusionDenoiseVectorEnv) -> Iterator[Any]:
    """While it is switched on, the network says NaN of every row of the broken prompt; or the decoder does."""
    backbone: Any = env.backbone
    mark = backbone.encode_prompts([ITEMS[BROKEN].prompt]).embeddings[0]
    state = {"on": False, "rows": torch.zeros(0, dtype=torch.bool)}

    def after(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        context = kwargs["encoder_hidden_states"]
        rows = (context == mark).flatten(1).all(1)
        half = len(rows) // 2  # unconditional rows come first
        state["rows"] = rows[half:]
        if state["on"] and request.param == "denoiser":
            latents = output[0] if isinstance(output, tuple) else output.sample
            latents[rows] = torch.nan
        return output

    decode = type(backbone)._decode

    def decoded(latents: torch.Tensor) -> torch.Tensor:
        pictures = decode(backbone, latents)
        if state["on"] and request.param == "decoder" and len(state["rows"]) % len(latents) == 0:
            pictures[state["rows"].view(len(latents), -1).any(1)] = torch.nan  # of particles one may be left
        return pictures

    hook = backbone.unet.register_forward_hook(after, with_kwargs=True)
    backbone._decode = decoded
    yield state
    hook.remove()
    del backbone._decode


def made_by(env: DiffusionDenoiseVectorEnv, name: str) -> list[Generated]:
    scripts = {(item.prompt, item.seed): row_of(item, [0] * 4) for item in ITEMS}
    if name == "agent":
        method: Any = PolicyMethod(env, Continues(), "agent")
    elif name == "replay":
        method = Replay(env, "replay", scripts)
    else:
        method = make_method(name, env, None, benchmark=ITEMS)  # type: ignore[arg-type]
    found = {item.prompt: made for group in method.make(list(ITEMS)) for item, made in group}
    return [found[item.prompt] for item in ITEMS]


def row_of(item: Item, actions: list[int]) -> ResultRow:
    return ResultRow("agent", item.prompt, item.seed, "any", "b", "s", "p", "float32", "0", actions=actions)


@pytest.mark.parametrize("name", [*METHODS, "agent", "replay"])
def test_one_lane_alone_is_lost_and_says_so(env: DiffusionDenoiseVectorEnv, broken: Any, name: str) -> None:
    whole = made_by(env, name)
    broken["on"] = True
    made = made_by(env, name)
    assert not any(picture.note for picture in whole)
    assert [bool(picture.note) for picture in made] == [lane == BROKEN for lane in range(len(ITEMS))]
    assert made[BROKEN].note == (FAULT if name in ("agent", "replay") else NOT_FINITE)
    assert made[BROKEN].picture.shape == whole[BROKEN].picture.shape
    for lane in (0, 2):
        np.testing.assert_array_equal(made[lane].picture, whole[lane].picture)


def test_its_row_is_kept_with_the_others(env: DiffusionDenoiseVectorEnv, broken: Any, tmp_path: Path) -> None:
    broken["on"] = True
    metrics, _ = open_metrics(["clip_score", "reward_score"], env.perception, ITEMS)
    evaluation = RowMaker(tmp_path / "rows.jsonl", env, metrics, save_images=True)
    method = make_method("ddim-4", env)
    progress = RunProgress({method.name: 4.0}, len(ITEMS))
    progress.start()
    rows = evaluation.run(method, ITEMS, progress)
    progress.close()
    assert read_rows(tmp_path / "rows.jsonl") == rows and [bool(row.reason) for row in rows] == [False, True, False]
    assert NOT_FINITE in rows[BROKEN].reason and rows[BROKEN].scores.keys() == rows[0].scores.keys()
    assert all((tmp_path / row.image).is_file() for row in rows)


def test_a_finite_try_is_chosen_over_one_that_is_not(
    env: DiffusionDenoiseVectorEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the best of two, and of the moments to stop; whatever the scorer says of grey."""
    score = "addiff_env.evaluation.methods.search.reward_score"
    monkeypatch.setattr(score, lambda perception: lambda pictures, prompts: (pictures == 0.5).flatten(1).sum(1).float())
    decode, backbone = env.backbone.decode, env.backbone

    def every_other(latents: torch.Tensor) -> torch.Tensor:
        pictures = decode(latents)
        pictures[::2] = torch.nan
        return pictures

    monkeypatch.setattr(backbone, "decode", every_other, raising=False)
    assert [bool(made.note) for made in made_by(env, "best-of-2:ddim-4")] == [False] * 3
