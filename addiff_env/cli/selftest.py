"""Run an environment's model once against what it must equal, and measure it: what a first user of a GPU should run.

    addiff selftest env=sd15 device=cuda
    addiff selftest env=sd15 device=cpu num_inference_steps=4 num_envs=2
    addiff selftest --out report.md              the embedded world; the report also as a file

Each check passes, fails or is skipped with a reason, and one that fails keeps none from running. The report, in
Markdown, can be pasted into an issue. Exit status 1: something failed; 130: Ctrl-C, the report is of the checks before.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline

from addiff_env.cli.chosen import Chosen, add_settings, read_chosen
from addiff_env.diffusion.backbones import Backbone, FluxBackbone, initial_noise, load_backbone
from addiff_env.diffusion.backbones.flux import pack_latents, unpack_latents
from addiff_env.env.config import EnvConfig
from addiff_env.env.costs import best_seconds
from addiff_env.env.denoiser import Denoiser
from addiff_env.env.footprint import LAYOUTS, ROOM, footprint
from addiff_env.env.observer import Observer
from addiff_env.env.state import LaneState
from addiff_env.evaluation.methods.diffusers_methods import make_pipeline
from addiff_env.evaluation.run.memory import peak_memory
from addiff_env.evaluation.run.version import code_version
from addiff_env.loading.isolation import frozen, isolated
from addiff_env.loading.memory import GIB
from addiff_env.loading.weights import resolve_device, resolve_dtype
from addiff_env.perception.scorers import load_scorer
from addiff_env.storage.commands import INTERRUPTED, command_line
from addiff_env.storage.files import write_whole
from addiff_env.storage.pictures import read_picture

PROMPT = "a red circle left of a blue square"
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "open_clip_torch", "numpy")
# Mean absolute difference of final latents, in units of their standard deviation, that two ways to compute the same
# may show. They round in other places, and a schedule carries that on: over 50 steps of the embedded world 2e-3 in
# float16, 2e-2 in bfloat16. In float32 it is 1e-6 on a CPU; convolutions of a GPU may be in TF32, which has ten bits.
TOLERANCE = {"float32": 2e-3, "float16": 1e-2, "bfloat16": 5e-2}
SCHEDULERS = dict(ddim=DDIMScheduler, dpmpp_2m=DPMSolverMultistepScheduler, euler=FlowMatchEulerDiscreteScheduler)
ASSETS, CHECKPOINT = "ADDIFF_IMAGEREWARD_ASSETS", "ADDIFF_IMAGEREWARD"
# Of the README of ImageReward's repository: the scores of assets/images/1.webp to 4.webp for this prompt.
README_PROMPT = "a painting of an ocean with clouds and birds, day time, low depth field effect"
README_SCORES = (0.5811, 0.2745, -1.4132, -2.0296)
README_TOLERANCE = 0.01
PICTURES = 16  # at most, that scores are compared on
PASS, FAIL, SKIPPED = "pass", "FAIL", "skipped"


class Skip(Exception):
    """Why a check does not apply."""


@dataclass(frozen=True)
class Result:
    """One check's outcome: `PASS`, `FAIL` or `SKIPPED`, and what was measured or why."""

    check: str
    outcome: str
    text: str
    seconds: float = 0.0


