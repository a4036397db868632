"""The command ``addiff``: what it can do, and how a verb is run. Loads nothing heavy until a verb is asked for.

A verb names a module with ``main(argv) -> int``. Expected errors (a wrong value, a missing file or library) end it with
one line and status 1, or 2 where 1 says that a bar is missed; ``ADDIFF_TRACEBACK=1`` shows where they were raised.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module

import gymnasium as gym

import addiff_env
from addiff_env.loading.paths import expand_home
from addiff_env.storage.commands import INTERRUPTED, is_out_of_memory

VERBS: dict[str, tuple[str, str]] = {  # verb: its module, and what it does; a table, whose rows are meant to be alike
    "generate": ("addiff_env.cli.generate", "make pictures of prompts with a trained agent"),
    "web": ("addiff_env.cli.web", "open a page to type prompts on and watch the agent decide"),
    "train": ("addiff_env.sb3.command", "train an agent with Stable-Baselines3 (Hydra overrides)"),
    "train-rllib": ("addiff_env.rllib.command", "train an agent with RLlib on Ray (Hydra overrides)"),
    "evaluate": ("addiff_env.evaluation.run.command", "compare an agent with fixed-step inference (Hydra overrides)"),
    "report": ("addiff_env.evaluation.report.html", "make a finished evaluation's report again, without any model"),
    "time": (
        "addiff_env.evaluation.run.time_command",
        "time a finished evaluation's methods in turns, for seconds as a cost",
    ),
    "export": ("addiff_env.evaluation.exchange", "lay a run's pictures out as official evaluation scripts take them"),
    "import": ("addiff_env.evaluation.imported", "bring an official script's results back into a run, as a metric"),
    "reproduce": ("addiff_env.evaluation.reproduce", "make the README's and the results page's numbers anew"),
    "judge": (
        "addiff_env.evaluation.vlm_judge.judging",
        "have vision-language models compare a finished evaluation's pictures",
    ),
    "acceptance": ("addiff_env.evaluation.acceptance", "decide whether an agent beats what one can do by hand"),
    "tune": ("addiff_env.evaluation.methods.tuning", "tune the hand-made methods to an agent"),
    "search": ("addiff_env.sb3.search", "run one worker of a hyperparameter search with Optuna"),
    "record": ("addiff_env.offline", "record trajectories as a Minari dataset"),
    "share": ("addiff_env.evaluation.share", "write results into an agent's bundle, put it on the Hugging Face Hub"),
    "agent table": ("addiff_env.evaluation.price_table", "measure an agent at each price, for target_nfe"),
    "convert": ("addiff_env.sb3.zips", "convert agents to and from Stable-Baselines3 zips"),
    "download": ("addiff_env.evaluation.benchmarks.download", "fetch a public benchmark's prompts"),
    "baselines": ("addiff_env.env.baseline_cache", "score fixed-step inference, for rewards relative to it"),
    "profile": ("addiff_env.env.costs", "measure FLOPs and milliseconds of encoders, scorers and a denoiser step"),
    "bench": ("addiff_env.cli.bench", "measure the speed of lanes and pipeline, as ratios to baselines"),
    "doctor": ("addiff_env.cli.doctor", "say whether an environment can run here, and what to do where it cannot"),
    "selftest": ("addiff_env.cli.selftest", "run a model once against what it must equal, and measure it"),
    "world data": ("addiff_env.tiny.recipes.data", "render the embedded world's training pictures"),
    "world splits": ("addiff_env.tiny.make_splits", "write the embedded world's prompt splits"),
    "world train": ("addiff_env.tiny.recipes.command", "train the embedded world's models, all of them or one"),
    "world quality": ("addiff_env.tiny.measures.quality", "measure every quality bar of the embedded world's models"),
    "world auc": ("addiff_env.tiny.measures.auc", "measure how well each scorer foretells the exact checker"),
    "world finishes": (
        "addiff_env.tiny.measures.finishes",
        "measure success by grid, step stopped after and finishing steps",
    ),
    "world rules": ("addiff_env.tiny.measures.rules", "play plain rules on several grids, with the verifier alone"),
    "world prices": ("addiff_env.evaluation.prices", "compare agents with hand-made rules at every price"),
    "world ablations": ("addiff_env.evaluation.ablations", "say what each part of an agent's training is worth"),
    "world bars": ("addiff_env.evaluation.budget_bars", "hold an evaluation at several prices against what is asked"),
    "world optimal": ("addiff_env.tiny.measures.optimal_stopping", "say what dynamic programming earns on a record"),
    "world replay": ("addiff_env.evaluation.replay", "say what is left to learn, in recorded attempts"),
    "world repair": ("addiff_env.tiny.measures.repair", "measure what a refinement repairs, for each kind of mask"),
}
BARS = ("acceptance", "world quality", "world auc", "world bars")  # their status 1 says that a bar is missed
EXPECTED = (ValueError, TypeError, OSError, ImportError, gym.error.Error)
LESS = "take fewer lanes (num_envs) or smaller batches (batch_size); addiff doctor says what a model needs"
EXTRAS = {"optuna": "search"}  # libraries that a verb's module imports, and the extra that brings them


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``addiff <verb> ...``; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage(VERBS))
        return 0 if words else 2
    if words[0] == "--version":
        print(f"addiff {addiff_env.__version__}")
        return 0
    verb, rest = _split(words)
    if verb in VERBS:
        return run(verb, rest)
    group = [name for name in VERBS if name.startswith(f"{verb} ")]
    if group and (not rest or rest[0] in ("-h", "--help")):
        print(usage(group))
        return 0 if rest else 2
    print(_unknown(verb, rest, group), file=sys.stderr)
    return 2


def _split(words: list[str]) -> tuple[str, list[str]]:
    """The verb, of one or two words, and its own arguments."""
    two = " ".join(words[:2])
    return (two, words[2:]) if two in VERBS else (words[0], words[1:])


def _unknown(verb: str, rest: Sequence[str], group: Sequence[str]) -> str:
    """Of a group of verbs, such as ``world``, the second word is the wrong one."""
    before, asked = (f"{verb} ", rest[0]) if group else ("", verb)
    known = {name.removeprefix(before).split()[0]: None for name in group or VERBS}
    close = [before + name for name in difflib.get_close_matches(asked, known)]
    hint = f"did you mean {' or '.join(close)}?" if close else "see: addiff --help"
    return f"addiff: no verb {before + asked!r}; {hint}"


def usage(verbs: Iterable[str]) -> str:
    """The help text: a line for each of ``verbs``."""
    lines = [f"  {verb:<15} {VERBS[verb][1]}" for verb in verbs]
    ends = ["addiff <verb> --help tells a verb's options, addiff --version the release."]
    return "\n".join(["usage: addiff <verb> ...", "", *lines, "", *ends])


def run(verb: str, argv: Sequence[str]) -> int:
    """Import the verb's module and run it; expected errors become one line on stderr."""
    try:
        return import_module(VERBS[verb][0]).main(list(map(expand_home, argv)))
    except KeyboardInterrupt:
        return INTERRUPTED
    except (*EXPECTED, MemoryError, RuntimeError) as error:
        expected = isinstance(error, EXPECTED) or is_out_of_memory(error)
        if os.environ.get("ADDIFF_TRACEBACK") or not expected:
            raise
        print(f"addiff {verb}: {_said(error)}", file=sys.stderr)
        return 2 if verb in BARS else 1


def _said(error: BaseException) -> str:
    if is_out_of_memory(error):
        return f"out of memory: {error}; {LESS}"
    extra = EXTRAS.get(getattr(error, "name", None) or "")
    return f"{error}; pip install 'addiff-env[{extra}]'" if extra else str(error) or type(error).__name__
