import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from scipy.stats import beta
from torch import nn

from addiff_env.diffusion.backbones import load_backbone
from addiff_env.perception.previews import make_previewer
from addiff_env.tiny.prompts import SHAPES
from addiff_env.tiny.recipes import common, data, diffusion, preview, reward
from addiff_env.tiny.recipes.pairs import Samples
from addiff_env.tiny.world import WEIGHTS

STEPS = 24


def make_loop(work: Path) -> tuple[common.Loop, nn.Linear, common.EMA]:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    ema = common.EMA(model, 0.9)
    args = argparse.Namespace(work=work, steps=STEPS, seed=3, device="cpu")
    return common.Loop("toy", args, {"model": model, "ema": ema.model}, lr=0.05, warmup=5), model, ema


def train(work: Path, kill_at: int | None = None) -> dict[str, torch.Tensor]:
    """Fit a random plane; ``kill_at`` dies in that step, after the update and before its checkpoint."""
    loop, model, ema = make_loop(work)

    def loss_at(generator: torch.Generator) -> dict[str, torch.Tensor]:
        x = torch.randn(8, 4, generator=generator)
        return {"loss": ((model(x).float() - x.sum(1, keepdim=True)) ** 2).mean()}

    def after(step: int) -> None:
        ema.update(step)
        if step == kill_at:
            raise KeyboardInterrupt

    loop.run(loss_at, after)
    return {**model.state_dict(), **{f"ema.{k}": v for k, v in ema.model.state_dict().items()}}


def test_kill_and_resume_equals_an_uninterrupted_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "CHECKPOINT_SECONDS", -1.0)  # a checkpoint after every step
    whole = train(tmp_path / "whole")
    for kill_at in (7, 15, STEPS):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "killed", kill_at)
    resumed = train(tmp_path / "killed")
    assert resumed.keys() == whole.keys()
    for key, value in whole.items():
        assert torch.equal(resumed[key], value), key


def test_a_resumed_loop_starts_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path)
    loop, model, _ = make_loop(tmp_path)
    assert loop.step == STEPS and loop.seconds > 0
    assert f"resumed at step {STEPS} of {STEPS}" in capsys.readouterr().out
    before = model.weight.clone()
    loop.run(lambda generator: pytest.fail("a finished run took another step"))
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(("name", "value"), [("seed", 4), ("batch", 16)])
def test_a_training_with_other_settings_is_not_taken_for_this_one(tmp_path: Path, name: str, value: int) -> None:
    args = argparse.Namespace(work=tmp_path, steps=1, seed=3, batch=8, device="cpu")
    common.Loop("toy", args, {"model": nn.Linear(1, 1)}, lr=0.1).save()
    args.steps = 2  # a longer one goes on
    common.Loop("toy", args, {"model": nn.Linear(1, 1)}, lr=0.1).writer.close()
    setattr(args, name, value)
    with pytest.raises(ValueError, match=rf"toy\.pt.*{name} \d+, not {value}"):
        common.Loop("toy", args, {"model": nn.Linear(1, 1)}, lr=0.1)


def test_training_learns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = (nn.Linear(4, 1).weight - 1).norm()
    assert (train(tmp_path)["weight"] - 1).norm() < 0.7 * start


def test_a_kill_while_saving_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path)
    loop, model, _ = make_loop(tmp_path)
    before = loop.path.read_bytes()

    def torn(state: object, path: Path) -> None:
        path.write_bytes(before[: len(before) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    nn.init.zeros_(model.weight)
    with pytest.raises(KeyboardInterrupt):
        loop.save()
    assert loop.path.read_bytes() == before
    resumed, model, _ = make_loop(tmp_path)
    assert resumed.step == STEPS and model.weight.abs().sum() > 0


def test_learning_rate_warms_up_and_decays(tmp_path: Path) -> None:
    loop, _, _ = make_loop(tmp_path)
    factors = [loop._lr_factor(step) for step in range(STEPS + 1)]
    assert factors[0] == pytest.approx(1 / 5) and max(factors) == pytest.approx(1)
    assert factors[:5] == sorted(factors[:5]) and factors[5:] == sorted(factors[5:], reverse=True)
    assert factors[-1] == pytest.approx(0.02)


def test_a_step_with_an_infinite_gradient_is_left_out(tmp_path: Path) -> None:
    loop, model, _ = make_loop(tmp_path)
    loop.run(lambda generator: {"loss": model.weight.sum() * (float("inf") if loop.step == 4 else 1.0)})
    assert torch.isfinite(model.weight).all()


def test_ema_by_hand() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.0)
    ema = common.EMA(model, decay=0.5)
    nn.init.constant_(model.weight, 1.0)
    ema.update(1)  # warm-up: decay is min(0.5, 2 / 11)
    assert ema.model.weight.item() == pytest.approx(9 / 11)
    ema.update(1000)
    assert ema.model.weight.item() == pytest.approx(10 / 11)
    assert not ema.model.weight.requires_grad


def test_missing_data_names_the_file_and_the_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"captions\.json.*addiff world data"):
        data.load(tmp_path)


