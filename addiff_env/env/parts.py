"""The attributes of an environment's parts, readable on the environment itself."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from addiff_env.env.state import LaneFields

if TYPE_CHECKING:
    import numpy as np

    from addiff_env.diffusion.backbones import Backbone
    from addiff_env.diffusion.samplers import Schedule
    from addiff_env.perception.features import Perception
    from addiff_env.perception.previews import Previewer

    class ReadableParts(LaneFields):
        """What an environment's parts hold; see `Denoiser`, `LaneState`, `Observer` and `UnderWay`."""

        backbone: Backbone
        schedule: Schedule
        latent_shape: tuple[int, int, int]
        passes_per_nfe: int
        perception: Perception
        previewer: Previewer
        parts: dict[str, int]
        busy: np.ndarray

else:

    class _Of:
        """An attribute that belongs to one of the owner's parts: read here, set there."""

        def __init__(self, part: str, name: str) -> None:
            self.part, self.name = part, name

        def __get__(self, owner: Any, cls: type | None = None) -> Any:
            return self if owner is None else getattr(getattr(owner, self.part), self.name)

        def __set__(self, owner: Any, value: Any) -> None:
            raise AttributeError(f"{self.name} belongs to the environment's {self.part}: it is read here, not set")

    _PARTS = {
        "denoiser": ("backbone", "schedule", "latent_shape", "passes_per_nfe"),
        "observer": ("perception", "previewer", "parts"),
        "under_way": ("busy",),
        "state": [field.name for field in fields(LaneFields)],
    }
    ReadableParts = type(
        "ReadableParts", (), {name: _Of(part, name) for part, names in _PARTS.items() for name in names}
    )
