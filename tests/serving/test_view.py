"""What the page shows, as HTML."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from addiff_env.serving import view
from addiff_env.serving.studio import Frame, Result
from addiff_env.types import Action

GREY = np.full((64, 64, 3), 128, np.uint8)
RED = np.full((64, 64, 3), (255, 0, 0), np.uint8)


def frame(nfe: int, action: Action | None = None, method: str = "agent", **more: object) -> Frame:
    chances = None if action is None else (0.5, 0.3, 0.2)
    return Frame(method, GREY, nfe, 10, nfe, nfe / 8, action, chances, **more)  # type: ignore[arg-type]


def pictures(html: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


class Balance(HTMLParser):
    """Every tag that opens, closes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_both_pictures_are_followed_to_their_ends() -> None:
    screen = view.Screen("a star", 3, 10)
    assert screen.lanes() == view.Screen("a star", 3, 10).lanes() and pictures(screen.lanes()) == []
    screen.add(frame(5, Action.CONTINUE, reward_score=1.25))
    shown = screen.lanes()
    assert len(pictures(shown)) == 1 and "1.25" in shown and "50%" in shown and "5 of 10" in shown
    screen.add(frame(1, method="fixed"))
    assert len(pictures(screen.lanes())) == 2
    screen.add(Result("agent", RED, 7, 2.5e9, 0.75, True, "ok"))
    screen.add(Result("fixed", RED, 10, 3e12, 1.5, False, "a star is <missing>", "not finite"))
    shown = screen.lanes()
    assert all((one == RED).all() for one in pictures(shown)) and "2.5 G" in shown and "3 T" in shown
    assert "as asked" in shown and "&lt;missing&gt;" in shown and "not finite" in shown
    assert screen.summary() == "Agent: 7 evaluations, 0.75 s. 10 fixed steps: 10 evaluations, 1.50 s"
    assert shown.count("download=") == 2
    Balance(shown)


def test_a_refinement_is_overlaid_while_it_is_shown() -> None:
    screen, mask = view.Screen("a star", 3, None), np.eye(16, dtype=np.float32)
    screen.add(frame(5, Action.REFINE, mask=mask))
    (_, layer), (_, small) = pictures(screen.lanes()), pictures(screen.steps())
    for one in (layer, small):
        assert one.shape == (16, 16, 4) and ((one[..., 3] > 0) == (mask > 0)).all()
    screen.add(Result("agent", RED, 7, 1.0, 0.75))
    assert len(pictures(screen.lanes())) == 1


def test_the_row_of_steps_only_grows() -> None:
    screen, before = view.Screen("a star", 3, 4), ""
    for event in (frame(1), frame(2, Action.CONTINUE), frame(1, method="fixed"), frame(4, Action.STOP)):
        screen.add(event)
        assert screen.steps().startswith(before)
        before = screen.steps()
    assert len(pictures(before)) == 3
    Balance(before)


@given(st.text(min_size=1))
def test_no_text_becomes_markup(text: str) -> None:
    screen = view.Screen(text, 3, 4)
    screen.add(frame(3, Action.CONTINUE))
    screen.add(Result("agent", GREY, 3, 1.0, 1.0, False, text, text))
    for html in (screen.lanes(), view.message(text, "error")):
        assert text in "".join(Balance(html).text).replace("\r", "\n") or not text.isprintable()
        assert set(re.findall(r"<(\w+)", html)) <= {*"p section h3 div img a dl dt dd b span".split()}


@pytest.mark.parametrize("size", [(64, 64), (512, 512), (512, 1024), (97, 33)])
def test_steps_are_small_and_keep_their_shape(size: tuple[int, int]) -> None:
    screen = view.Screen("a star", 3, None)
    screen.add(Frame("agent", np.zeros((*size, 3), np.uint8), 1, 10, 1, 0.1))
    (small,) = pictures(screen.steps())
    height, width = small.shape[:2]
    assert max(height, width) <= 96 and height / width == pytest.approx(size[0] / size[1], rel=0.05)
