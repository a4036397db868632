"""What Gymnasium's ``make`` and ``make_vec`` pass on besides the settings, and the spec they leave behind."""

from __future__ import annotations

import copy
from typing import Annotated, Any

from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode

from addiff_env.env.validation import at_least, checked, plain, shown


class JsonableSpec:
    """Gymnasium remembers the settings in the environment's spec as they were given; here JSON takes them."""

    _spec: EnvSpec | None = None

    @property
    def spec(self) -> EnvSpec | None:
        """What the environment was made from; ``spec.to_json()`` works whatever types the settings came in."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        if spec is not None:
            spec = copy.copy(spec)
            spec.kwargs = {name: _jsonable(name, value) for name, value in spec.kwargs.items()}
        self._spec = spec


def _jsonable(name: str, value: Any) -> Any:
    return plain(read_autoreset_mode(value)) if name == "autoreset_mode" else plain(value)


def read_autoreset_mode(value: Any) -> AutoresetMode:
    """The mode that ``value`` is, or is the name or the value of.

    Raises:
        ValueError: none.
    """
    for mode in AutoresetMode:
        if plain(value) in (mode.value, mode.name):
            return mode
    known = ", ".join(mode.name for mode in AutoresetMode)
    raise ValueError(f"autoreset_mode must be one of {known}, got {shown(value)}")


def step_limit(value: Any) -> int | None:
    """Decisions that an episode may have; None: any number, which Gymnasium's ``make`` also says by -1."""
    limit = checked("max_episode_steps", value, int | None)
    if limit in (None, -1):
        return None
    return checked("max_episode_steps", limit, Annotated[int, at_least(1)])
