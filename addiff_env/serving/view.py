"""What the page shows of a request, as HTML. Pictures stand inside of it, so that no file of them is ever served."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
from PIL import Image

from addiff_env.serving.studio import Frame, Method, Result
from addiff_env.types import ACTIONS, Action

MASK_COLOR = (255, 64, 160)  # no colour of the embedded world
MASK_OPACITY = 0.6
THUMB = 96  # pixels of a picture's longer side in the row of steps
SMOOTH_FROM = 128  # smaller pictures are enlarged without smoothing


@dataclass
class Side:
    """One of the two pictures, as far as it is made."""

    title: str
    frames: list[Frame] = field(default_factory=list)
    result: Result | None = None


class Screen:
    """Everything that a request has shown so far; `lanes` and `steps` draw it."""

    def __init__(self, prompt: str, seed: int, fixed_steps: int | None) -> None:
        self.prompt, self.seed = prompt, seed
        self.sides: dict[Method, Side] = {"agent": Side("Agent")}
        if fixed_steps is not None:
            self.sides["fixed"] = Side(f"{fixed_steps} fixed steps")
        self._cells: list[str] = []

    def add(self, event: Frame | Result) -> None:
        """Show one thing more."""
        side = self.sides[event.method]
        if isinstance(event, Result):
            side.result = event
            return
        side.frames.append(event)
        if event.method == "agent":
            self._cells.append(_cell(event))

    def lanes(self) -> str:
        """The two pictures, and what they took."""
        return f'<div class="lanes">{"".join(self._panel(method) for method in self.sides)}</div>'

    def steps(self) -> str:
        """One cell a step of the agent, in their order: what is there stays as it is when one is added."""
        return "".join(self._cells)

    def summary(self) -> str:
        """Both results in a sentence."""
        results = [(side.title, side.result) for side in self.sides.values() if side.result is not None]
        return ". ".join(f"{title}: {_count(made.nfe)}, {made.seconds:.2f} s" for title, made in results)

    def _panel(self, method: Method) -> str:
        side = self.sides[method]
        latest = side.frames[-1] if side.frames else None
        picture = _placeholder() if latest is None else self._picture(side, latest)
        rows = "".join(_row(name, value) for name, value in _facts(side))
        return (
            f'<section class="lane" data-method="{method}" data-done="{str(side.result is not None).lower()}">'
            f"<h3>{escape(side.title)}</h3>{picture}<dl>{rows}</dl></section>"
        )

    def _picture(self, side: Side, latest: Frame) -> str:
        picture, done = latest.picture, side.result is not None
        if side.result is not None:
            picture = side.result.picture
        what = "finished" if done else f"after {_count(latest.nfe)}"
        drawn = _image(picture, f"{side.title}, {what}: {self.prompt}")
        if not done and latest.mask is not None:
            drawn += _overlay(latest.mask) + '<span class="tag refine">refining here</span>'
        name = f"{_slug(self.prompt)}-seed{self.seed}-{_slug(side.title)}.png"
        save = f'<a class="save" download="{name}" href="{_data_url(picture)}">Save</a>' if done else ""
        return f'<div class="canvas">{drawn}{save}</div>'


def blank(fixed_steps: int | None) -> str:
    """The two places before anything was made."""
    return Screen("", 0, fixed_steps).lanes()


def no_steps() -> str:
    """The row of steps before anything was made."""
    return '<p class="hint">Each decision appears here as it is made: what there was to see, and what was likely.</p>'


def message(text: str, kind: str = "info") -> str:
    """A line for the visitor; ``kind`` is info, busy, done or error."""
    role = "alert" if kind == "error" else "status"
    return f'<p class="message {kind}" role="{role}">{escape(text)}</p>'


# --------------------------------------------------------------------------- facts


def _facts(side: Side) -> Iterator[tuple[str, str]]:
    """Names and values (HTML) of what is known of a picture; the same rows on both sides, so that they stand level."""
    latest, result = (side.frames[-1] if side.frames else None), side.result
    if latest is None:
        yield from (("NFE", "–"), ("seconds", "–"))
        return
    nfe, seconds = (result.nfe, result.seconds) if result else (latest.nfe, latest.seconds)
    yield "NFE", f'<b class="nfe">{nfe}</b>'
    yield "seconds", f'<b class="seconds">{seconds:.2f}</b>'
    if result is None:
        yield "step", f"{latest.step_index} of {latest.steps}"
    else:
        yield "net FLOPs", _flops(result.net_flops)
    if result is not None and result.satisfied is not None:
        verdict = "as asked" if result.satisfied else f"not as asked: {escape(result.reason)}"
        yield "exact checker", f'<span class="{"good" if result.satisfied else "bad"}">{verdict}</span>'
    if latest.reward_score is not None:
        yield "reward score", f"{latest.reward_score:.2f}"
    if latest.probabilities is not None:
        yield "action", _bars(latest.probabilities, latest.action)
    if result is not None and result.note:
        yield "note", f'<span class="bad">{escape(result.note)}</span>'


def _row(name: str, value: str) -> str:
    """A name with its value, HTML; bars want the whole width."""
    wide = ' class="wide"' if value.startswith('<span class="bars"') else ""
    return f"<dt{wide}>{escape(name)}</dt><dd{wide}>{value}</dd>"


def _bars(probabilities: Sequence[float], action: Action | None) -> str:
    """A bar per action, as long as it was likely; the one that was taken is marked."""
    drawn = []
    for index, (name, share) in enumerate(zip(ACTIONS, probabilities, strict=True)):
        taken = " taken" if action == index else ""
        drawn.append(
            f'<span class="bar {name}{taken}"><span class="name">{name}</span><span class="track">'
            f'<span class="fill" style="width:{share:.1%}"></span></span><span class="share">{share:.0%}</span></span>'
        )
    return f'<span class="bars">{"".join(drawn)}</span>'


def _cell(frame: Frame) -> str:
    """One step in the row of steps."""
    name = "warm-up" if frame.action is None else ACTIONS[frame.action]
    css = "" if frame.action is None else f" {ACTIONS[frame.action]}"
    score = "" if frame.reward_score is None else f'<span class="score">score {frame.reward_score:.2f}</span>'
    mask = "" if frame.mask is None else _overlay(frame.mask)
    picture = _image(_thumb(frame.picture), f"after {_count(frame.nfe)}")
    shares = "" if frame.probabilities is None else _stack(frame.probabilities)
    return (
        f'<figure class="step"><div class="canvas">{picture}{mask}</div>{shares}<figcaption>'
        f'<span class="tag{css}">{name}</span><span>NFE {frame.nfe}</span>{score}</figcaption></figure>'
    )


def _stack(probabilities: Sequence[float]) -> str:
    """The three probabilities as one divided bar."""
    said = ", ".join(f"{name} {share:.0%}" for name, share in zip(ACTIONS, probabilities, strict=True))
    parts = (
        f'<span class="{name}" style="width:{share:.1%}"></span>'
        for name, share in zip(ACTIONS, probabilities, strict=True)
    )
    return f'<span class="stack" role="img" aria-label="{said}" title="{said}">{"".join(parts)}</span>'


def _count(nfe: int) -> str:
    return f"{nfe} evaluation{'' if nfe == 1 else 's'}"


def _flops(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "picture"


# --------------------------------------------------------------------------- pictures


def _placeholder() -> str:
    return '<div class="canvas empty" aria-hidden="true"></div>'


def _image(picture: np.ndarray, alt: str) -> str:
    css = ' class="crisp"' if max(picture.shape[:2]) < SMOOTH_FROM else ""
    return f'<img{css} alt="{escape(alt)}" src="{_data_url(picture)}">'


def _overlay(mask: np.ndarray) -> str:
    """A mask (h, w) as a coloured layer over its picture."""
    layer = np.empty((*mask.shape, 4), np.uint8)
    layer[..., :3] = MASK_COLOR
    layer[..., 3] = np.rint(np.clip(mask, 0, 1) * MASK_OPACITY * 255)
    return f'<img class="mask" alt="" src="{_data_url(layer)}">'


def _thumb(picture: np.ndarray) -> np.ndarray:
    if max(picture.shape[:2]) <= THUMB:
        return picture
    image = Image.fromarray(picture)
    image.thumbnail((THUMB, THUMB))
    return np.asarray(image)


def _data_url(picture: np.ndarray) -> str:
    kept = io.BytesIO()
    Image.fromarray(picture).save(kept, "PNG")
    return f"data:image/png;base64,{base64.b64encode(kept.getvalue()).decode()}"
