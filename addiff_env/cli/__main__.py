"""``python -m addiff_env.cli`` is ``addiff``, where the command itself is not on the path."""

import sys

from addiff_env.cli import main

if __name__ == "__main__":
    sys.exit(main())
