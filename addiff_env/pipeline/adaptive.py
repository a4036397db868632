"""`AdaptivePipeline`: what users of diffusers' pipelines know, with a trained agent deciding each picture's steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gymnasium.vector import AutoresetMode
from tqdm.auto import tqdm

from addiff_env.agent import Agent
from addiff_env.env.prompts import check_prompt
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.pipeline.lanes import LaneScheduler, LaneStep, Request, make_agent_env, price_of, require_fit
from addiff_env.pipeline.output import AdaptivePipelineOutput, GeneratedImage, check_output_type, gathered
from addiff_env.pipeline.requests import Generators, Seeds, items_of, read_requests, with_noise

SHIPPED_AGENT = "addiff_env:tiny/weights/agent_prices"
CALLBACK_INPUTS = ("latents", "x0", "preview", "mask", "action_probabilities")
StepCallback = Callable[["AdaptivePipeline", int, int, dict[str, Any]], dict[str, Any] | None]


class AdaptivePipeline:
    """An agent on its environment, most likely action first; anything with an agent's ``act`` and ``flops`` will do.

    Net FLOPs are what the environment charges, and the policy's own. Whoever has ``sees(obs) -> (B,) bool`` (the
    rules of `addiff_env.evaluation.methods.rule_policies`) pays for the looks that it reads only, and of those for
    preview and reward model only, as a program of that rule alone would; its seconds are still those of looking at
    everything. ``negative_prompt`` is what guidance leads away from in pictures that are not asked for with another
    one; None: as the environment's setting says.

    A picture depends on its prompt, seed and settings alone (up to rounding): not on the number of lanes, nor on what
    else is made at the same time. Several threads may use a pipeline: each waits for its turn.

    Raises:
        TypeError, ValueError: as `addiff_env.pipeline.lanes.require_fit`; or a negative prompt for a model without
            guidance.

    >>> pipe = AdaptivePipeline.from_pretrained()  # doctest: +SKIP
    >>> output = pipe(["a red circle", "two blue stars"], seeds=[0, 1])  # doctest: +SKIP
    >>> output.images[0].save("circle.png"); print(output.nfe)  # doctest: +SKIP
    """

    def __init__(self, env: DiffusionDenoiseVectorEnv, agent: Any, negative_prompt: str | None = None) -> None:
        require_fit(env, agent)
        if negative_prompt is not None:
            env.backbone.check_negative_prompt(check_prompt(negative_prompt), env.config.guidance_scale)
        self.env, self.agent, self.negative_prompt = env, agent, negative_prompt
        self._resized: DiffusionDenoiseVectorEnv | None = None  # the latest one of another size
        self._progress_bar_config: dict[str, Any] = {}
        self._lock = threading.Lock()  # the lanes are one call's at a time
        self._holder: int | None = None  # the thread whose turn it is

    @classmethod
    def from_pretrained(
        cls,
        agent: str | Path | Agent | None = None,
        num_envs: int = 16,
        *,
        env_id: str | None = None,
        **overrides: Any,
    ) -> AdaptivePipeline:
        """Load an agent and make its environment.

        Args:
            agent: a folder, ``owner/name`` on the Hub, or an agent; None: the one shipped for the embedded world.
            num_envs: lanes, the pictures that are denoised at once.
            env_id: an environment other than the agent's own.
            overrides: settings of the environment, `addiff_env.env.config.EnvConfig`: ``model`` (Hub id or folder),
                ``dtype`` (also called ``torch_dtype``), ``device``, ``height``, ``guidance_scale``, ...

        Raises:
            FileNotFoundError, ValueError, TypeError: as `Agent.from_pretrained` and the environment.
        """
        if "torch_dtype" in overrides:
            overrides.setdefault("dtype", overrides.pop("torch_dtype"))
        loaded = agent if isinstance(agent, Agent) else Agent.from_pretrained(SHIPPED_AGENT if agent is None else agent)
        return cls(make_agent_env(loaded, num_envs, env_id, **overrides), loaded)

    def to(self, device: Any = None, dtype: Any = None) -> AdaptivePipeline:
        """Move the models to a ``device``, or to a ``dtype`` (given in its place, too); returns the pipeline."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        wanted = {name: value for name, value in (("device", device), ("dtype", dtype)) if value is not None}
        with self._turn():
            self.env, self._resized = self._remade(**wanted), None
        return self

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Arguments of the progress bar (`tqdm`), such as ``disable=True``, as diffusers' pipelines take them."""
        self._progress_bar_config = kwargs

    # ----------------------------------------------------------------- making pictures

    def __call__(
        self,
        prompt: str | Iterable[str],
        seeds: Seeds = None,
        negative_prompt: str | Iterable[str | None] | None = None,
        *,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        price: float | None = None,
        target_nfe: float | None = None,
        max_nfe: int | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        previews: bool = False,
        masks: bool = False,
        return_dict: bool = True,
    ) -> AdaptivePipelineOutput | tuple[Any, ...]:
        """Make the pictures of ``prompt``, in order; those of one prompt follow one another.

        Args:
            prompt: one, or any number of them.
            seeds: one per picture, each in [0, 2**63); or one per prompt, from which further pictures count up; drawn
                at random where there are none, as a `numpy.random.Generator` draws them, too.
            negative_prompt: one for all pictures, or one per prompt; None: the pipeline's own.
            num_images_per_prompt: pictures of each prompt.
            generator: in place of ``seeds``, a `torch.Generator` or a list of one per picture, from which initial noise
                is drawn as diffusers does.
            price: of one evaluation, which an agent with a price input acts by; by default the middle of its range.
            target_nfe: mean evaluations a picture, instead of the price that was measured to give them.
            max_nfe: budget of a picture; None: the environment's.
            height: of the pictures, pixels; None: the environment's.
            width: likewise.
            output_type: ``pil``, ``np`` or ``pt``, see `AdaptivePipelineOutput`.
            callback_on_step_end: ``callback(pipeline, step_index, timestep, callback_kwargs)``, called for each lane
                after each of its steps. ``step_index`` counts solver steps done, ``timestep`` is that of the next one.
                ``callback_kwargs`` holds ``index`` (of the picture), ``prompt``, ``seed``, ``nfe``, ``seconds``,
                ``action`` (None in the warm-up), ``reward_score`` (of the latest look), ``finished``, ``stop`` (False)
                and what ``callback_on_step_end_tensor_inputs`` names. It returns None or a mapping: one in which
                ``stop`` is true stops the lane at its next decision. Nothing else in it is read.
            callback_on_step_end_tensor_inputs: of ``latents``, ``x0`` (C, h, w), ``preview`` (uint8 (H, W, 3)),
                ``mask`` (float32 (h, w)) and ``action_probabilities`` ((3,) or None).
            previews: whether the output has a preview for each decision.
            masks: whether it has the mask of each refinement.
            return_dict: False: a tuple of the output's values, pictures first.

        Raises:
            ValueError: numbers of prompts, seeds, generators and negative prompts that do not agree, what is no seed, a
                negative prompt for a model without guidance; both of ``price`` and ``target_nfe``, either of them for
                an agent without a price input, or a value beyond its range; a budget that leaves no decision, a size
                that the model cannot make, or an unknown output type or tensor input.
            TypeError: a prompt that is no string, or no generator.
            RuntimeError: a stream of this pipeline is open in the same thread.
        """
        asked = {name: value for name, value in locals().items() if name not in ("self", "return_dict")}
        env = self._env_of(height, width)
        made = sorted(self.stream(**asked), key=lambda one: one.index)
        output = gathered(made, output_type, (env.config.height, env.config.width), previews, masks)
        return output if return_dict else output.to_tuple()

    def stream(  # a call's arguments, stated again so that its signature shows them
        self,
        prompt: str | Iterable[str],
        seeds: Seeds = None,
        negative_prompt: str | Iterable[str | None] | None = None,
        *,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        price: float | None = None,
        target_nfe: float | None = None,
        max_nfe: int | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        previews: bool = False,
        masks: bool = False,
    ) -> Iterator[GeneratedImage]:
        """Yield each picture when it is finished; arguments and errors are those of a call, errors come at once.

        From the first picture asked for to the last one, or to ``close()``, the pipeline is this stream's.
        """
        check_output_type(output_type)
        env = self._env_of(height, width)
        price = price_of(env, self.agent, price, target_nfe)
        own = negative_prompt if negative_prompt is not None else self.negative_prompt
        if own is not None and not isinstance(own, str):
            own = [self.negative_prompt if text is None else text for text in items_of(own)]
        requests = read_requests(env, prompt, seeds, generator, own, num_images_per_prompt, max_nfe, price)
        watch, names = None, _tensor_inputs(callback_on_step_end_tensor_inputs)
        if callback_on_step_end is not None:
            watch = partial(self._called_back, callback_on_step_end, names)
        scheduler = LaneScheduler(
            env, self.agent, True, watch, previews, masks, probabilities="action_probabilities" in names
        )
        return self._stream(scheduler, requests, generator, output_type)

    def _stream(
        self, scheduler: LaneScheduler, requests: list[Request], generator: Generators, output_type: str
    ) -> Iterator[GeneratedImage]:
        nfe, options = 0, {"total": len(requests), "unit": "image"} | self._progress_bar_config
        with self._turn(), tqdm(**options) as bar:
            for group in scheduler.run(with_noise(scheduler.env, requests, generator)):
                nfe += sum(made.nfe for _, made in group)
                bar.update(len(group))
                bar.set_postfix_str(f"mean NFE {nfe / bar.n if bar.n else 0:.1f}")
                for index, made in group:
                    yield GeneratedImage.of(index, made, output_type)

    def _called_back(self, callback: StepCallback, names: Sequence[str], step: LaneStep) -> bool:
        """Tell the callback of a lane's step; whether it asked that the lane stops."""
        given: dict[str, Any] = {
            "index": step.episode.request.index,
            "prompt": step.episode.request.prompt,
            "seed": step.episode.request.seed,
            "nfe": step.nfe,
            "seconds": step.episode.made.seconds,
            "action": step.action,
            "reward_score": step.reward_score,
            "finished": step.finished,
            "stop": False,
        }
        for name in names:
            given[name] = step.probabilities if name == "action_probabilities" else getattr(step, name)
        answer = callback(self, step.step_index, step.timestep, given)
        if answer is not None and not isinstance(answer, dict):
            raise TypeError(f"callback_on_step_end must return None or a dictionary, got {type(answer).__name__}")
        return bool((answer or {}).get("stop"))

    # ----------------------------------------------------------------- settings of a call

    def _env_of(self, height: int | None, width: int | None) -> DiffusionDenoiseVectorEnv:
        """The environment, or one of another size with the same models; the latest of these is kept."""
        config = self.env.config
        size = (config.height if height is None else height, config.width if width is None else width)
        if size == (config.height, config.width):
            return self.env
        kept = self._resized
        if kept is None or size != (kept.config.height, kept.config.width):
            kept = self._resized = self._remade(height=size[0], width=size[1])
        return kept

    def _remade(self, **settings: Any) -> DiffusionDenoiseVectorEnv:
        modes: dict[str, Any] = {"num_envs": self.env.num_envs, "autoreset_mode": AutoresetMode.DISABLED}
        return DiffusionDenoiseVectorEnv(**modes | asdict(self.env.config) | settings)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Have the lanes to oneself; other threads wait."""
        if self._holder == threading.get_ident():
            raise RuntimeError("a stream of this pipeline is open in this thread: take its last picture, or close() it")
        with self._lock:
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = None


def _tensor_inputs(names: Sequence[str]) -> list[str]:
    """The tensors that a callback gets, checked."""
    names = [names] if isinstance(names, str) else list(names)
    if unknown := [name for name in names if name not in CALLBACK_INPUTS]:
        known = ", ".join(CALLBACK_INPUTS)
        raise ValueError(f"callback_on_step_end_tensor_inputs may name {known}, got {', '.join(map(repr, unknown))}")
    return names
