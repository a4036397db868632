"""The solvers against diffusers' own schedulers, which are the reference throughout."""

import re
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from rounding import assert_same_but_for_rounding

from addiff_env.diffusion.samplers import Level, Schedule, add_noise, ddim_between, make_schedule, solver_step, to_x0

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
    x0 = to_x0(output, latents, schedule.current.at(index), schedule.prediction_type)
    return solver_step(schedule, latents, x0, index)


def run(schedule: Schedule, latents: torch.Tensor) -> torch.Tensor:
    """The whole grid, all lanes in step, with the history that multistep solvers want."""
    before, known = torch.zeros_like(latents), torch.zeros(len(latents), dtype=torch.bool)
    for i in range(schedule.num_inference_steps):
        at = torch.full((len(latents),), i)
        output = denoise(latents, schedule.timesteps[at])
        x0 = to_x0(output, latents, schedule.current.at(at), schedule.prediction_type)
        latents = solver_step(schedule, latents, x0, at, before, known)
        before, known = x0, torch.ones_like(known)
    return latents


def power(level: float) -> Level:
    alphas_cumprod = torch.tensor([level], dtype=torch.float64)
    return Level(alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt())


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
        (ours.training.alpha**2, levels),
        (ours.current.alpha**2, levels[theirs.timesteps]),
        (ours.next.alpha**2, alpha_to),
    ):
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine, their, rtol=2e-5, atol=1e-6)  # theirs are float32


def test_diffusers_defaults_are_ours() -> None:
    plain = {name: BASE[name] for name in ("num_train_timesteps", "beta_start", "beta_end")}
    ours, theirs = make_schedule(plain, 10, "cpu"), reference({**plain, "clip_sample": False}, 10)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    assert ours.prediction_type == theirs.config.prediction_type
    torch.testing.assert_close(ours.training.alpha**2, theirs.alphas_cumprod.double(), rtol=2e-5, atol=1e-6)
    assert ours.next.alpha[-1] == 1


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
    theirs.alphas_cumprod = schedule.training.alpha**2
    theirs.final_alpha_cumprod = torch.tensor(1.0).double() if to_one else theirs.alphas_cumprod[0]
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
    assert_same_but_for_rounding(ours, expected, 5e-5)  # 1 - alpha loses digits in theirs at low noise


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
    ours = add_noise(x0, noise, schedule.training.at(timesteps))
    assert_same_but_for_rounding(ours, theirs.add_noise(x0, noise, timesteps), 5e-6)


levels = st.floats(0.005, 0.999)


@given(levels, levels, st.integers(0, 2**31))
def test_ddim_moves_noise_between_levels(a: float, b: float, seed: int) -> None:
    x0, noise = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    here, there = power(a), power(b)
    moved = ddim_between(add_noise(x0, noise, here), x0, here, there)
    torch.testing.assert_close(moved, add_noise(x0, noise, there), rtol=1e-9, atol=1e-9)


