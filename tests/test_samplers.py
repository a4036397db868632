"""The solver against diffusers' own scheduler, which is the reference throughout."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from addiff_env.samplers import Schedule, add_noise, ddim_between, ddim_step, make_schedule, to_x0

BASE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
STEPS = (1, 4, 10, 30, 50)
SPACINGS = ("leading", "linspace", "trailing")
PREDICTIONS = ("epsilon", "v_prediction", "sample")

every_number = pytest.mark.parametrize("number", STEPS)
every_spacing = pytest.mark.parametrize("spacing", SPACINGS)
every_offset = pytest.mark.parametrize("offset", [0, 1])
every_end = pytest.mark.parametrize("to_one", [False, True])


def options(spacing: str = "trailing", offset: int = 0, to_one: bool = False, **more: Any) -> dict[str, Any]:
    return {**BASE, "timestep_spacing": spacing, "steps_offset": offset, "set_alpha_to_one": to_one, **more}


def reference(config: dict[str, Any], number: int) -> DDIMScheduler:
    scheduler = DDIMScheduler(**config)
    scheduler.set_timesteps(number)
    return scheduler


def denoise(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """A denoiser's stand-in: bounded, depending on the sample and its timestep (B,)."""
    return torch.tanh(0.7 * sample.flip(-1) + timestep.view(-1, 1, 1, 1) / 1000)


def step(schedule: Schedule, latents: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    output = denoise(latents, schedule.timesteps[index])
    x0 = to_x0(output, latents, schedule.alpha_from[index], schedule.prediction_type)
    return ddim_step(schedule, latents, x0, index)


# ------------------------------------------------------------------ schedules


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
@every_end
@every_offset
@every_spacing
@every_number
def test_schedule_is_diffusers(number: int, spacing: str, offset: int, to_one: bool, beta_schedule: str) -> None:
    config = options(spacing, offset, to_one, beta_schedule=beta_schedule)
    ours, theirs = make_schedule(config, number, "cpu"), reference(config, number)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    assert ours.num_inference_steps == number
    levels = theirs.alphas_cumprod.double()
    following = theirs.timesteps - 1000 // number
    alpha_to = torch.where(following >= 0, levels[following.clamp_min(0)], theirs.final_alpha_cumprod.double())
    for mine, their in (
        (ours.alphas_cumprod, levels),
        (ours.alpha_from, levels[theirs.timesteps]),
        (ours.alpha_to, alpha_to),
    ):
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine, their, rtol=2e-5, atol=1e-6)  # theirs are float32


def test_diffusers_defaults_are_ours() -> None:
    plain = {name: BASE[name] for name in ("num_train_timesteps", "beta_start", "beta_end")}
    ours, theirs = make_schedule(plain, 10, "cpu"), reference({**plain, "clip_sample": False}, 10)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    assert ours.prediction_type == theirs.config.prediction_type
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=2e-5, atol=1e-6)
    assert ours.alpha_to[-1] == 1


# ------------------------------------------------------------------ steps


@pytest.mark.parametrize("prediction", PREDICTIONS)
@every_end
@every_offset
@every_spacing
@every_number
def test_loop_is_diffusers(number: int, spacing: str, offset: int, to_one: bool, prediction: str) -> None:
    config = options(spacing, offset, to_one, prediction_type=prediction)
    schedule, theirs = make_schedule(config, number, "cpu"), reference(config, number)
    # One set of noise levels for both: their float32 ones are compared above, here it is the update that counts.
    theirs.alphas_cumprod = schedule.alphas_cumprod
    theirs.final_alpha_cumprod = torch.tensor(1.0).double() if to_one else schedule.alphas_cumprod[0]
    ours = expected = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    for i, t in enumerate(theirs.timesteps):
        ours = step(schedule, ours, torch.full((2,), i))
        expected = theirs.step(denoise(expected, t), t, expected).prev_sample
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@every_spacing
@every_number
def test_float32_loop_is_diffusers_untouched(number: int, spacing: str, prediction: str) -> None:
    config = options(spacing, 1, prediction_type=prediction)
    schedule, theirs = make_schedule(config, number, "cpu"), reference(config, number)
    ours = expected = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(number))
    for i, t in enumerate(theirs.timesteps):
        ours = step(schedule, ours, torch.full((2,), i))
        expected = theirs.step(denoise(expected, t), t, expected).prev_sample
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=0, atol=5e-5)  # 1 - alpha loses digits in theirs at low noise


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_lanes_at_different_steps_are_independent(prediction: str) -> None:
    schedule = make_schedule(options(prediction_type=prediction), 10, "cpu")
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([7, 0, 9, 3, 3])
    together = step(schedule, latents, index)
    for lane in range(5):
        assert torch.equal(together[lane : lane + 1], step(schedule, latents[lane : lane + 1], index[lane : lane + 1]))
    order = torch.tensor([4, 2, 0, 3, 1])
    assert torch.equal(together[order], step(schedule, latents[order], index[order]))


def test_add_noise_is_diffusers() -> None:
    config = options()
    schedule, theirs = make_schedule(config, 10, "cpu"), reference(config, 10)
    x0, noise = torch.randn(2, 6, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    timesteps = torch.tensor([0, 1, 250, 499, 849, 999])
    ours = add_noise(x0, noise, schedule.alphas_cumprod[timesteps])
    torch.testing.assert_close(ours, theirs.add_noise(x0, noise, timesteps), rtol=0, atol=5e-6)


levels = st.floats(0.005, 0.999)


@given(levels, levels, st.integers(0, 2**31))
def test_ddim_moves_noise_between_levels(a: float, b: float, seed: int) -> None:
    x0, noise = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    here, there = torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64)
    moved = ddim_between(add_noise(x0, noise, here), x0, here, there)
    torch.testing.assert_close(moved, add_noise(x0, noise, there), rtol=1e-9, atol=1e-9)


@given(st.sampled_from(PREDICTIONS), levels, st.integers(0, 2**31))
def test_every_prediction_gives_back_x0(prediction: str, a: float, seed: int) -> None:
    x0, noise = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    level = torch.tensor([a], dtype=torch.float64)
    v = a**0.5 * noise - (1 - a) ** 0.5 * x0
    output = {"epsilon": noise, "v_prediction": v, "sample": x0}[prediction]
    torch.testing.assert_close(to_x0(output, add_noise(x0, noise, level), level, prediction), x0, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize("number", [0, -3, 1001])
def test_impossible_step_numbers_are_quoted(number: int) -> None:
    with pytest.raises(ValueError, match=rf"\[1, 1000\], got {number}"):
        make_schedule(options(), number, "cpu")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prediction_type", "flow"),
        ("timestep_spacing", "random"),
        ("beta_schedule", "squaredcos_cap_v2"),
        ("clip_sample", True),
        ("thresholding", True),
        ("rescale_betas_zero_snr", True),
        ("trained_betas", [0.1, 0.2]),
    ],
)
def test_options_that_are_not_carried_out_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as error:
        make_schedule({**options(), name: value}, 10, "cpu")
    assert repr(value) in str(error.value)
