"""Search along the path, on a Gaussian mixture whose denoiser is known in closed form, by hand computations."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from addiff_env.diffusion.samplers import Level, ancestral_between, ddim_between, make_schedule, renoise_between
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.methods.registry import make_method
from addiff_env.evaluation.methods.steering import FeynmanKac, Restart, RolloverBudgetForcing

SHARES, MEANS, SPREAD = (0.7, 0.3), (-1.0, 1.0), 0.1  # of the mixture
CONFIG = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000}
FLOPS = {"denoiser": 1000.0, "decode": 100.0, "start": 7.0, "scorer": 10.0, "text": 5.0}


def posterior_mean(x, alpha, sigma):
    """E[x0 | x_t] of the mixture."""
    spread = alpha**2 * SPREAD**2 + sigma**2
    logs = [math.log(w) - (x - alpha * m) ** 2 / (2 * spread) for w, m in zip(SHARES, MEANS, strict=True)]
    means = [m + alpha * SPREAD**2 / spread * (x - alpha * m) for m in MEANS]
    first = 1 / (1 + np.exp(np.clip(logs[1] - logs[0], -500, 500)))
    return first * means[0] + (1 - first) * means[1]


class Mixture:
    """A backbone of one latent number, float64."""

    name, solver, dtype, dtype_name, device = "mixture", "ddim", torch.float64, "float64", torch.device("cpu")

    def __init__(self, calls):
        self.calls = calls

    def schedule(self, steps, shape, solver=None, eta=0.0):
        return make_schedule({**CONFIG, "_class_name": "DDIMScheduler"}, steps, "cpu", solver or "ddim", eta)

    def encode_prompts(self, prompts, negative_prompt=None):
        return torch.zeros(len(prompts))

    def predict(self, latents, timesteps, level, conditioning, guidance_scale, capture=True):
        self.calls.append(len(latents))
        x0 = posterior_mean(latents.flatten().numpy(), level.alpha.numpy(), level.sigma.numpy())
        return SimpleNamespace(x0=torch.from_numpy(np.asarray(x0)).view_as(latents))

    def decode(self, latents):
        return latents.expand(-1, 3, 1, 1)


def reward(value):
    return np.clip(value, -1, 1)


def toy(batch_size=64):
    """What methods need of an environment; the reward of a picture is its number, between -1 and 1."""
    scorer = SimpleNamespace(std=1.0, limit=5.0, score=lambda pictures, prompts: pictures[:, 0, 0, 0].clamp(-1, 1))
    perception = SimpleNamespace(
        scorer=scorer, score_limit=5.0, reads_latents=False, scorer_text_flops=lambda: 3.0, text_flops=lambda: 2.0
    )
    backbone = Mixture([])
    return SimpleNamespace(
        backbone=backbone,
        latent_shape=(1, 1, 1),
        passes_per_nfe=1,
        flops_per_call=FLOPS,
        perception=perception,
        observer=SimpleNamespace(previewer=SimpleNamespace(decode=backbone.decode)),
        config=SimpleNamespace(
            batch_size=batch_size, guidance_scale=1.0, negative_prompt=None, num_inference_steps=10, height=1, width=1
        ),
    )


def draws(seed):
    """The numbers that a picture's generator gives."""
    generator = torch.Generator().manual_seed(seed)
    return iter(lambda: float(torch.randn(1, 1, 1, 1, generator=generator, dtype=torch.float64)), None)


def levels(method):
    schedule = method.schedule
    both = (schedule.current, schedule.next)
    return [[(float(a), float(s)) for a, s in zip(level.alpha, level.sigma, strict=True)] for level in both]


def ancestral(x, x0, current, following, noise):
    """DDPM's posterior q(x_s | x_t, x0), in the form of its mean and variance."""
    (a, s), (b, r) = current, following
    ratio = a / b
    added = s**2 - ratio**2 * r**2
    return b * x0 * added / s**2 + ratio * r**2 / s**2 * x + math.sqrt(max(0, added * r**2 / s**2)) * noise


def test_the_stochastic_step_is_ddim_with_eta_one_and_the_posterior_of_flows():
    x, x0, noise = torch.randn(3, 4, 1, 1, 1, dtype=torch.float64)
    current, following = (
        Level(power.sqrt(), (1 - power).sqrt()) for power in torch.tensor([[0.3] * 4, [0.6] * 4]).double()
    )
    ours = ancestral_between(x, x0, current, following, noise)
    assert torch.allclose(ours, ddim_between(x, x0, current, following, 1.0, noise), atol=1e-12)
    flow = Level(torch.tensor([0.2] * 4).double(), torch.tensor([0.8] * 4).double())
    cleaner = Level(torch.tensor([0.5] * 4).double(), torch.tensor([0.5] * 4).double())
    by_hand = [ancestral(*(float(v[k]) for v in (x, x0)), (0.2, 0.8), (0.5, 0.5), float(noise[k])) for k in range(4)]
    found = ancestral_between(x, x0, flow, cleaner, noise).flatten()
    assert found.numpy() == pytest.approx(by_hand, abs=1e-6)
    up = renoise_between(torch.full_like(x, 0.7), cleaner, flow, noise).flatten()
    assert up.numpy() == pytest.approx((0.4 * 0.7 + math.sqrt(0.64 - 0.16 * 0.25) * noise.flatten()).numpy(), abs=1e-6)


