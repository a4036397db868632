"""The command that lists what looking costs."""

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch

import addiff_env
from addiff_env import costs
from addiff_env.backbones import count_flops
from addiff_env.config import EnvConfig
from addiff_env.costs import Cost

SMALL = ["--lanes", "2", "--repeats", "1"]


@pytest.fixture(scope="module")
def rows(small_kwargs: dict[str, Any]) -> list[Cost]:
    config = EnvConfig(**{**addiff_env.TINY, **small_kwargs})
    return costs.measure(config, scorers=[f"clipscore:{config.clip}"], lanes=2, repeats=1)


def test_every_part_of_a_look_is_listed(rows: list[Cost]) -> None:
    names = [row.component for row in rows]
    assert names == [
        *("denoiser step", "its text encoder", "full decode (preview vae)", "preview latent_rgb"),
        *("CLIP, picture", "CLIP, text", "DINO", "scorer", "scorer", "scorer, text"),
    ]
    assert all(row.flops > 0 and row.milliseconds > 0 for row in rows)
    assert {row.per for row in rows} == {"step", "prompt", "picture", "look"}


def test_flops_are_those_the_environment_charges(rows: list[Cost], small_kwargs: dict[str, Any]) -> None:
    env = gym.make("AdDiffusion-Tiny-v0", **small_kwargs).unwrapped.vector  # type: ignore[attr-defined]
    by_name = {row.component: row.flops for row in reversed(rows)}  # the first of each name
    assert by_name["denoiser step"] == env.passes_per_nfe * env.price["denoiser"]
    assert by_name["full decode (preview vae)"] == env.price["decode"] == env.price["preview"]
    scorer = env.price["look"] - env.price["preview"] - by_name["CLIP, picture"] - by_name["DINO"]
    score = env.perception.scorer.score
    assert scorer == count_flops(lambda: score(torch.zeros(1, 3, 64, 64), [""]), "cpu") < by_name["scorer"]
    assert by_name["CLIP, text"] == env.perception.text_flops()
    charged = [row for row in rows if row.component == "scorer"]
    assert charged[1].flops == by_name["CLIP, picture"]  # CLIPScore reads the prompt once


def test_the_table_compares_with_a_step() -> None:
    text = costs.table([Cost(costs.STEP, "m", "step", 4e9, 2.0), Cost("DINO", "d", "look", 1e9, 0.5)])
    head, rule, step, dino = text.splitlines()
    assert head.startswith("component") and set(rule) == {"-"}
    assert step.count("100.0%") == 2 and dino.count("25.0%") == 2 and dino.endswith("d")


def test_the_command_prints_and_writes(
    small_kwargs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [word for name, value in small_kwargs.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    assert costs.main([*SMALL, *settings, "--json", str(tmp_path / "costs.json")]) == 0
    printed = capsys.readouterr().out
    assert "AdDiffusion-Tiny-v0, 64 x 64, cpu" in printed and "preview latent_rgb" in printed
    report = json.loads((tmp_path / "costs.json").read_text())
    assert report["lanes"] == 2 and report["costs"][0]["component"] == "denoiser step"
    assert costs.main([*SMALL, *settings, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == "AdDiffusion-Tiny-v0"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--id", "AdDiffusion-Nano-v0"], "AdDiffusion-Nano"),
        (["--set", "solver=heun"], "heun"),
        (["--set", "solver"], "NAME=VALUE"),
        (["--set", "colour=red"], "colour"),
        (["--lanes", "0"], "got 0"),
    ],
)
def test_bad_options_are_shown(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        costs.main(options)
    assert words in capsys.readouterr().err
