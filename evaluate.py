"""``python evaluate.py ...`` is ``addiff evaluate ...``, for launchers; see `addiff_env.evaluation.run.command`."""

import sys

from addiff_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
