"""Commands as they are printed for copying: quoted for the shell, and where they are Hydra's, for Hydra."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from addiff_env.storage.files import DiskFullError

INTERRUPTED = 130  # exit status of what Ctrl-C ended, as shells count signals: 128 + SIGINT
FAILED = 3  # exit status where some pictures could not be made, and the others were
NO_WORDS = ("null", "true", "false", "inf", "nan")  # what Hydra reads as something else
LAUNCHED = ("RANK", "WORLD_SIZE")  # set by accelerate and torchrun, one process each


def command_line(*words: str | os.PathLike[str]) -> str:
    """The words as one line that a POSIX shell splits into just these."""
    return shlex.join(os.fspath(word) for word in words)


def override(name: str, value: Any) -> str:
    """An override of Hydra's that gives ``name`` this ``value``; not yet quoted for a shell, see `command_line`."""
    return f"{name}={spelled(os.fspath(value) if isinstance(value, os.PathLike) else value)}"


def spelled(value: Any) -> str:
    """``value`` as Hydra's override grammar reads it back: nothing is null, and a text that looks like a number stays.

    Plain words need no quotes, and are shown without.
    """
    from hydra.core.override_parser.types import Quote, QuotedString

    if value is None:
        return "null"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(spelled, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{name}:{spelled(part)}' for name, part in value.items())}}}"
    if isinstance(value, str) and not (value.isidentifier() and value.isascii() and value.lower() not in NO_WORDS):
        return QuotedString(value, Quote.single).with_quotes()
    return str(value)


def described_parser(prog: str, docstring: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with a docstring's first paragraph and ends with the others, as they stand."""
    first, _, others = (docstring or "").partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=prog, description=first, epilog=others, formatter_class=raw)


def json_argument(text: str) -> dict[str, Any]:
    """A JSON object as the value of an option; for ``type=`` of `argparse`, which says which option it is.

    Raises:
        argparse.ArgumentTypeError: it is none; with the text.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return value


def this_command(*further: str) -> str:
    """The command that started this process, with ``further`` words."""
    return command_line(*_started_by(), *further)


def this_program() -> list[str]:
    """The words that started this process, up to its own arguments, as one can give them again from here.

    Empty where the arguments are not the process's own: the program was called from Python, in a notebook for one.
    """
    words, own = _started_by(), sys.argv[1:]
    if words[len(words) - len(own) :] != own or len(words) <= len(own):
        return []
    words = words[: len(words) - len(own)]
    if words[0].startswith("python") and Path(sys.executable).is_relative_to(Path.cwd()):
        words[0] = os.path.relpath(sys.executable)
    return words


def _started_by() -> list[str]:
    """The words of this process; the installed command needs no interpreter, nor a folder where a shell finds it."""
    python, *rest = sys.orig_argv
    if not rest or Path(rest[0]).name != "addiff":
        return [Path(python).name, *rest]
    program, *rest = rest
    return ["addiff" if shutil.which("addiff") == program else program, *rest]


@contextmanager
def interruptible(kept: Callable[[], str], further: Sequence[str] = ()) -> Iterator[None]:
    """Turn Ctrl-C into a line that says what was ``kept`` and how to go on, and exit status 130.

    An error of a full disk says it, too, and one of too little memory.

    Args:
        kept: says it, when asked.
        further: words that the command needs besides, to go on.
    """
    try:
        yield
    except KeyboardInterrupt:
        alone = os.environ.get(LAUNCHED[1], "1") == "1"
        again = f"go on with: {this_command(*further)}" if alone else "the same launch goes on"
        print(f"\ninterrupted: {kept()}; {again}", file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED) from None
    except DiskFullError as error:
        text = f"{error.strerror}; {kept()}; make room, and the same command goes on"
        raise DiskFullError(error.errno, text) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"{error}; {kept()}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was refused, by Python, a GPU or the host; PyTorch has a class of its own for GPUs alone."""
    kinds = [kind.__name__ for kind in type(error).__mro__]
    return "MemoryError" in kinds or "OutOfMemoryError" in kinds or "DefaultCPUAllocator" in str(error)
