"""Prompts, seeds and generators as users pass them, one request a picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, TypeAlias

import numpy as np
import torch

from addiff_env.env.prompts import check_prompt
from addiff_env.env.validation import as_list, at_least, check_seed, checked
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.pipeline.lanes import Request

Seeds = int | Iterable[int] | np.random.Generator | None
Generators: TypeAlias = torch.Generator | list[torch.Generator] | None
MAX_SEED = 2**63 - 1


def read_requests(
    env: DiffusionDenoiseVectorEnv,
    prompt: str | Iterable[str],
    seeds: Seeds,
    generator: Generators,
    negative_prompt: str | Iterable[str | None] | None,
    num_images_per_prompt: int,
    max_nfe: int | None,
    price: float | None,
) -> list[Request]:
    """One request a picture, those of a prompt one after another; see `AdaptivePipeline.__call__`, also what it raises.

    Noise of a generator is not drawn yet, see `with_noise`.
    """
    each = checked("num_images_per_prompt", num_images_per_prompt, Annotated[int, at_least(1)])
    texts = [check_prompt(text) for text in items_of(prompt)]
    negatives = _negatives(env, negative_prompt, len(texts))
    if max_nfe is not None:
        max_nfe = replace(env.config, max_nfe=max_nfe).max_nfe  # which refuses one that leaves no decision
    if generator is not None and seeds is not None:
        raise ValueError("seeds and generator both say where the noise comes from: give one of them")
    number = len(texts) * each
    if generator is not None:
        _check_generators(generator, number)
        numbers = [0] * number
    else:
        numbers = _seeds(seeds, len(texts), each)
    return [
        Request(index, texts[index // each], numbers[index], negatives[index // each], price, max_nfe)
        for index in range(number)
    ]


def items_of(values: Any) -> list[Any]:
    """What an iterable or an array yields; a single thing, or what has no order, stands for itself."""
    found = as_list(values)
    if found is None:
        is_single = isinstance(values, (str, bytes, Mapping, set, frozenset)) or hasattr(values, "ndim")
        found = [values] if is_single or not isinstance(values, Iterable) else list(values)
    return found


def _seeds(seeds: Seeds, prompts: int, each: int) -> list[int]:
    """A seed per picture: as they are given, counted up from one per prompt, or drawn."""
    if seeds is None:
        seeds = np.random.default_rng()
    if isinstance(seeds, np.random.Generator):
        seeds = seeds.integers(2**31, size=prompts * each)
    numbers = [check_seed(seed) for seed in items_of(seeds)]
    if len(numbers) == prompts * each:
        return numbers
    if len(numbers) != prompts:
        pictures = f"{prompts} prompts" + (f" of {each} images" if each > 1 else "")
        raise ValueError(f"{pictures} but {len(numbers)} seeds: each prompt needs its own")
    return [check_seed(first + k) for first in numbers for k in range(each)]


def _negatives(
    env: DiffusionDenoiseVectorEnv, given: str | Iterable[str | None] | None, number: int
) -> list[str | None]:
    """A negative prompt per prompt, None where it is the environment's; a wrong one is refused before any work."""
    texts = [given] * number if given is None or isinstance(given, str) else items_of(given)
    if len(texts) != number:
        raise ValueError(f"{number} prompts but {len(texts)} negative prompts")
    for text in dict.fromkeys(text for text in texts if text is not None):
        env.backbone.check_negative_prompt(check_prompt(text), env.config.guidance_scale)
    return texts


# --------------------------------------------------------------------------- generators


def _check_generators(generator: Any, number: int) -> None:
    for one in generator if isinstance(generator, (list, tuple)) else [generator]:
        if not isinstance(one, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or a list of them, got {type(one).__name__}")
    if isinstance(generator, (list, tuple)) and len(generator) != number:
        raise ValueError(f"{len(generator)} generators for {number} images: give one, or one per image")


def with_noise(env: DiffusionDenoiseVectorEnv, requests: Iterable[Request], generator: Generators) -> Iterator[Request]:
    """The requests with their initial noise drawn from ``generator``, in their order, when they are asked for.

    A generator that nothing was drawn from yet gives what its seed gives; any other draws the latents as diffusers
    does, and a seed for what the lane draws later.
    """
    for request in requests:
        if generator is None:
            yield request
            continue
        own = generator if isinstance(generator, torch.Generator) else generator[request.index]
        seed = own.initial_seed()
        is_fresh = own.device.type == "cpu" and seed <= MAX_SEED and _is_fresh(own)
        noise = torch.randn(
            1, *env.latent_shape, generator=own, dtype=env.backbone.dtype, device=own.device
        )  # also where it is drawn again from the seed: afterwards the generator stands where diffusers leaves it
        if is_fresh:
            yield replace(request, seed=seed)
        else:
            yield replace(request, seed=_later_seed(own), latents=noise[0])


def _is_fresh(generator: torch.Generator) -> bool:
    """Whether nothing was drawn since it was seeded."""
    return torch.equal(torch.Generator().manual_seed(generator.initial_seed()).get_state(), generator.get_state())


def _later_seed(generator: torch.Generator) -> int:
    """A seed that depends on where the generator stands, which it does not move."""
    state = generator.get_state()
    seed = int(torch.randint(MAX_SEED, (1,), generator=generator, device=generator.device))
    generator.set_state(state)
    return seed
