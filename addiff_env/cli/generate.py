"""Make pictures of prompts with a trained agent, each with a row that says what it took.

    addiff generate "a red circle left of a blue star" --number 4 --out out
    addiff generate --prompts prompts.jsonl --out out --target-nfe 8 --agent runs/train/tiny-seed0/agent
    torchrun --nproc_per_node 2 -m addiff_env.cli generate --prompts prompts.txt --out out

The same command goes on where it was stopped; with other prompts or settings than the folder's it is refused. A prompt
that cannot be made fails alone: its row says why, and the exit status is 3.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from addiff_env.agent import Agent
from addiff_env.cli.options import add_agent_options, number_in, overrides_of
from addiff_env.env.prompts import BadRow, PromptRow, check_prompt, each_prompt, shorten
from addiff_env.env.validation import check_seed
from addiff_env.evaluation.benchmarks.items import item_of
from addiff_env.evaluation.benchmarks.readers import MAX_SEED, Entry, entry_of
from addiff_env.evaluation.run.fingerprint import WEIGHTS, environment_of
from addiff_env.evaluation.run.made_with import CONTENTS, keep_fingerprint, require_same
from addiff_env.evaluation.run.rows import launched_shard, shard_path
from addiff_env.evaluation.run.version import code_version
from addiff_env.pipeline import SHIPPED_AGENT, AdaptivePipeline
from addiff_env.pipeline.folder import PictureFolder, Task
from addiff_env.pipeline.lanes import require_registered
from addiff_env.stats import at_least_one
from addiff_env.storage.commands import FAILED, described_parser, interruptible
from addiff_env.storage.files import claim
from addiff_env.storage.inputs import fingerprints

_OTHER = "take another folder: --out ..."
_SHOWN = 5  # failures that are reported one by one


# --------------------------------------------------------------------------- what is wanted


def tasks_of(options: argparse.Namespace) -> list[Task]:
    """One task per picture: those of a prompt follow one another, and seeds count up through all of them.

    Raises:
        ValueError, TypeError, FileNotFoundError: a prompt on the command line that is no text, or a file that is none.
    """
    rows: list[PromptRow | BadRow]
    if options.prompts is None:
        rows = [PromptRow(check_prompt(text), k, "the command line") for k, text in enumerate(options.prompt)]
    else:
        rows = list(each_prompt(options.prompts))
    if not rows:
        raise ValueError(f"no prompts in {str(options.prompts)!r}")
    return [task for order, row in enumerate(rows) for task in _tasks(row, order * options.number, options)]


def _tasks(row: PromptRow | BadRow, index: int, options: argparse.Namespace) -> list[Task]:
    """The pictures of one row; of one that is no prompt, that each of them fails."""
    try:
        if isinstance(row, BadRow):
            raise ValueError(row.reason)
        entry = entry_of(row, "prompt")
        negative = row.fields.get("negative_prompt") or options.negative_prompt
        negative = None if negative is None else check_prompt(negative, f"{row.place}: a negative prompt")
        return [_task(entry, index + k, k, options.seed, negative) for k in range(options.number)]
    except (ValueError, TypeError) as error:
        prompt = row.prompt if isinstance(row, PromptRow) else ""
        return [Task(index + k, prompt, error=str(error)) for k in range(options.number)]


def _task(entry: Entry, index: int, repeat: int, first_seed: int, negative: str | None) -> Task:
    item = item_of(entry, index, first_seed, repeat)
    return Task(index, item.prompt, check_seed(item.seed), negative)


def fingerprint_of(
    options: argparse.Namespace, tasks: Sequence[Task], agent: Agent, overrides: dict[str, Any]
) -> dict[str, Any]:
    """What the folder's pictures depend on, JSON-able."""
    digest = hashlib.sha256(json.dumps([asdict(task) for task in tasks]).encode()).hexdigest()[:16]
    require_registered(options.env)
    names = ("number", "seed", "negative_prompt", "price", "target_nfe", "max_nfe", "dtype", "save_previews")
    environment = environment_of(agent, overrides, options.env)
    made_with = {
        "environment": environment,
        CONTENTS: fingerprints({f"environment.{name}": environment[name] for name in WEIGHTS}),
        "agent": agent.fingerprint,
        "prompts": digest,
        "code_version": code_version(),
        **{name: getattr(options, name) for name in names},
    }
    return json.loads(json.dumps(made_with))


# --------------------------------------------------------------------------- making it


