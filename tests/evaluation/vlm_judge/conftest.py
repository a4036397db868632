"""What the judge is tested with."""

from chat_server import server  # noqa: F401 (the fixture)
