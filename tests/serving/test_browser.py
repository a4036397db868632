"""The page in a real browser: a headless Chromium."""

import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pytest

pytest.importorskip("gradio")
pytest.importorskip("selenium")

from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from serving_agents import collect_event_loops, free_port

from addiff_env.cli.web import fixed_picture
from addiff_env.pipeline import AdaptivePipeline
from addiff_env.serving.page import build
from addiff_env.serving.server import served, temporary_files
from addiff_env.serving.studio import Studio

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium, or no chromium-driver"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]
T = TypeVar("T")
STEP = 0.15  # seconds that an evaluation takes at least
PATIENCE = 120  # seconds


class Evaluations:
    """When the denoiser was called; each call takes `STEP`, and waits while ``go`` is not set."""

    def __init__(self, pipe: AdaptivePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times: list[float] = []
        self.go = threading.Event()
        self.go.set()
        real = pipe.env.backbone.predict

        def predict(*args: Any, **kwargs: Any) -> Any:
            self.times.append(time.monotonic())
            time.sleep(STEP)
            self.go.wait(PATIENCE)
            return real(*args, **kwargs)

        monkeypatch.setattr(pipe.env.backbone, "predict", predict)

    def have_ended(self) -> bool:
        """Nothing was evaluated for ten steps' time."""
        return time.monotonic() - self.times[-1] > 10 * STEP


@pytest.fixture(scope="module", autouse=True)
def event_loops() -> Iterator[None]:
    yield
    collect_event_loops()


@pytest.fixture(scope="module")
def url(pipe: AdaptivePipeline) -> Iterator[str]:
    studio = Studio(pipe, fixed_picture)
    with temporary_files() as folder:
        page = build(studio, studio.presets(["a star", "a red circle"]), queue_size=1, pace=0)
        with served(page, studio, "127.0.0.1", free_port(), folder) as address:
            yield address


@pytest.fixture
def evaluations(pipe: AdaptivePipeline, monkeypatch: pytest.MonkeyPatch) -> Evaluations:
    return Evaluations(pipe, monkeypatch)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1200,1000",
    ):
        options.add_argument(word)
    options.binary_location = str(CHROMIUM)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    browser.switch_to.new_window("tab")
    opened(browser, url)
    yield browser
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.close()
    browser.switch_to.window(browser.window_handles[0])


def opened(browser: Any, url: str) -> None:
    browser.get(url)
    until(lambda: one(browser, "#prompt textarea").is_displayed())
    until(lambda: one(browser, "#start").is_enabled())


