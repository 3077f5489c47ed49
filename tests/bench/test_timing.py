"""Samples: by turns, and of nothing but the work."""

from collections.abc import Callable, Iterator

from bench import timing
from tests.bench.toys import CPU


def test_samples_are_taken_by_turns(clock: timing.Clock) -> None:
    order = []

    def work(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            clock.let_pass(seconds)

        return run

    works = {"a": work("a", 0.25), "b": work("b", 0.5)}
    samples = timing.by_turns(works, CPU, seconds=2.0, least=2, most=100)
    assert samples == {"a": [0.25] * 3, "b": [0.5] * 3}  # 0.75 s a round, until 2 s have passed
    assert order == ["a", "b"] * 4  # the first is not counted


def test_what_is_made_for_a_sample_is_made_outside_the_clock(clock: timing.Clock) -> None:
    made: Iterator[int] = iter(range(100))
    used = []

    def prepare() -> int:
        clock.let_pass(10.0)
        return next(made)

    def work(given: int) -> None:
        used.append(given)
        clock.let_pass(0.5)

    samples = timing.by_turns({"staged": timing.Staged(prepare, work)}, CPU, seconds=0, least=4)
    assert samples == {"staged": [0.5] * 4}
    assert used == [0, 1, 2, 3, 4]  # a new one each time
