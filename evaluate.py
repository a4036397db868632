"""``python evaluate.py ...`` is ``addiff evaluate ...``, for launchers; see `addiff_env.cli.evaluate`."""

import sys

from addiff_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