def until(holds: Callable[[], T]) -> T:
    """What ``holds`` gives once it is true; the page is drawn anew all the time."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            if found := holds():
                return found
        except WebDriverException:
            pass
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def one(page: Any, selector: str) -> Any:
    return page.find_element(By.CSS_SELECTOR, selector)


def told(page: Any) -> str:
    return str(one(page, "#told .message").text)


def number_of(page: Any, selector: str) -> int:
    return len(page.find_elements(By.CSS_SELECTOR, selector))


def type_prompt(page: Any, text: str) -> None:
    box = one(page, "#prompt textarea")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(Keys.DELETE + text)


# --------------------------------------------------------------------------- making a picture


def test_a_typed_prompt_is_watched_live_and_compared(page: Any, evaluations: Evaluations) -> None:
    type_prompt(page, "a red circle")
    one(page, "#start").click()
    seen = set[tuple[int, int]]()

    def done() -> bool:
        fixed = page.find_elements(By.CSS_SELECTOR, '[data-method="fixed"] .nfe')
        seen.add((number_of(page, "#steps .step"), int(fixed[0].text) if fixed else 0))
        return told(page).startswith("Done")

    until(done)
    assert len({steps for steps, _ in seen}) > 2 and len({fixed for _, fixed in seen}) > 2  # both were live
    for method in ("agent", "fixed"):
        side = f'[data-method="{method}"][data-done="true"]'
        picture = one(page, f"{side} .canvas img")
        assert page.execute_script("return arguments[0].naturalWidth", picture) == 64
        assert "a red circle" in picture.get_attribute("alt")
        assert float(one(page, f"{side} .seconds").text) > 0 and int(one(page, f"{side} .nfe").text) > 0
    assert one(page, '[data-method="fixed"] h3').text == "6 fixed steps"
    assert number_of(page, "#steps .stack") > 0
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_enter_starts_and_a_preset_is_made_again(page: Any, evaluations: Evaluations) -> None:
    type_prompt(page, "a star")
    one(page, "#prompt textarea").send_keys(Keys.ENTER)
    until(lambda: told(page).startswith("Done"))
    page.find_elements(By.CSS_SELECTOR, "#presets button")[1].click()
    until(lambda: one(page, "#prompt textarea").get_attribute("value") == "a red circle")
    until(lambda: told(page).startswith("Done") and number_of(page, 'img[alt$="finished: a red circle"]') == 2)
    assert one(page, "#seed input").get_attribute("value") == "1"


def test_what_is_wrong_is_told_on_the_page(page: Any, evaluations: Evaluations) -> None:
    type_prompt(page, " ")
    one(page, "#start").click()
    assert "prompt first" in until(lambda: one(page, "#told [role=alert]").text)
    type_prompt(page, "a star")
    seed = one(page, "#seed input")
    seed.send_keys(Keys.CONTROL, "a")
    seed.send_keys("1.5" + Keys.TAB)
    one(page, "#start").click()
    until(lambda: "got 1.5" in told(page) or told(page).startswith("Done"))
    assert told(page).startswith("The seed") and evaluations.times == []


# --------------------------------------------------------------------------- visitors who leave, and others


def test_cancel_frees_the_lane(page: Any, evaluations: Evaluations) -> None:
    one(page, "#start").click()
    until(lambda: number_of(page, "#steps .step") > 0)
    one(page, "#cancel").click()
    until(lambda: told(page).startswith("Cancelled"))
    until(evaluations.have_ended)
    assert len(evaluations.times) < 2 + 6  # the comparison was not begun
    assert number_of(page, '[data-done="true"]') == 0
    one(page, "#start").click()
    until(lambda: told(page).startswith("Done"))


def test_a_closed_tab_frees_the_lane(page: Any, url: str, pipe: AdaptivePipeline, evaluations: Evaluations) -> None:
    first = page.current_window_handle
    page.switch_to.new_window("tab")
    opened(page, url)
    one(page, "#start").click()
    until(lambda: number_of(page, "#steps .step") > 0)
    page.close()
    page.switch_to.window(first)
    until(evaluations.have_ended)
    assert len(evaluations.times) < 15  # agent's and fixed steps would be more
    assert pipe("a star", seeds=1, target_nfe=5.0).nfe[0] > 0


def test_visitors_wait_for_each_other_and_a_full_queue_is_told(page: Any, url: str, evaluations: Evaluations) -> None:
    tabs = [page.current_window_handle]
    one(page, "#start").click()
    until(lambda: number_of(page, "#steps .step") > 0)
    evaluations.go.clear()
    for _ in range(2):
        page.switch_to.new_window("tab")
        opened(page, url)
        tabs.append(page.current_window_handle)
        one(page, "#start").click()
        time.sleep(1)  # so that it is the later one
    until(lambda: "currently busy" in one(page, "body").text)
    evaluations.go.set()
    for tab in (tabs[1], tabs[0]):
        page.close()
        page.switch_to.window(tab)
        until(lambda: told(page).startswith("Done"))


# --------------------------------------------------------------------------- how it looks


@pytest.mark.parametrize("width", [390, 820, 1600])
def test_it_fits_its_width(page: Any, url: str, width: int) -> None:
    mobile = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", mobile)
    opened(page, url)
    for ended in ("choose a preset", "Done"):
        until(lambda words=ended: words in told(page))  # type: ignore[misc]
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        one(page, "#start").click()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_on_both_grounds(page: Any, url: str, scheme: str) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    opened(page, url)
    assert (brightness(page.execute_script(GROUND, one(page, "#told"))) < 0.2) == (scheme == "dark")
    one(page, "#start").click()
    until(lambda: told(page).startswith("Done"))
    for selector in (
        "#title p",
        "#told .message",
        ".lane h3",
        ".lane dt",
        ".lane dd",
        ".bar .name",
        "#start",
        "#cancel",
    ):
        assert contrast(page, selector) >= 4.5, selector
    for selector in ("#steps .tag", "#legend p", "#prompt label span", "#budget label span", "#presets .caption-label"):
        assert contrast(page, selector) >= 4.5, selector


GROUND = """
for (let at = arguments[0]; at; at = at.parentElement) {
  const ground = getComputedStyle(at).backgroundColor;
  if (!/, 0\\)$|transparent/.test(ground)) return ground;
}
return 'rgb(255, 255, 255)';
"""


def brightness(color: str) -> float:
    """Relative luminance of ``rgb(...)``, as WCAG 2 defines it."""
    parts = [float(part) / 255 for part in re.findall(r"[\d.]+", color)[:3]]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(page: Any, selector: str) -> float:
    """Ratio of a text to its ground, WCAG 2."""
    element = one(page, selector)
    text = page.execute_script("return getComputedStyle(arguments[0]).color", element)
    levels = sorted([brightness(text), brightness(page.execute_script(GROUND, element))])
    return (levels[1] + 0.05) / (levels[0] + 0.05)


# --------------------------------------------------------------------------- what it gives away


def test_everything_comes_from_the_page_itself(page: Any, url: str) -> None:
    page.get_log("performance")
    opened(page, url)
    one(page, "#start").click()
    until(lambda: told(page).startswith("Done"))
    asked = set()
    for entry in page.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.add(message["params"]["request"]["url"])
    hosts = {urlsplit(each).netloc for each in asked if urlsplit(each).scheme in ("http", "https", "ws", "wss")}
    assert hosts == {urlsplit(url).netloc}


def test_a_file_of_the_machine_is_not_shown(page: Any, url: str) -> None:
    page.get(f"{url}gradio_api/file=/etc/passwd")
    assert "root:" not in page.page_source
