"""The page itself, of Gradio's components."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from addiff_env.pipeline import AdaptivePipeline
from addiff_env.serving import view
from addiff_env.serving.limits import MAX_SEED, read_request
from addiff_env.serving.studio import Frame, Preset, Studio

CSS = Path(__file__).with_name("style.css")
SYSTEM_FONTS = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]  # none is fetched
RANDOM_SEED = f"() => Math.floor(Math.random() * {2**31})"
TO_RESULTS = "() => document.getElementById('told').scrollIntoView({block: 'nearest', behavior: 'smooth'})"
LEGEND = "NFE: evaluations of the denoiser. Score: the reward model's. Pink: the region that is refined."
Shown = tuple[Any, Any, Any]  # the message, the two pictures, the row of steps

_log = logging.getLogger(__name__)


def theme() -> Any:
    """Gradio's own, without fonts from elsewhere."""
    plain = gr.themes.Default(primary_hue="blue", font=SYSTEM_FONTS, font_mono=["ui-monospace", "monospace"])
    fainter = ("body_text_color_subdued", "block_info_text_color")
    readable = {name: "*neutral_600" for name in fainter} | {f"{name}_dark": "*neutral_300" for name in fainter}
    filled = {"button_primary_background_fill": "*primary_600", "button_primary_background_fill_dark": "*primary_600"}
    return plain.set(**readable, **filled)


def make_picture(studio: Studio, pace: float, *values: Any) -> Iterator[Shown]:
    """What the page shows while a visitor's picture is made; never faster than one frame in ``pace`` seconds.

    ``values`` are prompt, seed, budget, whether to compare, and the fixed number of steps. What is wrong with them is
    told on the page, and what fails on the server there, too.
    """
    try:
        request = read_request(studio.limits, *values)
    except ValueError as error:
        yield view.message(str(error), "error"), gr.skip(), gr.skip()
        return
    screen = view.Screen(request.prompt, request.seed, request.steps)
    remarks = " ".join(studio.remarks(request.prompt))
    yield view.message(f"Starting ... {remarks}".strip(), "busy"), screen.lanes(), ""
    try:
        with closing(studio.run(request)) as events:  # type: ignore[type-var]
            for event in events:
                screen.add(event)
                doing = "The agent decides" if event.method == "agent" else "A fixed number of steps"
                yield view.message(f"{doing} ... {remarks}".strip(), "busy"), screen.lanes(), screen.steps()
                time.sleep(pace if isinstance(event, Frame) else 0)
    except Exception as error:  # whatever a model may raise: the visitor is told, and the page lives on
        _log.exception("a picture failed: %s", request)
        yield view.message(f"The model failed: {error}", "error"), gr.skip(), gr.skip()
        return
    yield view.message(f"Done. {screen.summary()}. {remarks}".strip(), "done"), screen.lanes(), screen.steps()