# --------------------------------------------------------------------------- Feynman-Kac steering


@pytest.mark.parametrize("scale", [0.7, 1e-9])
def test_many_particles_follow_the_tilted_mixture(scale):
    """The share of a mode is its own times exp(scale * reward), normalised; without tilt it is the model's."""
    method = FeynmanKac(toy(), 4000, "ddim", 60, scale, looks=6)
    found = method.steer([Item("p", 3, "c")])
    right = (found.latents[0].flatten() > 0).double()
    expected = [w * math.exp(scale * m) for w, m in zip(SHARES, MEANS, strict=True)]
    assert float((found.weights[0] * right).sum()) == pytest.approx(expected[1] / sum(expected), abs=0.03)
    assert found.weights.sum(1).tolist() == pytest.approx([1])


def test_two_particles_by_hand():
    """Every number of a path of three steps, with a look at each: weights, ancestors, noise."""
    method = FeynmanKac(toy(), 2, "ddim", 3, 2.0, looks=3)
    assert method.looks == [0, 1, 2] and method.max_nfe == 6
    seed, stride = 5, 1_000_003
    noise = [draws(seed), draws(seed + stride)]
    first = torch.Generator().manual_seed(seed)  # also draws the ancestors
    current, following = levels(method)
    x = [float(torch.randn(1, 1, 1, 1, generator=first, dtype=torch.float64)), next(noise[1])]
    before = [0.0, 0.0]
    for k in range(3):
        x0 = [float(posterior_mean(v, *current[k])) for v in x]
        now = [float(reward(v)) for v in x0]
        exponents = [2.0 * (a - b) for a, b in zip(now, before, strict=True)]
        weights = [math.exp(e) / sum(map(math.exp, exponents)) for e in exponents]
        before = now
        if k < 2:
            parents = torch.multinomial(torch.tensor(weights).double(), 2, True, generator=first).tolist()
            x, x0, before = ([values[p] for p in parents] for values in (x, x0, now))
        fresh = [float(torch.randn(1, 1, 1, 1, generator=first, dtype=torch.float64)), next(noise[1])]
        x = [ancestral(a, b, current[k], following[k], e) for a, b, e in zip(x, x0, fresh, strict=True)]
    found = method.steer([Item("p", seed, "c")])
    assert found.latents.flatten().tolist() == pytest.approx(x, abs=1e-9)
    assert found.weights[0].tolist() == pytest.approx(weights, abs=1e-9)
    assert found.scores[0].tolist() == pytest.approx(before, abs=1e-9)


# --------------------------------------------------------------------------- rollover budget forcing


def forced(method, seed, quotas):
    """One picture by a plain loop: its last clean prediction, its reward, its evaluations."""
    noise, nfe = draws(seed), 1
    current, following = levels(method)
    x = next(noise)
    x0 = float(posterior_mean(x, *current[0]))
    score, left = float(reward(x0)), 0
    for k, quota in enumerate(quotas):
        left += quota
        tries = []
        while left:
            proposal = ancestral(x, x0, current[k], following[k], next(noise))
            clean = float(posterior_mean(proposal, *current[k + 1]))
            tries.append((float(reward(clean)), proposal, clean))
            left, nfe = left - 1, nfe + 1
            if tries[-1][0] > score:
                break
        score, x, x0 = max(tries, key=lambda one: one[0])
    return x0, score, nfe


@pytest.mark.parametrize(("max_nfe", "quotas"), [(5, [1, 1, 1, 1]), (12, [3, 3, 3, 2]), (40, [10, 10, 10, 9])])
def test_rollover_budget_forcing_by_a_plain_loop(max_nfe, quotas):
    method = RolloverBudgetForcing(toy(), max_nfe, "ddim", 5)
    assert method.quotas == quotas
    items = [Item("p", seed, "c") for seed in range(12)]
    found = method.search(items)
    by_hand = [forced(method, item.seed, quotas) for item in items]
    assert found.x0.flatten().tolist() == pytest.approx([x0 for x0, _, _ in by_hand], abs=1e-9)
    assert found.score.tolist() == pytest.approx([score for _, score, _ in by_hand], abs=1e-9)
    assert found.nfe.tolist() == [nfe for _, _, nfe in by_hand] and max(found.nfe) <= max_nfe


