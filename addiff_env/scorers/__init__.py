"""The scorers under the name that users know; see `addiff_env.perception.scorers`."""

from addiff_env.perception.scorers import *  # noqa: F403
from addiff_env.perception.scorers import __all__ as __all__