def build(studio: Studio, presets: Sequence[Preset] = (), queue_size: int = 16, pace: float = 0.1) -> Any:
    """The page of a studio, a `gradio.Blocks` with its queue; start it with `addiff_env.serving.server.serve`."""
    limits, make = studio.limits, partial(make_picture, studio, pace)
    with gr.Blocks(analytics_enabled=False, title="AdDiffusion") as page:
        gr.Markdown(f"# AdDiffusion\n{_described(studio.pipe)}", elem_id="title")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                inputs = _inputs(studio, presets)
                with gr.Row():
                    start = gr.Button("Make picture", variant="primary", min_width=120, elem_id="start")
                    cancel = gr.Button("Cancel", min_width=120, elem_id="cancel")
                start.click(None, js=TO_RESULTS)
            with gr.Column(scale=3, min_width=320):
                hint = "Type a prompt, or choose a preset below." if presets else "Type a prompt."
                told = gr.HTML(view.message(hint), elem_id="told")
                lanes = gr.HTML(view.blank(limits.default_steps), elem_id="lanes")
        gr.Markdown(f"### Steps of the agent\n{LEGEND}", elem_id="legend")
        steps = gr.HTML(view.no_steps(), elem_id="steps")
        outputs, prompt, seed = [told, lanes, steps], inputs[0], inputs[1]
        given: dict[str, Any] = _event(make, inputs, outputs)
        runs = [gr.on([start.click, prompt.submit], **given)]
        if presets:
            gr.Markdown("### Presets, made here by the agent: choose one to watch it again")
            shown = [(one.picture, f"{one.prompt}: NFE {one.nfe}") for one in presets]
            gallery = gr.Gallery(shown, format="png", elem_id="presets", **_GALLERY)
            chosen = gallery.select(_choice(presets), None, [prompt, seed], queue=False, **_HIDDEN)
            chosen.then(None, js=TO_RESULTS)
            runs.append(chosen.then(**given))
        stopped = view.message("Cancelled: the lane is free again.")
        cancel.click(lambda: stopped, None, told, cancels=runs, queue=False, **_HIDDEN)
    page.queue(max_size=queue_size, api_open=False, default_concurrency_limit=1)
    return page


_HIDDEN: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
_GALLERY: dict[str, Any] = {
    "columns": 6,
    "show_label": False,
    "allow_preview": False,
    "object_fit": "contain",
    "height": "auto",
    "buttons": [],
    "interactive": False,
}


def _event(make: Callable[..., Any], inputs: Sequence[Any], outputs: Sequence[Any]) -> dict[str, Any]:
    """How a request is run: one at a time, the others wait in the queue; values come as the browser sends them."""
    return {
        "fn": make,
        "inputs": inputs,
        "outputs": outputs,
        "preprocess": False,
        "concurrency_limit": 1,
        "concurrency_id": "lanes",
        "trigger_mode": "once",
        "show_progress": "minimal",
        "show_progress_on": outputs[0],
        "api_visibility": "private",
    }


def _choice(presets: Sequence[Preset]) -> Callable[[gr.SelectData], tuple[str, int]]:
    """What a click on the gallery puts into prompt and seed."""

    def choose(event: gr.SelectData) -> tuple[str, int]:
        preset = presets[event.index]
        return preset.prompt, preset.seed

    return choose


def _inputs(studio: Studio, presets: Sequence[Preset]) -> list[Any]:
    """Prompt, seed, budget, whether to compare, and the fixed number of steps."""
    limits, budget = studio.limits, studio.limits.budget
    prompt = gr.Textbox(
        presets[0].prompt if presets else "",
        label="Prompt",
        info="Coloured shapes, e.g. a red circle left of a blue star" if studio.is_tiny else None,
        max_length=limits.prompt_length,
        elem_id="prompt",
    )
    with gr.Row(equal_height=True):
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=140, elem_id="seed")
        gr.Button("Random seed", size="sm", min_width=120, elem_id="random").click(None, None, seed, js=RANDOM_SEED)
    amount = gr.Slider(
        budget.low,
        budget.high,
        budget.start,
        step=budget.step,
        label=budget.label,
        info=budget.info,
        visible=budget.low < budget.high,
        elem_id="budget",
    )
    compare = gr.Checkbox(True, label="Compare with a fixed number of steps, same seed", elem_id="compare")
    fixed = gr.Slider(1, limits.most_steps, limits.default_steps, step=1, label="Fixed steps", elem_id="fixed")
    return [prompt, seed, amount, compare, fixed]


def _described(pipe: AdaptivePipeline) -> str:
    env, fingerprint = pipe.env, getattr(pipe.agent, "fingerprint", "")
    model = env.config.model.removeprefix("addiff_env:tiny/weights/pipeline") or "the embedded world"
    return (
        "A trained agent decides at each step whether to go on, stop or refine. "
        f"Model: {model}, agent {fingerprint}, on {env.backbone.device}."
    )
