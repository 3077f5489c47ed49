"""A clock for tests: the fixture `clock` puts it in place of the host's."""


class Clock:
    """It shows what it is told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def let_pass(self, seconds: float) -> None:
        self.now += seconds
