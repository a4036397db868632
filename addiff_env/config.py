"""Every setting of an environment, checked in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from addiff_env.attention import MASKS
from addiff_env.previews import PREVIEWS
from addiff_env.samplers import SOLVERS

LOOK_PARTS = ("clip_image", "clip_text", "dino", "reward")  # of a look, what ``reads`` may name

_CHOICES = {
    "solver": SOLVERS,
    "refine_mode": ("rewind", "in_place"),
    "mask": MASKS,
    "obs_mode": ("flat", "dict"),
    "obs_backend": ("numpy", "torch"),
    "preview": PREVIEWS,
}
_LEAST = {  # smallest value of each numeric setting
    "num_inference_steps": 1,
    "guidance_scale": 0.0,
    "warmup_steps": 0,
    "eta": 0.0,
    "finish_steps": 0,
    "max_nfe": 1,
    "max_refines": 0,
    "refine_k": 1,
    "observe_every": 1,
    "blur_sigma": 0.0,
    "batch_size": 1,
}


@dataclass(frozen=True)
class EnvConfig:
    """Every setting of the environment; all JSON-able. The vector environment's docstring explains them."""

    model: str
    clip: str
    dino: str
    scorer: str
    prompts: str | Sequence[str]
    revision: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    lora: str | None = None
    compile: bool = False
    channels_last: bool = True
    solver: str = "ddim"
    eta: float = 0.0
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    height: int = 512
    width: int = 512
    warmup_steps: int = 3
    finish_steps: int = 0
    max_nfe: int | None = None
    max_refines: int | None = None
    refine_k: int = 2
    refine_mode: str = "rewind"
    mask: str = "low_attention"
    mask_threshold: float = 0.5
    blur_sigma: float = 1.0
    renoise: float | str = 0.85
    attention_stride: int = 4
    preview: str = "vae"
    preview_model: str | None = None
    observe_every: int = 1
    reads: Sequence[str] = LOOK_PARTS
    obs_mode: str = "flat"
    obs_backend: str = "numpy"
    reward: dict[str, Any] | None = None
    render_mode: str | None = None
    batch_size: int = 64

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: a value that is not allowed; the message shows it.
        """
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(allowed)}")
        for name, least in _LEAST.items():
            value, kind = getattr(self, name), (int, float) if isinstance(least, float) else int
            if value is not None and (not isinstance(value, kind) or not value >= least):
                what = "a number" if isinstance(least, float) else "an integer"
                raise ValueError(f"{name} must be {what} of at least {least}, got {value!r}")
        if not 0 < self.mask_threshold < 1:
            raise ValueError(f"mask_threshold must lie in (0, 1), got {self.mask_threshold!r}")
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
        object.__setattr__(self, "reads", tuple(self.reads))  # as JSON gives it back, a list, it is the same setting
        if self.render_mode not in (None, "rgb_array"):
            raise ValueError(f"unknown render_mode {self.render_mode!r}; known: rgb_array")
        renoise_timestep(self.renoise, 500, 1000)

    @property
    def nfe_budget(self) -> int:
        """Denoiser evaluations an episode may spend: ``max_nfe``, or twice ``num_inference_steps``."""
        return 2 * self.num_inference_steps if self.max_nfe is None else self.max_nfe


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
