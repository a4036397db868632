"""Every setting of an environment, checked in one place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

from addiff_env.diffusion.attention import MASKS
from addiff_env.diffusion.backbones.offload import OFFLOADS
from addiff_env.diffusion.samplers import SOLVERS
from addiff_env.env.prices import read_price_range
from addiff_env.env.validation import above, at_least, below, check_fields, multiple_of, one_of
from addiff_env.loading.weights import DTYPES
from addiff_env.perception.features import LOOK_PARTS
from addiff_env.perception.previews import PREVIEWS

# Of a picture's height or width, pixels: what every diffusers pipeline asks for. Many models need more.
Side = Annotated[int, at_least(8), multiple_of(8)]
# What `addiff_env.diffusion.backbones.load_backbone` takes of the settings.
_BACKBONE = (
    *("model", "revision", "device", "dtype", "attention_stride", "lora"),
    *("compile", "channels_last", "decode_memory", "offload"),
)


@dataclass(frozen=True)
class EnvConfig:
    """Every setting of the environment. The vector environment's docstring explains them.

    What is JSON-able once it is made may be given as users have it: paths as `os.PathLike`, ``torch.device``,
    ``torch.dtype``, numbers and arrays of NumPy or torch, tuples, OmegaConf's containers.

    Raises:
        ValueError: a value that is not allowed; the message names the setting and shows the value.
    """

    model: str
    clip: str
    dino: str
    scorer: str
    prompts: str | Sequence[str]
    revision: str | None = None
    device: str = "cpu"
    dtype: Annotated[str, one_of("auto", *DTYPES)] = "float32"
    lora: str | None = None
    compile: bool = False
    channels_last: bool = True
    solver: Annotated[str, one_of(*SOLVERS)] = "ddim"
    eta: Annotated[float, at_least(0)] = 0.0
    num_inference_steps: Annotated[int, at_least(1)] = 50
    guidance_scale: Annotated[float, at_least(0)] = 7.5
    height: Side = 512
    width: Side = 512
    warmup_steps: Annotated[int, at_least(0)] = 3
    finish_steps: Annotated[int, at_least(0)] = 0
    max_nfe: Annotated[int, at_least(1)] | None = None
    max_refines: Annotated[int, at_least(0)] | None = None
    refine_k: Annotated[int, at_least(1)] = 2
    refine_mode: Annotated[str, one_of("rewind", "in_place")] = "rewind"
    mask: Annotated[str, one_of(*MASKS)] = "low_attention"
    mask_threshold: Annotated[float, above(0), below(1)] = 0.5
    blur_sigma: Annotated[float, at_least(0)] = 1.0
    renoise: float | str = 0.85
    attention_stride: Annotated[int, at_least(1)] = 4
    preview: Annotated[str, one_of(*PREVIEWS)] = "vae"
    preview_model: str | None = None
    observe_every: Annotated[int, at_least(1)] = 1
    reads: Sequence[str] = LOOK_PARTS
    obs_mode: Annotated[str, one_of("flat", "dict")] = "flat"
    obs_backend: Annotated[str, one_of("numpy", "torch")] = "numpy"
    text_info: bool = False
    reward: Mapping[str, Any] | None = None
    price_range: Sequence[float] | None = None
    render_mode: Annotated[str, one_of("rgb_array")] | None = None
    batch_size: Annotated[int, at_least(1)] = 64
    decode_memory: Annotated[float, at_least(0)] | None = None
    offload: Annotated[str, one_of(*OFFLOADS)] = "none"
    negative_prompt: str | None = None
    look_precision: Annotated[str, one_of("auto", "float32")] = "auto"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.warmup_steps >= self.num_inference_steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) must be below num_inference_steps ({self.num_inference_steps})"
            )
        if self.nfe_budget < self.warmup_steps + 1 + self.finish_steps:
            raise ValueError(f"max_nfe {self.max_nfe} leaves no decision after {self.warmup_steps} warm-up steps")
        if self.preview == "taesd" and not self.preview_model:
            raise ValueError("preview 'taesd' needs preview_model, e.g. 'madebyollin/taesd'")
        if isinstance(self.reads, str) or not set(self.reads) <= set(LOOK_PARTS):
            raise ValueError(f"reads must be a list of {', '.join(LOOK_PARTS)}, got {self.reads!r}")
        object.__setattr__(self, "price_range", read_price_range(self.price_range))
        object.__setattr__(self, "reads", tuple(self.reads))  # as JSON gives it back, a list, it is the same setting
        if self.blur_sigma > (side := max(self.height, self.width)):
            raise ValueError(f"blur_sigma must be at most {side}, the picture's longer side, got {self.blur_sigma!r}")
        renoise_timestep(self.renoise, 500, 1000)

    @property
    def backbone_settings(self) -> dict[str, Any]:
        """Those that say which model is loaded and how: arguments of `addiff_env.diffusion.backbones.load_backbone`."""
        return {name: getattr(self, name) for name in _BACKBONE}

    @property
    def nfe_budget(self) -> int:
        """Denoiser evaluations an episode may spend: ``max_nfe``, or twice ``num_inference_steps``."""
        return 2 * self.num_inference_steps if self.max_nfe is None else self.max_nfe


def check_names(settings: Iterable[str], own: Sequence[str]) -> None:
    """Refuse what is no setting.

    Raises:
        TypeError: a name that is neither a field of `EnvConfig` nor one of the caller's ``own``.
    """
    known = [*own, *(field.name for field in fields(EnvConfig))]
    for name in settings:
        if name not in known:
            raise TypeError(f"unexpected keyword argument {name!r}; known: {', '.join(known)}")


def renoise_timestep(renoise: float | str, current: int, total: int) -> int:
    """The training timestep that a refinement goes back to: a share of all ``total``, or of the ``current`` one.

    Raises:
        ValueError: not a share in (0, 1], nor ``"relative:<share>"``.
    """
    text = str(renoise)
    share_of, text = (current, text.removeprefix("relative:")) if text.startswith("relative:") else (total, text)
    try:
        share = float(text)
    except ValueError:
        share = float("nan")
    if not 0 < share <= 1:
        raise ValueError(f"renoise must be a share in (0, 1] or 'relative:<share>', got {renoise!r}")
    return max(0, min(total - 1, round(share * share_of) - 1))
