"""A pipeline that makes pictures while somebody watches: the agent's, and beside it a fixed number of steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch

import addiff_env
from addiff_env.diffusion.backbones import decode_finite, to_uint8
from addiff_env.diffusion.backbones.tokens import spelled_out_words, truncated_words
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.pipeline import AdaptivePipeline, GeneratedImage
from addiff_env.serving.limits import Limits, PictureRequest
from addiff_env.serving.pushed import pushed
from addiff_env.tiny.checker import check_picture
from addiff_env.types import Action, Generated

Method = Literal["agent", "fixed"]
TINY_PRESETS = (
    "a red circle",
    "three green triangles",
    "a red circle left of a blue star",
    "two purple crosses and a yellow ring",
    "a pink star, a cyan cross and an orange square",
    "a green ring, an orange ring, a purple ring and a pink ring",
)
_WATCHED = ("preview", "mask", "action_probabilities")


@dataclass(frozen=True)
class Frame:
    """What there is to see after a step of one of the two pictures."""

    method: Method
    picture: np.ndarray  # uint8 (H, W, 3)
    step_index: int  # solver steps done
    steps: int  # of the whole schedule
    nfe: int
    seconds: float  # of the work so far, without what is shown of it
    action: Action | None = None  # None: a mandatory step, or one of a fixed number
    probabilities: tuple[float, ...] | None = None  # of continue, stop, refine, before the action
    reward_score: float | None = None  # None: nobody looked yet
    mask: np.ndarray | None = None  # float32 (h, w) in [0, 1], where the action was to refine


@dataclass(frozen=True)
class Result:
    """A finished picture."""

    method: Method
    picture: np.ndarray  # uint8 (H, W, 3)
    nfe: int
    net_flops: float
    seconds: float
    satisfied: bool | None = None  # by the embedded world's exact checker; None: it does not know the prompt
    reason: str = ""  # what the checker says
    note: str = ""  # "" or what is wrong with the picture


@dataclass(frozen=True)
class Preset:
    """A prompt and seed to begin with, and the picture that the agent made of them here."""

    prompt: str
    seed: int
    picture: np.ndarray  # uint8 (H, W, 3)
    nfe: int


Emit = Callable[[Frame | Result], None]


class FixedPicture(Protocol):
    """How the picture beside the agent's is made: by a number of ``steps`` that is fixed beforehand."""

    def __call__(
        self, env: DiffusionDenoiseVectorEnv, prompt: str, seed: int, steps: int, watch: Callable[[int, Any, Any], None]
    ) -> Generated:
        """``watch`` sees every evaluation, as `addiff_env.diffusion.backbones.denoise` says."""