def generate(options: argparse.Namespace, place: tuple[int, int]) -> int:
    """Make this process's share, ``place`` (rank, number of processes); returns the exit status.

    Raises:
        ValueError: the folder's pictures are of other prompts or settings; and as the agent, environment and pipeline.
    """
    tasks, agent = tasks_of(options), Agent.from_pretrained(options.agent)
    overrides = overrides_of(options)
    made_with = fingerprint_of(options, tasks, agent, overrides)
    require_same(options.out, made_with, "generate", _OTHER)
    if place[1] > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", place[0])))  # each process has its own GPU
    pipe = AdaptivePipeline.from_pretrained(agent, options.num_envs, env_id=options.env, **overrides)
    folder = PictureFolder(options.out, shard_path(options.out, *place))
    left = [task for task in tasks[place[0] :: place[1]] if task.index not in folder.done]
    checked = [_checked(task, pipe) for task in left]
    good = [task for task in checked if not task.error]
    stream = _stream(pipe, good, options)  # which refuses settings that make no sense
    keep_fingerprint(options.out, made_with, "generate", _OTHER)
    for task in checked:
        if task.error:
            folder.fail(task, task.error)
    with closing(stream):  # also its progress bar, before anything else is said
        for made in stream:
            folder.keep(good[made.index], made)
    return report(options.out, folder.merge(), tasks, place)


def _checked(task: Task, pipe: AdaptivePipeline) -> Task:
    """The task, or why it fails: guidance may have no use for its negative prompt."""
    try:
        pipe.env.backbone.check_negative_prompt(task.negative_prompt, pipe.env.config.guidance_scale)
    except ValueError as error:
        return Task(task.index, task.prompt, task.seed, task.negative_prompt, task.error or str(error))
    return task


def _stream(pipe: AdaptivePipeline, tasks: Sequence[Task], options: argparse.Namespace) -> Any:
    return pipe.stream(
        [task.prompt for task in tasks],
        [task.seed for task in tasks],
        [task.negative_prompt for task in tasks],
        price=options.price,
        target_nfe=options.target_nfe,
        max_nfe=options.max_nfe,
        previews=options.save_previews,
    )


def report(folder: Path, rows: Sequence[dict[str, Any]], tasks: Sequence[Task], place: tuple[int, int]) -> int:
    """Say what there is, and what failed; returns the exit status."""
    made, failed = ([row for row in rows if bool(row["error"]) == bad] for bad in (False, True))
    nfe = f", {sum(row['nfe'] for row in made) / len(made):.1f} evaluations each" if made else ""
    print(f"{len(made)} of {len(tasks)} pictures in {folder}{nfe}")
    if place[1] > 1 and len(rows) < len(tasks):
        print(f"process {place[0]} of {place[1]} has ended; the others add {len(tasks) - len(rows)}")
    for row in failed[:_SHOWN]:
        print(f"failed: picture {row['index']}, {shorten(row['prompt'])}: {row['error']}", file=sys.stderr)
    if len(failed) > _SHOWN:
        print(f"failed: {len(failed) - _SHOWN} more, whose rows say why", file=sys.stderr)
    return FAILED if failed else 0


# --------------------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = _parser().parse_args(argv)
    place = launched_shard(0, 1)
    group, member = (f"shares of {place[1]}", str(place[0])) if place[1] > 1 else ("", "")
    with (
        interruptible(lambda: f"what was made is in {options.out}"),
        claim(options.out, "addiff generate", group, member, instead=_OTHER),
    ):
        return generate(options, place)


def _parser() -> argparse.ArgumentParser:
    parser = described_parser("addiff generate", __doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("prompt", nargs="*", default=[], help="what to make pictures of, any number of prompts")
    source.add_argument("--prompts", metavar="FILE", help="a file of them: .txt, .csv, .tsv, .json or .jsonl")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where pictures and rows.jsonl go")
    parser.add_argument("--number", type=at_least_one, default=1, metavar="N", help="pictures of each prompt")
    seeds = number_in(0, MAX_SEED)
    parser.add_argument(
        "--seed", type=seeds, default=0, help="of the first picture; counts up, unless a row has a seed"
    )
    parser.add_argument("--negative-prompt", metavar="TEXT", help="for rows that have none of their own")
    parser.add_argument("--price", type=float, help="of an evaluation, for an agent trained with price_range")
    parser.add_argument("--target-nfe", type=float, metavar="N", help="in its place: mean evaluations a picture")
    parser.add_argument("--max-nfe", type=int, metavar="N", help="budget of a picture")
    parser.add_argument("--save-previews", action="store_true", help="also what each decision saw, in previews/")
    add_agent_options(parser, SHIPPED_AGENT)
    parser.add_argument("--num-envs", type=at_least_one, default=16, metavar="N", help="pictures denoised at once")
    return parser