def test_a_larger_budget_finds_the_rewarded_mode_more_often():
    items = [Item("p", seed, "c") for seed in range(300)]
    shares = []
    for max_nfe in (10, 60):
        method = RolloverBudgetForcing(toy(400), max_nfe, "ddim", 10)
        shares.append(float((method.search(items).x0 > 0).double().mean()))
    assert shares[0] < 0.45 and shares[1] > shares[0] + 0.2


# --------------------------------------------------------------------------- restart sampling


def test_restart_sampling_by_a_plain_loop():
    method = Restart(toy(), 20, "ddim", 8, 0.2, 3.0)
    current, following = levels(method)
    ratios = [s / a for a, s in current]
    first = min(k for k, t in enumerate(ratios) if t <= 3.0)
    last = max(k for k, t in enumerate(ratios) if t >= 0.2)
    assert (method.first, method.last) == (first, last) and method.restarts == (20 - 8) // (last - first)
    noise = draws(9)
    x, path = next(noise), list(range(last))
    for _ in range(method.restarts):
        path += ["up", *range(first, last)]
    for k in [*path, *range(last, 8)]:
        if k == "up":
            (a, s), (b, r) = current[last], current[first]
            x = b / a * x + math.sqrt(r**2 - (b / a * s) ** 2) * next(noise)
            continue
        x0 = float(posterior_mean(x, *current[k]))
        (a, s), (b, r) = current[k], following[k]
        x = b * x0 + r * (x - a * x0) / s
    assert float(method.latents([Item("p", 9, "c")])) == pytest.approx(x, abs=1e-9)


def test_restarts_keep_the_models_distribution():
    """With a fine grid: noise up and down again leaves the modes their shares, but not the pictures in theirs."""
    items = [Item("p", seed, "c") for seed in range(1500)]
    plain = Restart(toy(2000), 41, "ddim", 40, 0.3, 0.45)
    again = Restart(toy(2000), 120, "ddim", 40, 0.2, 4.0)
    ends = [method.latents(items).flatten() > 0 for method in (plain, again)]
    for right in ends:
        assert float(right.double().mean()) == pytest.approx(0.3, abs=0.05)
    assert float((ends[0] != ends[1]).double().mean()) > 0.1


# --------------------------------------------------------------------------- what all share


SPECS = (
    "fk-3:ddim-4",
    "fk-2:ddim-4@0.5",
    "rbf-9:ddim-4",
    "rbf-4:ddim-4",
    "restart-19:ddim-10",
    "restart-20:ddim-10@1:5",
)


@pytest.mark.parametrize("spec", SPECS)
def test_a_picture_depends_on_its_own_seed_alone_and_keeps_its_budget(spec):
    items = [Item("p", seed, "c") for seed in range(7)]
    method = make_method(spec, toy())
    together = [made for group in method.make(items) for _, made in group]
    alone = [made for item in items for group in make_method(spec, toy(2)).make([item]) for _, made in group]
    assert method.name == spec
    for one, other in zip(together, alone, strict=True):
        assert np.array_equal(one.picture, other.picture) and one.nfe == other.nfe <= method.max_nfe
        assert one.net_flops == other.net_flops


@pytest.mark.parametrize("spec", SPECS)
def test_evaluations_are_those_of_the_network_and_looks_are_paid(spec):
    env = toy()
    method = make_method(spec, env)
    ((_, made),) = next(iter(method.make([Item("p", 1, "c")])))
    assert sum(env.backbone.calls) == made.nfe
    plain = made.nfe * FLOPS["denoiser"] + FLOPS["decode"] + FLOPS["start"] - 2.0
    looks = {"fk": lambda: method.particles * len(method.looks), "rbf": lambda: made.nfe, "restart": lambda: 0}
    number = looks[spec.partition("-")[0]]()
    assert made.net_flops == plain + (10.0 * number + 3.0 if number else 0.0)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("fk-0:ddim-4", "needs a particle"),
        ("fk-2:ddim-4@0", "a positive scale"),
        ("fk-2:dpmpp_2m-4", "its solver is ddim or euler"),
        ("rbf-3:ddim-4", "4 steps take 4 evaluations, max_nfe is 3"),
        ("restart-10:ddim-10", "so max_nfe >= "),
        ("restart-30:ddim-10@5:6", "two must lie in the interval"),
    ],
)
def test_budgets_and_settings_that_make_no_sense_are_refused(spec, words):
    with pytest.raises(ValueError, match=words):
        make_method(spec, toy())