@dataclass
class Subject:
    """What is tested; models are loaded when a check first asks for them."""

    chosen: Chosen
    config: EnvConfig

    @cached_property
    def backbone(self) -> Backbone:
        """The text-to-image model."""
        return load_backbone(**self.config.backbone_settings)

    @cached_property
    def denoiser(self) -> Denoiser:
        """The model on its schedule."""
        return Denoiser(self.config, self.backbone)

    @cached_property
    def observer(self) -> Observer:
        """Previews, encoders and scorer."""
        return Observer(self.config, self.denoiser)

    def noise(self, seeds: Sequence[int]) -> torch.Tensor:
        """Initial latents (B, C, h, w) of ``seeds``."""
        return initial_noise(self.backbone, self.denoiser.latent_shape, seeds)

    @isolated()
    def run(self, prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
        """Final latents (B, C, h, w) of the environment's own dynamics, all lanes together, as float32."""
        denoiser, lanes = self.denoiser, np.arange(len(prompts))
        state = LaneState.empty(len(prompts), self.backbone, denoiser.latent_shape)
        denoiser.start(state, lanes, prompts, seeds)
        for _ in range(self.config.num_inference_steps):
            denoiser.step(state, lanes, capture=False)
        return state.latents.float()


# --------------------------------------------------------------------------- checks


def parity(subject: Subject) -> str:
    """One prompt by the environment's own steps, and by diffusers' own pipeline on the same networks."""
    config = subject.config
    if config.eta > 0:
        raise Skip(f"eta={config.eta:g} draws noise in another order than diffusers does")
    ours, theirs = subject.run([PROMPT], [0]), reference(subject, [PROMPT], subject.noise([0]))
    return _compare(ours, theirs, subject.backbone.dtype_name)


@isolated()
def reference(subject: Subject, prompts: list[str], noise: torch.Tensor) -> torch.Tensor:
    """Final latents (B, C, h, w) of diffusers' pipeline from ``noise``, as float32."""
    config, backbone = subject.config, subject.backbone
    call: dict[str, Any] = {
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "height": config.height,
        "width": config.width,
        "output_type": "latent",
    }
    with frozen(backbone):
        if isinstance(backbone, FluxBackbone):
            packed = _flux_pipeline(backbone)(
                prompts, latents=pack_latents(noise), max_sequence_length=backbone.max_tokens, **call
            ).images
            return unpack_latents(packed, *noise.shape[2:]).float()
        pipeline = make_pipeline(backbone, SCHEDULERS[config.solver], None, "parity")
        if backbone.passes(config.guidance_scale) == 2:
            call["negative_prompt"] = config.negative_prompt
        return pipeline(prompts, latents=noise, **call).images.float()


def _flux_pipeline(backbone: FluxBackbone) -> FluxPipeline:
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(backbone.scheduler_config),
        vae=backbone.vae,
        text_encoder=backbone.clip,
        tokenizer=backbone.clip_tokenizer,
        text_encoder_2=backbone.t5,
        tokenizer_2=backbone.tokenizer,
        transformer=backbone.transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def lanes(subject: Subject) -> str:
    """All lanes in one batch, and each alone."""
    number = subject.chosen.num_envs
    if number == 1:
        raise Skip("there is one lane only: name more, e.g. num_envs=16")
    prompts = [f"{PROMPT}, {lane}" for lane in range(number)]
    together = subject.run(prompts, range(number))
    alone = torch.cat([subject.run([prompt], [seed]) for seed, prompt in enumerate(prompts)])
    return f"{number} lanes: " + _compare(together, alone, subject.backbone.dtype_name)


def _compare(ours: torch.Tensor, theirs: torch.Tensor, dtype: str) -> str:
    """How far latents lie apart.

    Raises:
        AssertionError: further than `TOLERANCE`, or they are not finite.
    """
    broken = [name for name, latents in (("ours", ours), ("theirs", theirs)) if not torch.isfinite(latents).all()]
    if broken:
        raise AssertionError(f"latents are not finite in {dtype}: {', '.join(broken)}")
    difference, size, bar = (ours - theirs).abs(), float(theirs.std()), TOLERANCE[dtype]
    mean = float(difference.mean())
    text = (
        f"absolute difference {mean:.2g} on average, {float(difference.max()):.2g} at most; the average is "
        f"{mean / size:.2g} of the latents' deviation, tolerated in {dtype}: {bar:g}"
    )
    if not mean <= bar * size:
        raise AssertionError(text)
    return text


def looks(subject: Subject) -> str:
    """Milliseconds a lane of a look, preview decode included, and of a step, at the lanes asked for."""
    denoiser, backbone, config = subject.denoiser, subject.backbone, subject.config
    number = min(subject.chosen.num_envs, config.batch_size)
    every = np.arange(number)
    observer = subject.observer
    with isolated():
        widths = observer.perception.clip.width, observer.perception.dino.width
        state = LaneState.empty(number, backbone, denoiser.latent_shape, *widths)
        denoiser.start(state, every, [PROMPT] * number, list(every))
        observer.start(state, every)

        def step() -> None:
            state.step_index[:] = 0
            denoiser.step(state, every)

        seconds = [best_seconds(call, backbone.device, 3, 1) for call in (step, lambda: observer.look(state, every))]
    a_step, a_look = (1000 * each / number for each in seconds)
    flops = observer.flops_per_call["look"] / (denoiser.passes_per_nfe * denoiser.flops_per_call["denoiser"])
    return (
        f"a look {a_look:.3g} ms, a step {a_step:.3g} ms a lane, at {number} lanes: {a_look / a_step:.0%} of a step "
        f"({flops:.0%} of its FLOPs)"
    )


def precision(subject: Subject) -> str:
    """How far looks in half precision move what is read of finished pictures, from strict float32 ones."""
    backbone, perception = subject.backbone, subject.observer.perception
    number = max(2, min(subject.chosen.num_envs, PICTURES))
    usual, half = perception.precision, perception.precision or torch.bfloat16
    with isolated():
        pictures = backbone.decode(subject.run([PROMPT] * number, range(number)).to(backbone.dtype))
        found = []
        for perception.precision in (None, half):
            features = perception.look(pictures, [PROMPT] * number)
            found.append({"CLIP": features.clip_score, "scorer": features.reward_score, "DINO": features.dino})
    perception.precision = usual
    strict, rounded = found
    moved = [f"{name} {_moved(strict[name], rounded[name])}" for name in ("CLIP", "scorer")]
    away = 1 - torch.cosine_similarity(strict["DINO"], rounded["DINO"])
    state = "as looks are" if usual else "which looks here are not in"
    return (
        f"{str(half).removeprefix('torch.')}, {state}, on {number} pictures: {', '.join(moved)}, "
        f"DINO 1 - cosine {float(away.mean()):.1g}"
    )


def _moved(strict: torch.Tensor, rounded: torch.Tensor) -> str:
    moved = (strict - rounded).abs()
    return f"{float(moved.mean()):.2g} (at most {float(moved.max()):.2g}, of a spread of {float(strict.std()):.2g})"


def memory(subject: Subject) -> str:
    """The peak so far, against the accounting of `addiff doctor` where there is one."""
    peak, env_id, config = peak_memory(subject.backbone.device), subject.chosen.env_id, subject.config
    on_gpu = subject.backbone.device.type == "cuda"
    what = "allocated on the device" if on_gpu else "resident in the process"
    text = f"{peak / GIB:.2f} GiB at most {what}"
    if env_id not in LAYOUTS or not on_gpu:
        return text
    number = min(subject.chosen.num_envs, config.batch_size)
    accounted = footprint(env_id, subject.backbone.dtype_name, number, (config.height, config.width))
    expected = accounted.peak_with(config.offload)
    if peak > ROOM * expected:
        raise AssertionError(f"{text}, by accounting {expected / GIB:.2f}")
    return f"{text} (by accounting {expected / GIB:.2f})"


def image_reward(subject: Subject) -> str:
    """ImageReward's scores of its README's four pictures, where somebody says where they are."""
    folder = os.path.expanduser(os.environ.get(ASSETS, ""))
    if not folder:
        raise Skip(f"{ASSETS} does not name assets/images of ImageReward's repository")
    scorer = load_scorer(os.environ.get(CHECKPOINT, "imagereward"), resolve_device(subject.config.device))
    scores = []
    for number in range(1, len(README_SCORES) + 1):
        picture = torch.from_numpy(read_picture(Path(folder, f"{number}.webp")).copy())
        scores.append(float(scorer.score(picture.permute(2, 0, 1)[None] / 255, [README_PROMPT])))
    difference = max(abs(ours - theirs) for ours, theirs in zip(scores, README_SCORES, strict=True))
    text = f"scores {', '.join(f'{score:.4f}' for score in scores)}: {difference:.2g} from the README's at most"
    if not difference <= README_TOLERANCE:
        raise AssertionError(f"{text}; tolerated: {README_TOLERANCE:g}")
    return f"{text} (tolerated: {README_TOLERANCE:g})"


CHECKS: dict[str, tuple[str, Callable[[Subject], str]]] = {
    "load": ("the model loads", lambda subject: f"{type(subject.backbone).__name__} of {subject.backbone.name}"),
    "parity": ("as diffusers' own pipeline", parity),
    "lanes": ("lanes as single pictures", lanes),
    "looks": ("a look against a step", looks),
    "precision": ("looks in half precision", precision),
    "memory": ("peak memory", memory),
    "imagereward": ("ImageReward's README", image_reward),
}


def check(subject: Subject, name: str) -> Result:
    """One check's result, whatever it raises."""
    title, call = CHECKS[name]
    began = time.perf_counter()
    try:
        outcome, text = PASS, call(subject)
    except Skip as reason:
        outcome, text = SKIPPED, str(reason)
    except Exception as error:  # the other checks are to run: a GPU's errors are of many kinds
        outcome, text = FAIL, f"{error}" if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
    return Result(title, outcome, " ".join(text.split()), time.perf_counter() - began)


def run_checks(subject: Subject, names: Sequence[str]) -> Iterator[Result]:
    """The results of the checks called so; where the model does not load, those that need it are skipped."""
    loads = True
    for name in dict.fromkeys(names):
        title = CHECKS[name][0]
        if loads or name == "imagereward":
            result = check(subject, name)
        else:
            result = Result(title, SKIPPED, "the model does not load")
        print(f"{result.outcome:<8}{title}", file=sys.stderr, flush=True)
        yield result
        loads = loads and not (name == "load" and result.outcome == FAIL)


# --------------------------------------------------------------------------- the report


def report(subject: Subject, results: Sequence[Result], command: str) -> str:
    """The results in Markdown, with what ran where: for an issue."""
    failed = sum(result.outcome == FAIL for result in results)
    rows = [("check", "outcome", "measured", "seconds"), ("---",) * 4]
    rows += [(r.check, r.outcome, r.text.replace("|", "\\|"), f"{r.seconds:.1f}") for r in results]
    facts = "\n".join(f"- {name}: {value}" for name, value in _facts(subject).items())
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    end = f"{failed} of {len(results)} checks failed" if failed else "no check failed"
    return f"### `{command}`\n\n{facts}\n\n{table}\n\n{end}\n"


def _facts(subject: Subject) -> dict[str, str]:
    config, chosen = subject.config, subject.chosen
    return {
        "environment": f"{chosen.env_id}, {chosen.num_envs} lanes, {config.height} x {config.width}, {config.solver}, "
        f"{config.num_inference_steps} steps, guidance {config.guidance_scale:g}",
        "model": config.model,
        "device": f"{_device(config)}, {config.dtype}",
        "addiff": code_version(),
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "libraries": ", ".join(f"{name} {_version(name)}" for name in LIBRARIES),
    }


def _device(config: EnvConfig) -> str:
    if not config.device.startswith("cuda") or not torch.cuda.is_available():
        return f"{config.device}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    index = torch.device(config.device)
    return f"{torch.cuda.get_device_name(index)}, CUDA {torch.version.cuda}"


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "missing"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="addiff selftest", description=(__doc__ or "").split("\n")[0])
    add_settings(parser)
    parser.add_argument("--checks", default=",".join(CHECKS), help="some of these, by name (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE", help="also write the report there")
    options = parser.parse_intermixed_args(argv)
    names = options.checks.split(",")
    if unknown := [name for name in names if name not in CHECKS]:
        raise ValueError(f"no check {', '.join(map(repr, unknown))}; known: {', '.join(CHECKS)}")
    chosen = read_chosen(options.settings)
    if options.out:
        Path(options.out).touch()  # a place that cannot be written to is refused before anything is computed
    subject = Subject(chosen, _resolved(chosen.config))
    results: list[Result] = []
    status = 0
    try:
        for result in run_checks(subject, names):
            results.append(result)
            status |= result.outcome == FAIL
    except KeyboardInterrupt:
        status = INTERRUPTED
        print(f"addiff selftest: interrupted after {len(results)} of {len(names)} checks", file=sys.stderr)
    only = () if names == list(CHECKS) else ("--checks", options.checks)
    text = report(subject, results, command_line("addiff", "selftest", *options.settings, *only))
    print(text)
    if options.out:
        write_whole(Path(options.out), text)
    return status


def _resolved(config: EnvConfig) -> EnvConfig:
    """With the device and dtype that ``auto`` stands for; what is not to be had is left for the checks to tell."""
    try:
        device = resolve_device(config.device)
    except ValueError:
        return config
    return replace(config, device=device, dtype=resolve_dtype(config.dtype, device))
