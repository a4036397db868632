"""Open a page to type prompts on and watch the agent decide, beside the same seed with a fixed number of steps.

    addiff web
    addiff web --agent runs/train/tiny-seed0/agent --port 8000
    addiff web --agent owner/agent --device cuda --host 0.0.0.0

The page is for this machine alone unless --host says otherwise. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from addiff_env.agent import Agent
from addiff_env.cli.options import add_agent_options, number_in, overrides_of
from addiff_env.env.prompts import load_prompts
from addiff_env.env.vector import DiffusionDenoiseVectorEnv
from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.methods.samplers import FixedSteps
from addiff_env.pipeline import SHIPPED_AGENT, AdaptivePipeline
from addiff_env.pipeline.lanes import require_registered
from addiff_env.serving.limits import PROMPT_LENGTH, Limits
from addiff_env.serving.server import (
    LOOPBACK,
    check_address,
    interrupted_by_term,
    require_gradio,
    served,
    temporary_files,
    wait_until_interrupted,
)
from addiff_env.serving.studio import Studio
from addiff_env.stats import at_least_one
from addiff_env.storage.commands import INTERRUPTED, described_parser
from addiff_env.types import Generated

TOLD = "the tokenizer does not know|prompt truncated"  # warnings that the page itself shows to whom they concern


def studio_of(options: argparse.Namespace) -> Studio:
    """Load what the page needs; raises as agent, environment and `Limits`."""
    require_registered(options.env)
    overrides = overrides_of(options)
    if options.negative_prompt is not None:
        overrides["negative_prompt"] = options.negative_prompt
    agent = Agent.from_pretrained(options.agent)
    pipe = AdaptivePipeline.from_pretrained(agent, 1, env_id=options.env, **overrides)
    return Studio(pipe, fixed_picture, Limits.of(pipe, options.steps, options.prompt_length))


def fixed_picture(env: DiffusionDenoiseVectorEnv, prompt: str, seed: int, steps: int, watch: Any) -> Generated:
    """What the evaluation's `FixedSteps` makes of one prompt."""
    (((_, made),),) = FixedSteps(env, steps, watch=watch).make([Item(prompt, seed, "page")])
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = _parser().parse_args(argv)
    with interrupted_by_term(), temporary_files() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", TOLD)
        return _serve(options, folder)


def _serve(options: argparse.Namespace, folder: str) -> int:
    require_gradio()
    check_address(options.host, options.port)
    prompts = None if options.prompts is None else load_prompts(options.prompts)
    print("loading ...", flush=True)
    studio = studio_of(options)
    chosen = studio.preset_prompts(options.presets) if prompts is None else prompts[: options.presets]
    from addiff_env.serving.page import build

    page = build(studio, studio.presets(chosen), options.queue_size, options.pace)
    with served(page, studio, options.host, options.port, folder) as url:
        _say(url, options.host)
        wait_until_interrupted()
    print("\nthe page is closed", file=sys.stderr)
    return INTERRUPTED


def _say(url: str, host: str) -> None:
    print(f"the page is at {url} (Ctrl-C ends it)", flush=True)
    if host not in LOOPBACK:
        print(f"whoever reaches {host} may use it: there is no password", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------- options


def _parser() -> argparse.ArgumentParser:
    parser = described_parser("addiff web", __doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at (default: this machine alone)")
    parser.add_argument("--port", type=number_in(1, 65535), default=7860, help="default: 7860")
    parser.add_argument(
        "--queue-size", type=at_least_one, default=16, metavar="N", help="requests that may wait; more are turned away"
    )
    parser.add_argument("--steps", type=at_least_one, metavar="N", help="of the comparison (default: the id's)")
    parser.add_argument("--prompts", metavar="FILE", help="presets: .txt, .csv, .tsv, .json or .jsonl")
    parser.add_argument(
        "--presets", type=number_in(0, 1000), default=6, metavar="N", help="how many are made at the start"
    )
    parser.add_argument(
        "--prompt-length", type=at_least_one, default=PROMPT_LENGTH, metavar="N", help="most characters of a prompt"
    )
    parser.add_argument(
        "--pace",
        type=number_in(0, 60, float),
        default=0.1,
        metavar="SECONDS",
        help="between two steps that are shown, at least",
    )
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    add_agent_options(parser, SHIPPED_AGENT)
    return parser
