"""Methods timed in turns, with a clock that toy methods move: no time is measured here."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from addiff_env.evaluation.benchmarks.items import Item
from addiff_env.evaluation.run.timing import time_methods
from addiff_env.evaluation.statistics.timings import Timings
from addiff_env.types import Generated

ITEMS = [Item(f"prompt {k}", k, "c") for k in range(4)]


class FakeClock:
    """Stands still unless a method works."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def __call__(self):
        return self.now


class Toy:
    """A method whose pictures take the seconds of its list in turn, the first call being the warm-up."""

    def __init__(self, clock, name, seconds, fails_at=None, nfe=10):
        self.name = self.solver = self.policy = name
        self.backbone = SimpleNamespace(
            name="addiff_env:toy", revision=None, dtype_name="float32", device=torch.device("cpu")
        )
        self.clock, self.seconds, self.fails_at, self.nfe = clock, seconds, fails_at, nfe
        self.calls = []

    def make(self, items):
        number = len(self.calls)
        self.calls.append(list(items))
        self.clock.order.append(self.name)
        if self.fails_at == number:
            raise RuntimeError("CUDA out of\nmemory")
        for item in items:
            self.clock.now += self.seconds[min(number, len(self.seconds) - 1)]
            yield [(item, Generated(item.prompt, item.seed, None, nfe=self.nfe, net_flops=self.nfe * 1e9))]


def test_the_warm_up_is_discarded_and_the_median_counts():
    clock = FakeClock()
    methods = [Toy(clock, "a", [100, 1, 5, 2]), Toy(clock, "b", [50, 3])]
    found = time_methods(methods, ITEMS, 3, clock=clock)
    assert found.methods["a"].seconds == (1, 5, 2) and found.methods["a"].median == 2
    assert found.methods["b"].seconds == (3, 3, 3) and found.methods["b"].spread == 0
    assert found.methods["a"].spread == 2 and found.methods["a"].net_flops == 1e10 and found.methods["a"].nfe == 10
    assert found.methods["a"].made_by["dtype"] == "float32" and found.rounds == 3 and not found.untimed
    assert all(call == ITEMS for method in methods for call in method.calls)


def test_every_round_has_every_method_in_an_order_that_the_seed_fixes():
    orders = []
    for seed in (0, 0, 1):
        clock = FakeClock()
        time_methods([Toy(clock, name, [1]) for name in "abcdef"], ITEMS, 4, clock=clock, seed=seed, warm_up=1)
        orders.append([clock.order[at : at + 6] for at in range(6, 30, 6)])
    assert orders[0] == orders[1] != orders[2]
    assert all(sorted(one) == list("abcdef") for one in orders[0]) and len(set(map(tuple, orders[0]))) > 1


def test_what_goes_before_a_turn_is_not_timed():
    clock = FakeClock()

    def before():
        clock.now += 1000

    found = time_methods([Toy(clock, "a", [1])], ITEMS, 2, clock=clock, before=before)
    assert found.methods["a"].seconds == (1, 1)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_method_that_fails_is_named_and_the_others_go_on(at):
    clock = FakeClock()
    found = time_methods([Toy(clock, "a", [1], fails_at=at), Toy(clock, "b", [2])], ITEMS, 3, clock=clock)
    assert list(found.methods) == ["b"] and found.methods["b"].seconds == (2, 2, 2)
    assert found.untimed == {"a": "RuntimeError: CUDA out of memory"}
    none = time_methods([Toy(clock, "a", [1], fails_at=at)], ITEMS, 3, clock=clock)
    assert not none.methods and "out of memory" in none.untimed["a"]


@given(st.integers(1, 4), st.integers(0, 4))
def test_a_measurement_that_stopped_goes_on_to_the_same_rounds(first, more):
    def timed(rounds, kept, keep=lambda found: None):
        clock = FakeClock()
        return time_methods([Toy(clock, n, [9, 1]) for n in "ab"], ITEMS, rounds, clock=clock, kept=kept, keep=keep)

    states = []
    before = timed(first, Timings(), states.append)
    assert [state.rounds for state in states] == list(range(1, first + 1)) and states[-1] == before
    assert timed(first + more, before) == timed(first + more, Timings())


def test_ctrl_c_keeps_the_finished_rounds():
    clock, states = FakeClock(), []

    class Interrupted(Toy):
        def make(self, items):
            if len(self.calls) == 3:
                raise KeyboardInterrupt
            yield from super().make(items)

    with pytest.raises(KeyboardInterrupt):
        time_methods([Interrupted(clock, "a", [1])], ITEMS, 5, clock=clock, keep=states.append)
    assert states[-1].rounds == 2


def test_what_makes_no_sense_is_refused():
    clock = FakeClock()
    toys = [Toy(clock, "a", [1]), Toy(clock, "b", [1])]
    for methods, items, rounds, words in (
        (toys, [], 1, "0 items"),
        (toys, ITEMS, 0, "0 rounds"),
        ([*toys, toys[0]], ITEMS, 1, "more than once: a"),
    ):
        with pytest.raises(ValueError, match=words):
            time_methods(methods, items, rounds, clock=clock)
    kept = time_methods(toys[:1], ITEMS, 1, clock=clock)
    with pytest.raises(ValueError, match="timed without b"):
        time_methods(toys, ITEMS, 2, clock=clock, kept=kept)


def test_rounds_are_drawn_together(rng):
    clock = FakeClock()
    slow = [0, 1, 2, 3]  # every method is twice and three times as slow in the same rounds
    found = time_methods([Toy(clock, "a", slow), Toy(clock, "b", [10 * k for k in slow])], ITEMS, 3, clock=clock)
    factors = found.factors(["a", "b"], 500, 0)
    assert np.allclose(factors["a"], factors["b"]) and set(factors["a"].tolist()) == {0.5, 1.0, 1.5}
    assert np.array_equal(found.factors(["a"], 500, 0)["a"], factors["a"])
    with pytest.raises(ValueError, match="not timed: c; timed were a, b"):
        found.factors(["a", "c"], 3, 0)
