"""The command that lists what looking costs."""

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import open_clip
import pytest
import torch

import addiff_env
from addiff_env import cli
from addiff_env.diffusion.backbones import count_flops
from addiff_env.env import costs
from addiff_env.env.config import EnvConfig
from addiff_env.env.costs import Cost
from addiff_env.perception.encoders import OpenCLIPEncoder
from addiff_env.storage.files import DiskFullError

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
    assert by_name["denoiser step"] == env.passes_per_nfe * env.flops_per_call["denoiser"]
    assert by_name["full decode (preview vae)"] == env.flops_per_call["decode"] == env.flops_per_call["preview"]
    scorer = env.flops_per_call["look"] - env.flops_per_call["preview"] - by_name["CLIP, picture"] - by_name["DINO"]
    score = env.perception.scorer.score
    assert scorer == count_flops(lambda: score(torch.zeros(1, 3, 64, 64), [""]), "cpu") < by_name["scorer"]
    assert by_name["CLIP, text"] == env.perception.text_flops()
    charged = [row for row in rows if row.component == "scorer"]
    assert charged[1].flops == by_name["CLIP, picture"]  # CLIPScore reads the prompt once


def test_open_clips_towers_are_counted_whole() -> None:
    """torch's fused attention of frozen `nn.MultiheadAttention` counts as nothing: a ViT by its textbook formula."""
    width, layers, patch, size, out = 64, 3, 8, 32, 48
    vision = {"image_size": size, "layers": layers, "width": width, "head_width": 16, "patch_size": patch}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    encoder = OpenCLIPEncoder(open_clip.CLIP(out, vision, text), open_clip.tokenize)

    def blocks(tokens: int, width: int, layers: int) -> int:
        weights = (4 + 8) * width * width  # q, k, v and projection; an MLP four times as wide
        return layers * 2 * (tokens * weights + 2 * tokens * tokens * width)

    patches = (size // patch) ** 2
    picture = 2 * patches * 3 * patch**2 * width + blocks(1 + patches, width, layers) + 2 * width * out
    for state in (True, False):
        torch.backends.mha.set_fastpath_enabled(state)
        try:
            counted = count_flops(lambda: encoder.image_features(torch.rand(1, 3, size, size)), "cpu")
            assert torch.backends.mha.get_fastpath_enabled() is state
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        assert counted == picture
    assert count_flops(lambda: encoder.encode_text("a star"), "cpu") == blocks(77, 32, 2) + 2 * 32 * out


def test_counting_leaves_the_fast_path_as_it_was_whatever_happens() -> None:
    with pytest.raises(KeyError):
        count_flops(lambda: {}["a"], "cpu")
    assert torch.backends.mha.get_fastpath_enabled()


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
    assert cli.main(["profile", *options]) == 1
    assert words in capsys.readouterr().err


def test_auto_is_resolved_before_anything_is_measured(
    small_kwargs: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The ids of the Hub have device and dtype ``auto``; so many lanes as they make at a time are measured."""
    settings = small_kwargs | {"device": "auto", "dtype": "auto", "batch_size": 2}
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    assert costs.main(["--repeats", "1", *words, "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["dtype"] in ("float32", "float16", "bfloat16") and "auto" not in report["device"]
    assert report["lanes"] == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_report_without_room_is_named(small_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "measure", lambda *args: [])
    monkeypatch.setattr(costs, "table", lambda rows: "")
    with pytest.raises(DiskFullError, match="no space left to write /dev/full"):
        costs.main(["--json", "/dev/full"])


def test_a_report_that_cannot_be_written_is_refused_beforehand(
    small_kwargs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "measure", lambda *args: pytest.fail("measured first"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        costs.main(["--json", str(tmp_path / "nowhere" / "costs.json")])
