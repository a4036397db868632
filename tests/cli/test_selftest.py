"""``addiff selftest``: every check passes on a sound model, tells a wrong one, and keeps no other from running."""

from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from PIL import Image

from addiff_env import cli
from addiff_env.cli import selftest
from addiff_env.diffusion.samplers import solver_step
from addiff_env.storage.commands import override

Kwargs = dict[str, Any]
OWN = {"sd": {}, "sdxl": {}, "flux": {"solver": "euler", "guidance_scale": 0.0}}
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' own, under NumPy 2


def run(capsys: pytest.CaptureFixture[str], settings: Kwargs, *options: str) -> tuple[int, str, dict[str, str]]:
    """Exit status, the report, and each check's outcome."""
    words = [override(name, value) for name, value in settings.items()]
    status = cli.main(["selftest", *words, *options])
    text = capsys.readouterr().out
    titles = {title: name for name, (title, _) in selftest.CHECKS.items()}
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    return status, text, {titles[row[0]]: row[1] for row in rows if row[0] in titles}


@pytest.fixture
def settings(small_kwargs: Kwargs) -> Kwargs:
    return {**small_kwargs, "num_envs": 3, "attention_stride": 2}


@pytest.mark.parametrize("kind", models.BUILDERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sound_model_passes(
    settings: Kwargs, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, dtype: str
) -> None:
    folder = str(models.save(kind, tmp_path / kind))
    status, text, outcomes = run(capsys, settings | {"model": folder, "dtype": dtype, **OWN[kind]})
    assert status == 0, text
    passed = {name for name, outcome in outcomes.items() if outcome == "pass"}
    assert (
        passed == {"load", "parity", "lanes", "looks", "precision", "memory"} and outcomes["imagereward"] == "skipped"
    )
    for said in (folder, dtype, "torch 2", "GiB", "at most", " ms a lane", "3 lanes", "no check failed"):
        assert said in text


def test_the_embedded_world_passes(tiny_kwargs: Kwargs, capsys: pytest.CaptureFixture[str]) -> None:
    status, text, outcomes = run(capsys, {"env": "tiny", "num_envs": 1, "num_inference_steps": 4, **tiny_kwargs})
    assert status == 0 and outcomes["parity"] == "pass" and outcomes["lanes"] == "skipped", text


def test_a_wrong_solver_fails_and_keeps_no_other_check_from_running(
    settings: Kwargs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("addiff_env.env.denoiser.solver_step", lambda *args: 1.02 * solver_step(*args))
    status, text, outcomes = run(capsys, settings)
    assert status == 1 and outcomes["parity"] == "FAIL" and "1 of 7 checks failed" in text
    assert outcomes["lanes"] == outcomes["looks"] == outcomes["memory"] == "pass"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_guidance_is_beyond_what_rounding_may_do(
    tiny_kwargs: Kwargs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    guide = "addiff_env.diffusion.backbones.stable_diffusion.guide"
    monkeypatch.setattr(guide, lambda output, scale: torch.lerp(*output.chunk(2), 1.3 * scale))
    status, text, outcomes = run(capsys, {**tiny_kwargs, "dtype": dtype, "num_envs": 1}, "--checks", "parity")
    assert status == 1 and outcomes == {"parity": "FAIL"}, text


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory"), KeyError("x"), AssertionError("too far"), OSError(28, "No space")]
)
def test_a_check_that_raises_is_a_failed_one(
    settings: Kwargs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(subject: selftest.Subject) -> str:
        raise error

    monkeypatch.setitem(selftest.CHECKS, "lanes", ("lanes as single pictures", broken))
    status, text, outcomes = run(capsys, settings)
    assert status == 1 and outcomes["lanes"] == "FAIL" and str(error) in text
    assert outcomes["parity"] == outcomes["looks"] == outcomes["memory"] == "pass"


@pytest.mark.parametrize("wrong", [{"model": "/nowhere/model"}, {"device": "cuda:9"}])
def test_without_a_model_the_rest_is_skipped(
    settings: Kwargs, capsys: pytest.CaptureFixture[str], wrong: Kwargs
) -> None:
    status, text, outcomes = run(capsys, settings | wrong)
    assert status == 1 and next(iter(wrong.values())) in text
    assert outcomes.pop("load") == "FAIL" and set(outcomes.values()) == {"skipped"}


def test_missing_encoders_cost_only_their_own_check(settings: Kwargs, capsys: pytest.CaptureFixture[str]) -> None:
    status, text, outcomes = run(capsys, settings | {"clip": "/nowhere/clip"})
    assert status == 1 and "/nowhere/clip" in text
    assert {name for name, outcome in outcomes.items() if outcome == "FAIL"} == {"looks", "precision"}


def test_numbers_that_are_not_finite_fail(
    settings: Kwargs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "reference", lambda subject, prompts, noise: noise * torch.nan)
    status, text, outcomes = run(capsys, settings)
    assert status == 1 and outcomes["parity"] == "FAIL" and "not finite" in text


def test_fresh_noise_is_not_compared(settings: Kwargs, capsys: pytest.CaptureFixture[str]) -> None:
    status, text, outcomes = run(capsys, settings | {"eta": 0.5}, "--checks", "load,parity")
    assert status == 0 and outcomes["parity"] == "skipped" and "eta=0.5" in text


def test_the_report_is_also_a_file(settings: Kwargs, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "report.md"
    settings = {"num_envs": settings.pop("num_envs")} | settings
    words = [override(name, value) for name, value in settings.items()]
    status = cli.main(["selftest", words[0], "--checks", "load", *words[1:], "--out", str(out)])  # in any order
    text = capsys.readouterr().out
    assert status == 0 and out.read_text(encoding="utf-8").strip() == text.strip()


def test_ctrl_c_leaves_the_report_of_what_was_checked(
    settings: Kwargs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(subject: selftest.Subject) -> str:
        raise KeyboardInterrupt

    monkeypatch.setitem(selftest.CHECKS, "parity", ("as diffusers' own pipeline", pressed))
    status, text, outcomes = run(capsys, settings, "--checks", "load,parity,lanes")
    assert status == 130 and outcomes == {"load": "pass"} and "--checks load,parity,lanes`" in text


@pytest.mark.parametrize(
    ("options", "named"), [(["--checks", "paritee"], "paritee"), (["--out", "/nowhere/report.md"], "/nowhere")]
)
def test_mistakes_are_told_before_anything_is_computed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str], named: str
) -> None:
    monkeypatch.setattr(selftest, "load_backbone", lambda **settings: pytest.fail("loaded"))
    assert cli.main(["selftest", *options]) == 1
    assert named in capsys.readouterr().err


# --------------------------------------------------------------------------- ImageReward's README


class Known:
    """A scorer that knows the README's pictures by their grey level."""

    def __init__(self, scores: list[float]) -> None:
        self.scores = scores

    def score(self, pictures: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        assert pictures.shape == (1, 3, 16, 16) and prompts == [selftest.README_PROMPT]
        return torch.tensor([self.scores[round(float(pictures.mean()) * 255 / 50) - 1]])


@pytest.mark.parametrize(
    ("off", "outcome"), [(0.0, "pass"), (0.009, "pass"), (0.02, "FAIL"), (float("nan"), "FAIL"), (None, "FAIL")]
)
def test_the_readmes_pictures_are_scored_where_they_are(
    settings: Kwargs,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    off: float | None,
    outcome: str,
) -> None:
    for number in range(1, 5 if off is not None else 4):
        grey = np.full((16, 16, 3), 50 * number, np.uint8)
        Image.fromarray(grey).save(tmp_path / f"{number}.webp", lossless=True)
    first, *rest = selftest.README_SCORES
    monkeypatch.setenv(selftest.ASSETS, str(tmp_path))
    monkeypatch.setenv(selftest.CHECKPOINT, "imagereward:mine.pt")
    monkeypatch.setattr(selftest, "load_scorer", lambda name, device: Known([first + (off or 0), *rest]))
    status, text, outcomes = run(capsys, settings, "--checks", "imagereward")
    assert outcomes == {"imagereward": outcome} and status == (outcome == "FAIL"), text
    assert off is not None or "4.webp" in text
