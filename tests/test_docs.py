"""The examples of the documentation run as they stand."""

import importlib.util
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
SLOW = {"ray"}  # starts worker processes


def blocks() -> list[pytest.param]:  # type: ignore[valid-type]
    """Every Python block of the pages, named by page and heading."""
    found = []
    for page in sorted(DOCS.glob("*.md")):
        for section in page.read_text(encoding="utf-8").split("\n## ")[1:]:
            title = section.splitlines()[0]
            for source in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
                libraries = set(re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE))
                marks = [pytest.mark.slow] if libraries & SLOW else []
                found.append(pytest.param(source, libraries, id=f"{page.stem}: {title}", marks=marks))
    return found


@pytest.mark.parametrize(("source", "libraries"), blocks())
def test_examples_run(source: str, libraries: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    for library in sorted(libraries):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    exec(compile(source, "example", "exec"), {"__name__": "example"})