class Studio:
    """Makes what visitors ask for, one picture after the other.

    Attributes:
        pipe: with any number of lanes, of which a picture takes one.
        fixed: makes the picture beside it.
        limits: of a request.
    """

    def __init__(self, pipe: AdaptivePipeline, fixed: FixedPicture, limits: Limits | None = None) -> None:
        self.pipe, self.fixed, self.limits = pipe, fixed, limits or Limits.of(pipe)
        self._closing = threading.Event()
        pipe.set_progress_bar_config(disable=True)

    def close(self) -> None:
        """Stop what is being made, at its next step."""
        self._closing.set()

    def run(self, request: PictureRequest) -> Iterator[Frame | Result]:
        """Each step of the agent's picture and its result, then those of the fixed number of steps.

        Closing the iterator stops the work at its next step, and lets go of the pipeline.
        """
        return pushed(partial(self._make, request), self._closing)

    def presets(self, prompts: Sequence[str]) -> list[Preset]:
        """Pictures of ``prompts`` at the budget that the slider starts with, seeds counting up from 0."""
        budget = self.limits.budget
        made = self.pipe.stream(prompts, range(len(prompts)), **budget.arguments(budget.start))
        return [Preset(each.prompt, each.seed, np.asarray(each.image), each.nfe) for each in _in_order(made)]

    def preset_prompts(self, number: int) -> list[str]:
        """Prompts to begin with: the embedded world's own selection, or the first ones of the environment."""
        return list(TINY_PRESETS if self.is_tiny else self.pipe.env.prompts)[:number]

    @property
    def is_tiny(self) -> bool:
        """Whether it makes the embedded world's pictures."""
        return self.pipe.env.config.model == addiff_env.TINY["model"]

    def remarks(self, prompt: str) -> list[str]:
        """What the model will not understand of ``prompt``."""
        tokenizer = self.pipe.env.backbone.tokenizer
        unknown = dict.fromkeys(spelled_out_words(tokenizer, prompt))
        dropped = truncated_words(tokenizer, prompt, tokenizer.model_max_length)
        said = [f"The model does not know: {', '.join(unknown)}."] if unknown else []
        return said + ([f"The prompt is too long for the model, which does not read: {dropped}"] if dropped else [])

    # ----------------------------------------------------------------- making pictures

    def _make(self, request: PictureRequest, emit: Emit) -> None:
        self._adaptive(request, emit)
        if request.steps is not None:
            self._fixed(request, request.steps, emit)

    def _adaptive(self, request: PictureRequest, emit: Emit) -> None:
        budget = self.limits.budget.arguments(request.budget)
        for made in self.pipe.stream(
            request.prompt,
            request.seed,
            callback_on_step_end=partial(self._watch_lane, emit),
            callback_on_step_end_tensor_inputs=_WATCHED,
            **budget,
        ):
            emit(self._result("agent", made, np.asarray(made.image), made.seconds))

    def _watch_lane(self, emit: Emit, pipe: Any, step_index: int, timestep: int, given: dict[str, Any]) -> None:
        config, action = self.pipe.env.config, given["action"]
        chances = given["action_probabilities"]
        looked = "reward" in config.reads and (action is not None or step_index >= config.warmup_steps)
        emit(
            Frame(
                "agent",
                given["preview"],
                step_index,
                config.num_inference_steps,
                given["nfe"],
                given["seconds"],
                None if action is None else Action(action),
                None if chances is None else tuple(map(float, chances)),
                given["reward_score"] if looked else None,
                given["mask"] if action == Action.REFINE else None,
            )
        )

    def _fixed(self, request: PictureRequest, steps: int, emit: Emit) -> None:
        env, clock = self.pipe.env, Stopwatch(self.pipe.env.backbone.device)

        def watch(index: int, latents: torch.Tensor, now: Any) -> None:
            with clock.stopped() as seconds:
                (picture,) = to_uint8(decode_finite(env.observer.previewer, now.x0)[0])
                emit(Frame("fixed", picture, index + 1, steps, index + 1, seconds))

        made = self.fixed(env, request.prompt, request.seed, steps, watch)
        with clock.stopped() as seconds:
            emit(self._result("fixed", made, made.picture, seconds))

    def _result(self, method: Method, made: Any, picture: np.ndarray, seconds: float) -> Result:
        satisfied, reason = self._check(picture, made.prompt)
        return Result(method, picture, made.nfe, made.net_flops, seconds, satisfied, reason, made.note)

    def _check(self, picture: np.ndarray, prompt: str) -> tuple[bool | None, str]:
        """What the exact checker says, where it reads such pictures and prompts."""
        if not self.is_tiny:
            return None, ""
        try:
            found = check_picture(picture, prompt)
        except ValueError:  # no caption of the embedded world
            return None, ""
        return found.satisfied, found.reason


def _in_order(made: Iterable[GeneratedImage]) -> list[GeneratedImage]:
    return sorted(made, key=lambda each: each.index)


class Stopwatch:
    """Seconds of work on a device, which stands still while somebody is shown something."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self._began = device, 0.0, time.perf_counter()

    @contextmanager
    def stopped(self) -> Iterator[float]:
        """Let it stand; gives the seconds so far, what the device was told to do included."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - self._began
        try:
            yield self.seconds
        finally:
            self._began = time.perf_counter()
