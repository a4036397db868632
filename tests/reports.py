"""A small finished evaluation, and its page as a browser sees it."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.statistics.decision import SUPPORTED, UNDECIDED, Decision, Part
from addiff_env.types import ResultRow

HOSTILE = """<script>alert('x')</script> & "quoted" <img src=http://evil.example/x.png> {{ 7 * 7 }} $x^{2}$"""


PROMPTS = [HOSTILE, "a red circle", "two blue stars", "a green ring"]


ITEMS = [
    Item(prompt, seed, ("simple_<b>", "full")[seed % 2], num_requirements=1 + seed)
    for seed, prompt in enumerate(PROMPTS)
]


SCORES = {  # method -> (success, reward_score) of each item
    "ddim-5": ([0, 1, 0, 1], [0.0, 1.0, -1.0, 2.0]),
    "ddim-10": ([1, 1, 0, 1], [0.5, 1.5, -0.5, 2.5]),
    "agent": ([1, 0, 0, 1], [1.0, 0.25, 0.125, 3.0]),
}


ACTIONS = [[0, 1], [0, 2, 1], [2, 1], [0, 0, 0, 1]]


NFE = {"ddim-5": [5] * 4, "ddim-10": [10] * 4, "agent": [4, 7, 6, 11]}


def rows_of():
    return [
        ResultRow(
            method, item.prompt, item.seed, item.category, "tiny@packaged", "ddim", f"policy-{method}", "float32", "1",
            actions=ACTIONS[k] if method == "agent" else [], nfe=NFE[method][k], forward_passes=2 * NFE[method][k],
            net_flops=NFE[method][k] * 2.5e9, seconds=0.25, scores={"success": success[k], "reward_score": reward[k]},
            reason="ok" if success[k] else "star is missing", image=f"images/{method}/{k}.png",
        )
        for method, (success, reward) in SCORES.items()
        for k, item in enumerate(ITEMS)
    ]  # fmt: skip


VERDICTS = [
    Decision("H1", UNDECIDED, "open: quality", 4, (Part("quality", UNDECIDED, 0.125, -0.25, 0.5, 0.0321, 777),)),
    Decision("H2", SUPPORTED, "every condition holds", 4, (Part("above", SUPPORTED, 0.25, 0.1, 0.4, 1e-7),)),
]


@dataclass
class Page(HTMLParser):
    """Text, tags, images and tables of a page, as a browser without scripts sees them."""

    tags: list = field(default_factory=list)
    words: list = field(default_factory=list)
    tables: dict = field(default_factory=dict)  # section -> lines of cells, all tables of the section together
    images: list = field(default_factory=list)
    section: str = ""

    def __post_init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append((tag, values))
        if tag not in ("meta", "img", "use", "path", "rect", "link"):
            self.open.append(tag)
        if tag == "section":
            self.section = values["id"]
        if tag == "img":
            self.images.append((self.section, values["src"]))
        if tag == "tr":
            self.tables.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.tables[self.section][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if self.open and tag in self.open:
            assert self.open.pop() == tag, f"<{tag}> closes out of order, in {self.section}"

    def handle_data(self, data):
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[self.section][-1][-1] += data

    def line(self, section, first):
        """The cells of the first line of a section's tables that starts with ``first``."""
        return next([" ".join(cell.split()) for cell in line] for line in self.tables[section] if line[:1] == [first])