@given(st.sampled_from(PREDICTIONS), levels, st.integers(0, 2**31))
def test_every_prediction_gives_back_x0(prediction: str, a: float, seed: int) -> None:
    x0, noise = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    level = power(a)
    v = a**0.5 * noise - (1 - a) ** 0.5 * x0
    output = {"epsilon": noise, "v_prediction": v, "sample": x0}[prediction]
    torch.testing.assert_close(to_x0(output, add_noise(x0, noise, level), level, prediction), x0, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------ stochastic DDIM, zero terminal SNR, other betas


@pytest.mark.parametrize("eta", [0.3, 1.0])
@every_spacing
def test_stochastic_ddim_is_diffusers(spacing: str, eta: float) -> None:
    config = options(spacing, 1, prediction_type="v_prediction")
    schedule, theirs = make_schedule(config, 10, "cpu", eta=eta), reference(config, 10)
    theirs.alphas_cumprod = schedule.training.alpha**2
    theirs.final_alpha_cumprod = theirs.alphas_cumprod[0]
    rng = torch.Generator().manual_seed(0)
    ours = expected = torch.randn(2, 3, 4, 4, generator=rng, dtype=torch.float64)
    for i, t in enumerate(theirs.timesteps):
        at, noise = torch.full((2,), i), torch.randn(ours.shape, generator=rng, dtype=torch.float64)
        x0 = to_x0(denoise(ours, t.expand(2)), ours, schedule.current.at(at), "v_prediction")
        ours = solver_step(schedule, ours, x0, at, noise=noise)
        expected = theirs.step(denoise(expected, t), t, expected, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_stochastic_ddim_needs_noise() -> None:
    schedule = make_schedule(options(), 10, "cpu", eta=0.5)
    with pytest.raises(ValueError, match="eta 0.5 needs noise"):
        step(schedule, torch.zeros(1, 1, 2, 2), torch.tensor([0]))


@pytest.mark.parametrize(
    "more",
    [
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
        {"trained_betas": [0.001 + 0.00001 * i for i in range(1000)]},
    ],
)
def test_other_betas_are_diffusers(more: dict[str, Any]) -> None:
    config = options(**more)
    schedule, theirs = make_schedule(config, 10, "cpu"), reference(config, 10)
    torch.testing.assert_close(schedule.training.alpha**2, theirs.alphas_cumprod.double(), rtol=1e-4, atol=1e-6)
    ours = expected = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for i, t in enumerate(theirs.timesteps):
        ours = step(schedule, ours, torch.full((2,), i))
        expected = theirs.step(denoise(expected, t), t, expected).prev_sample
    assert_same_but_for_rounding(ours, expected, 1e-4)


def test_zero_signal_is_pure_noise() -> None:
    schedule = make_schedule(options(rescale_betas_zero_snr=True, prediction_type="v_prediction"), 10, "cpu")
    assert schedule.current.alpha[0] == 0 and schedule.current.sigma[0] == 1


# ------------------------------------------------------------------ DPM-Solver++(2M)

DPM = {name: value for name, value in BASE.items() if name != "clip_sample"}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"solver_type": "heun"},
        {"final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False},
        {"euler_at_final": True},
        {"use_karras_sigmas": True},
        {"steps_offset": 1},
        {"beta_schedule": "linear"},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' own set_timesteps under NumPy 2
@every_spacing
@every_number
def test_dpm_solver_is_diffusers(number: int, spacing: str, more: dict[str, Any]) -> None:
    config = {**DPM, "timestep_spacing": spacing, **more}
    schedule, theirs = make_schedule(config, number, "cpu", "dpmpp_2m"), DPMSolverMultistepScheduler(**config)
    theirs.set_timesteps(number)
    assert schedule.timesteps.tolist() == theirs.timesteps.tolist()
    ratio = schedule.current.sigma / schedule.current.alpha
    torch.testing.assert_close(ratio, theirs.sigmas[:-1].double(), rtol=2e-4, atol=1e-5)
    # One set of noise levels for both: their float32 ones are compared above, here it is the update that counts.
    end = schedule.next.sigma[-1:] / schedule.next.alpha[-1:]
    theirs.sigmas = torch.cat([ratio, end])
    start = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    expected = start
    for t in theirs.timesteps:
        # The scheduler's step works in float32 only at its very end; the state is kept in float64.
        expected = theirs.step(denoise(expected, t), t, expected).prev_sample
    torch.testing.assert_close(run(schedule, start), expected, rtol=1e-5, atol=1e-5)


def test_dpm_solver_needs_its_history() -> None:
    schedule = make_schedule(DPM, 10, "cpu", "dpmpp_2m")
    assert schedule.multistep
    with pytest.raises(ValueError, match="previous_x0"):
        step(schedule, torch.zeros(1, 1, 2, 2), torch.tensor([0]))


def test_dpm_solver_without_history_is_first_order() -> None:
    """A lane that has just been refined goes by DDIM, whatever its neighbours do."""
    schedule = make_schedule(DPM, 20, "cpu", "dpmpp_2m")
    latents, x0, before = torch.randn(3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at, known = torch.tensor([5, 5]), torch.tensor([True, False])
    both = solver_step(schedule, latents, x0, at, before, known)
    first = ddim_between(latents, x0, schedule.current.at(at), schedule.next.at(at))
    torch.testing.assert_close(both[1], first[1], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(both[0], first[0], atol=1e-3)


# ------------------------------------------------------------------ Euler for flow matching


@pytest.mark.parametrize(
    "config",
    [
        {"shift": 1.0},
        {"shift": 3.0},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear", "max_shift": 2.0},
    ],
    ids=str,
)
@every_number
def test_flow_euler_is_diffusers(number: int, config: dict[str, Any]) -> None:
    tokens = 1024
    theirs = FlowMatchEulerDiscreteScheduler(**config)
    low, high = theirs.config.base_shift, theirs.config.max_shift
    mu = low + (high - low) * (tokens - 256) / (4096 - 256)
    theirs.set_timesteps(sigmas=[1 - i / number for i in range(number)], mu=mu)
    schedule = make_schedule({**config, "_class_name": "FlowMatchEuler"}, number, "cpu", "euler", image_tokens=tokens)
    torch.testing.assert_close(schedule.timesteps, theirs.timesteps.double(), rtol=1e-6, atol=1e-4)
    start = expected = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(number))
    for t in theirs.timesteps:
        expected = theirs.step(denoise(expected, t), t, expected).prev_sample
    assert_same_but_for_rounding(run(schedule, start), expected)


def test_dynamic_shifting_needs_the_size() -> None:
    with pytest.raises(ValueError, match="image_tokens"):
        make_schedule(
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, 4, "cpu", "euler"
        )


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize("number", [0, -3, 1001])
def test_impossible_step_numbers_are_quoted(number: int) -> None:
    with pytest.raises(ValueError, match=rf"\[1, 1000\], got {number}"):
        make_schedule(options(), number, "cpu")


@given(
    number=st.one_of(st.sampled_from([61, 121, 201, 999, 1000]), st.integers(1, 1000)),
    spacing=st.sampled_from(SPACINGS),
    offset=st.sampled_from([0, 1]),
    solver=st.sampled_from(["ddim", "dpmpp_2m"]),
)
def test_every_grid_has_its_number_of_steps_and_falls(number: int, spacing: str, offset: int, solver: str) -> None:
    """Or it is refused: a rounding must not add a step, nor put two on one timestep or beyond the training's."""
    try:
        schedule = make_schedule(options(spacing, offset), number, "cpu", solver)
    except ValueError as error:
        assert f"num_inference_steps {number} " in str(error) and number >= 999
        return
    timesteps = schedule.timesteps
    assert schedule.num_inference_steps == len(timesteps) == number
    assert 0 <= timesteps.min() and timesteps.max() < 1000
    assert (timesteps.diff() < 0).all() and (schedule.current.alpha.diff() > 0).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prediction_type", "flow"),
        ("timestep_spacing", "random"),
        ("beta_schedule", "sigmoid"),
        ("clip_sample", True),
        ("thresholding", True),
        ("use_exponential_sigmas", True),
    ],
)
def test_options_that_are_not_carried_out_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as error:
        make_schedule({**options(), name: value}, 10, "cpu")
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("config", "solver", "shown"),
    [
        (BASE, "euler", "ddim, dpmpp_2m"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "ddim", "euler"),
        (BASE, "heun", "'heun'"),
        ({**DPM, "algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m", "sde-dpmsolver++"),
        ({**DPM, "solver_type": "bh2"}, "dpmpp_2m", "bh2"),
        ({**BASE, "rescale_betas_zero_snr": True}, "ddim", "epsilon"),
    ],
)
def test_solvers_that_do_not_fit_are_refused(config: dict[str, Any], solver: str, shown: str) -> None:
    with pytest.raises(ValueError, match=re.escape(shown)):
        make_schedule(config, 10, "cpu", solver)


@pytest.mark.parametrize(("eta", "solver"), [(-0.1, "ddim"), (0.5, "dpmpp_2m")])
def test_impossible_etas_are_quoted(eta: float, solver: str) -> None:
    with pytest.raises(ValueError, match=f"{eta}"):
        make_schedule(BASE, 10, "cpu", solver, eta)
