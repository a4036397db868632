"""Other processes that hold files and folders, and what a folder holds."""

import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from addiff_env.storage.files import LOCK

ROOT = Path(__file__).resolve().parents[1]
HOLD = """
import sys, time
from contextlib import ExitStack
from pathlib import Path
from addiff_env.storage import files
with ExitStack() as held:
    held.enter_context(getattr(files, sys.argv[1])(Path(sys.argv[2]), *sys.argv[4:]))
    print("held", flush=True)
    time.sleep(float(sys.argv[3]))
"""


@contextmanager
def held(kind, place, *words, seconds=60):
    """Another process that holds ``place``; killed at the end."""
    command = [sys.executable, "-c", HOLD, kind, str(place), str(seconds), *words]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.send_signal(signal.SIGKILL)


def everything(folder):
    """Every file with its bytes and its time; a lock has none to speak of: trying it may set it."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.suffix == LOCK or path.stat().st_mtime_ns) for path in files}