def test_rendered_chunks_are_reproducible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_CHUNK", 16)
    captions, pictures = data.render_chunk((0, 5))
    again, same = data.render_chunk((0, 5))
    assert captions == again and (pictures == same).all()
    assert captions != data.render_chunk((0, 6))[0]


def test_pictures_become_inputs() -> None:
    pictures = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8)
    inputs = common.to_input(pictures)  # (2, 3, 64, 64)
    assert inputs.shape == (2, 3, 64, 64) and inputs.dtype == torch.float32
    assert torch.equal((inputs.permute(0, 2, 3, 1) * 255).round().to(torch.uint8), pictures)


def test_held_out_captions_are_not_trained_on() -> None:
    captions = [f"caption {i % 40}" for i in range(200)]
    number = torch.arange(200)
    samples = Samples(number.view(-1, 1), captions, number, number % 3 == 0, (1.0,))
    sorted_, first = reward.hold_out(samples)
    assert 0 < first < 200 and sorted(sorted_.objects.tolist()) == list(range(200))
    assert not set(sorted_.captions[:first]) & set(sorted_.captions[first:])
    rows = sorted_.objects.tolist()
    assert sorted_.captions == [captions[i] for i in rows]
    assert sorted_.satisfied.tolist() == [i % 3 == 0 for i in rows]
    assert sorted_.pictures[:, 0].tolist() == rows


def test_timesteps_crowd_where_shapes_are_decided() -> None:
    """Nine in ten from Beta(1.8, 1.4), one in ten uniform: the share below a tenth by hand."""
    drawn = diffusion.sample_timesteps(200_000, torch.Generator().manual_seed(0), torch.full((200_000,), 0.4))
    assert drawn.min() >= 0 and drawn.max() <= 999 and drawn.dtype == torch.int64
    low = 0.6 * beta.cdf(0.1, 1.8, 1.4)
    assert (drawn < 100).double().mean().item() == pytest.approx(low, abs=0.003)
    assert drawn.double().mean().item() / 1000 == pytest.approx(0.6 * 1.8 / 3.2 + 0.4 * 0.925, abs=0.003)
    assert (drawn >= 850).double().mean().item() == pytest.approx(0.4 + 0.6 * beta.sf(0.85, 1.8, 1.4), abs=0.003)


def test_caption_layout_by_hand() -> None:
    told = diffusion.caption_layout("a small red star right of a circle").view(len(SHAPES), 4)
    assert told[SHAPES.index("star")].tolist() == [0.5, -1, 1, 0]
    assert told[SHAPES.index("circle")].tolist() == [0.5, 0, -1, 0]
    assert not told[[SHAPES.index(shape) for shape in SHAPES if shape not in ("star", "circle")]].any()
    assert diffusion.caption_layout("three rings").view(len(SHAPES), 4)[SHAPES.index("ring")].tolist() == [1.5, 0, 0, 0]
    above = diffusion.caption_layout("a cross above a square").view(len(SHAPES), 4)
    assert above[SHAPES.index("cross"), 3] == -1 and above[SHAPES.index("square"), 3] == 1


def test_the_reader_learns_what_a_token_knows_and_guesses_the_rest() -> None:
    torch.manual_seed(0)
    reader, hidden, told = diffusion.LayoutReader(), torch.randn(3, 5, diffusion.TEXT_WIDTH), torch.randn(3, 24)
    by_hand = sum(((reader(hidden[i, j]) - told[i]) ** 2).sum() for i in range(3) for j in range(5)) / 15
    assert reader.loss(hidden, told).item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_the_preview_decoder_learns_what_the_autoencoder_decodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "_CHUNK", 16)
    captions, pictures = data.render_chunk((0, 0))
    monkeypatch.setattr(data, "prepare", lambda work, seed: None)
    monkeypatch.setattr(data, "load", lambda work: (torch.from_numpy(pictures), captions))
    shutil.copytree(WEIGHTS / "pipeline" / "vae", tmp_path / "pipeline" / "vae")
    told = {}
    for steps in (1, 40):
        words = ["--work", str(tmp_path / str(steps)), "--out", str(tmp_path), "--device", "cpu"]
        assert preview.main([*words, "--steps", str(steps), "--batch", "8"]) == 0
        told[steps] = json.loads((tmp_path / str(steps) / "preview.json").read_text())
    assert told[40]["psnr_noise_0"] > told[1]["psnr_noise_0"] + 1
    AutoencoderTiny.from_pretrained(tmp_path / "preview", use_safetensors=True)


def test_the_shipped_preview_decoder_shows_what_the_whole_one_does() -> None:
    backbone = load_backbone(str(WEIGHTS / "pipeline"))
    whole, small = make_previewer("vae", backbone), make_previewer("taesd", backbone, str(WEIGHTS / "preview"))
    pictures = common.to_input(torch.from_numpy(data.render_chunk((0, preview.UNSEEN))[1][:32]))
    latents = backbone.encode_pictures(pictures)
    error = (whole.decode(latents) - small.decode(latents)).square().mean()
    assert -10 * error.log10() > 33  # dB; preview.json of its training says 34.4
    shape = tuple(latents.shape[1:])
    assert small.flops(shape) < 0.15 * whole.flops(shape)
