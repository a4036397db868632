"""``python train_sb3.py ...`` is ``addiff train ...``; see `addiff_env.sb3.command`."""

import sys

from addiff_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
