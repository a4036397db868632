"""What every scorer offers, and how their published checkpoints are found, read and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors.torch import load_file
from torch import nn

from addiff_env.loading.isolation import exclusive
from addiff_env.loading.paths import looked_at, resolve_model
from addiff_env.loading.weights import check_finite, reason, some
from addiff_env.perception.preprocessing import check_pairs

Module = TypeVar("Module", bound=nn.Module)
LOGIT_LIMIT = 30.0  # of scores without a bound of their own: a logit, or a few standard deviations


class Scorer(Protocol):
    """A frozen model of how good a picture is for its prompt.

    A scorer that reads the prompt apart from the picture, once, names the encoder that does so as ``text_encoder``;
    its cost is paid once a lane and not at every look.

    Attributes:
        limit: observations clamp scores to [-limit, limit]; sound scores stay well inside.
        mean, std: where its scores of generated pictures lie and how far they spread, roughly: what the reward takes
            for quality 0.5, and for its unit, unless told otherwise.
    """

    limit: float
    mean: float
    std: float

    def score(self, pictures: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Scores (B,) float32 of pictures (B, 3, H, W) in [0, 1] under their prompts; higher is better.

        Raises:
            TypeError, ValueError: empty batch, NaN, values outside [0, 1], not one prompt per picture.
        """


class LatentScorer(Protocol):
    """A frozen model of how good the picture will be that clean predictions lead to; nothing has to be decoded for it.

    Attributes:
        limit, mean, std: as of `Scorer`.
        latent_shape: (C, h, w) of what it reads.
    """

    limit: float
    mean: float
    std: float
    latent_shape: tuple[int, int, int]

    def score_latents(
        self, latents: torch.Tensor, prompts: list[str], timesteps: torch.Tensor, evaluations: torch.Tensor
    ) -> torch.Tensor:
        """Scores (B, K) float32 of the pictures that K numbers of further denoiser evaluations lead to.

        ``latents`` (B, C, h, w) are clean predictions x0 at the noise levels of ``timesteps`` (B,), or, at timestep 0,
        finished latents; ``evaluations`` (B, K) are whole numbers. Of finished latents they are not those to come but
        those that the picture was spared by stopping early, 0 at the end of the schedule.

        Raises:
            TypeError, ValueError: empty batch, another shape, not one prompt, timestep and row per picture.
        """


class ScorerOfLatents:
    """A `LatentScorer` that scores finished pictures, too, through the autoencoder whose latents it reads.

    Args:
        scorer: reads latents.
        encode: pictures (B, 3, H, W) in [0, 1] to latents (B, C, h, w), as `Backbone.encode_pictures`.
    """

    def __init__(self, scorer: LatentScorer, encode: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.score_latents, self._encode = scorer.score_latents, encode
        self.limit, self.mean, self.std, self.latent_shape = scorer.limit, scorer.mean, scorer.std, scorer.latent_shape

    def score(self, pictures: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """As `Scorer.score`."""
        texts = check_pairs(pictures, prompts)
        latents = self._encode(pictures)
        finished = torch.zeros(len(texts), 1, dtype=torch.long, device=latents.device)
        return self.score_latents(latents, texts, finished[:, 0], finished)[:, 0]


def reads_latents(scorer: object) -> bool:
    """Whether a scorer is a `LatentScorer`."""
    return hasattr(scorer, "score_latents")


@dataclass(frozen=True)
class Source:
    """Where a published checkpoint is: a file of a Hub repository."""

    repository: str
    file: str


def find_checkpoint(path: str | None, source: Source, setting: str) -> Path:
    """The checkpoint at ``path`` (the file, or a folder that holds it), or the Hub's if there is no path.

    Raises:
        FileNotFoundError: it is not there; the message says what to download and how ``setting`` names it.
    """
    hint = (
        f"download {source.file} from the Hub repository {source.repository} and pass {setting}:<path to {source.file}>"
    )
    if path is not None:
        place = Path(resolve_model(path))
        found = place / source.file if place.is_dir() else place
        if not found.is_file():
            raise FileNotFoundError(f"there is no checkpoint {looked_at(found)}; {hint}")
        return found
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source.repository, source.file))
    except Exception as error:  # offline, not cached, no access, ...
        raise FileNotFoundError(f"cannot fetch {source.file}: {reason(error)}; {hint}") from error


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a ``.safetensors`` or a plain torch checkpoint, by name; nothing else is ever unpickled.

    A state dict under ``state_dict`` is unwrapped, as is a ``module.`` prefix that data-parallel training leaves.

    Raises:
        ValueError: truncated, corrupted, holding other objects than tensors, or no state dict.
    """
    try:
        is_safe = path.suffix == ".safetensors"
        loaded: Any = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise whatever its bytes lead to, IndexError among them
        size = path.stat().st_size
        raise ValueError(
            f"{path} is truncated, corrupted or no checkpoint of tensors alone ({size} bytes): {reason(error, 200)}"
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    is_state = isinstance(state, dict) and all(isinstance(value, torch.Tensor) for value in state.values())
    if not is_state or not state or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path} holds no state dict of tensors but {str(loaded)[:80]!r}")
    return {name.removeprefix("module."): value for name, value in state.items()}


def load_exactly(
    make: Callable[[], Module], state: dict[str, torch.Tensor], path: Path, unused: Sequence[str] = ()
) -> Module:
    """The module that ``make`` builds with the weights of ``state``; every key has to fit, except those of ``unused``.

    Raises:
        ValueError: missing or foreign keys, other shapes, or numbers that are not finite; the message names them.
    """
    with exclusive():
        with torch.device("meta"):  # shapes without memory: what does not fit is refused before the weights are made
            skeleton = make()
        _check_state(skeleton, state, path, unused)
        module = make()
        module.load_state_dict({name: state[name] for name in skeleton.state_dict()})
    return module.eval().requires_grad_(False)


def _check_state(module: nn.Module, state: dict[str, torch.Tensor], path: Path, unused: Sequence[str]) -> None:
    expected = module.state_dict()
    problems = {
        "missing": sorted(expected.keys() - state.keys()),
        "not known": sorted(state.keys() - expected.keys() - set(unused)),
        "of another shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(value.shape)}"
            for name, value in expected.items()
            if name in state and state[name].shape != value.shape
        ],
    }
    found = [f"{len(keys)} keys {what}: {some(keys)}" for what, keys in problems.items() if keys]
    if found:
        raise ValueError(f"{path} does not fit {type(module).__name__}: {'; '.join(found)}")
    check_finite({name: state[name] for name in expected}, path)


def linear_head(width: int) -> nn.Sequential:
    """The head of ImageReward and of LAION's aesthetic predictor: five linear layers, no activations in between.

    The dropouts do nothing here; they keep the published keys (``layers.0``, ``layers.2``, ``layers.4``, ...).
    """
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )
