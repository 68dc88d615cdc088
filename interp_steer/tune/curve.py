"""Where a curve of damage against dose first crosses a target, in few evaluations.

KL grows as the dose's square where the dose is small, and flattens later: on logarithmic axes it is
nearly straight. So the next dose is where the straight line between the bracket's ends crosses,

    ln d = (ln d_0 f_1 - ln d_1 f_0) / (f_1 - f_0),   f_i = ln(KL_i / target)

and an end that survives twice has its f halved (Illinois: Dowell and Jarratt 1971), so that the
bracket closes from both sides.
"""

import itertools
import math
from dataclasses import dataclass, field

DOSES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.1)
"""What is tried first: all at once, so that a curve that goes down again is seen."""
TOLERANCE = 0.1  # |KL / target - 1| that will do
NARROW = 1.02  # ratio of a bracket's ends below which it is not divided further
OUTCOMES = {
    "ok": "the KL is within the tolerance of the target",
    "steep": "the bracket is as narrow as doses are told apart, and the KL is not within tolerance",
    "open": "the batches were used up before",
    "above": "the smallest dose has a larger KL already",
    "below": "no dose reaches the target",
    "no zero": "the operator does something at dose 0, and more than the target",
}


@dataclass
class Curve:
    """Doses that were tried, and the one to try next.

    Attributes:
        target: the KL to be met, in nats, above 0.
        identity: whether the operator leaves the stream as it is at dose 0.
        points: KL by dose.
    """

    target: float
    identity: bool = True
    points: dict[float, float] = field(default_factory=dict)
    _kept: list[int] = field(default_factory=lambda: [0, 0], repr=False)

    def add(self, points: dict[float, float]) -> None:
        """Takes what was measured: the first time a grid, then one dose a time."""
        before = self.bracket
        self.points |= points
        after = self.bracket
        if before and after:
            for end in (0, 1):
                self._kept[end] = self._kept[end] + 1 if before[end] == after[end] else 0

    @property
    def crossings(self) -> list[tuple[float, float]]:
        """Neighbouring doses between which the curve rises through the target, lowest first."""
        doses = sorted(self.points)
        pairs = itertools.pairwise(doses)
        return [(a, b) for a, b in pairs if self.points[a] < self.target <= self.points[b]]

    @property
    def monotone(self) -> bool:
        """Whether it crosses the target once at most."""
        signs = [self.points[dose] >= self.target for dose in sorted(self.points)]
        return sum(a != b for a, b in itertools.pairwise(signs)) <= 1

    @property
    def bracket(self) -> tuple[float, float] | None:
        """The first crossing."""
        return next(iter(self.crossings), None) if self._starts_low else None

    @property
    def _starts_low(self) -> bool:
        return bool(self.points) and self.points[min(self.points)] < self.target

    @property
    def best(self) -> float | None:
        """The dose to take: of the first crossing's ends the nearer one by ln KL, or one that
        meets the target; None where there is none.
        """
        if self.bracket:
            return min(self.bracket, key=self._off)
        first = min(self.points) if self.points else None
        return first if first is not None and self._meets(first) else None

    def _off(self, dose: float) -> float:
        return abs(math.log(max(self.points[dose], 1e-12) / self.target))

    def _meets(self, dose: float) -> bool:
        return abs(self.points[dose] / self.target - 1) <= TOLERANCE

    @property
    def outcome(self) -> str:
        """A key of `OUTCOMES`; "open" as long as `next` has a dose."""
        best = self.best
        if best is not None and self._meets(best):
            return "ok"
        if not self.points:
            return "open"
        if not self._starts_low:
            return "above" if self.identity else "no zero"
        if self.bracket is None:
            return "below"
        low, high = self.bracket
        return "steep" if high / low < NARROW else "open"

    @property
    def next(self) -> float | None:
        """The dose to try; None where that is settled."""
        if self.outcome != "open" or self.bracket is None:
            return None
        low, high = self.bracket
        f = [math.log(max(self.points[end], 1e-12) / self.target) for end in (low, high)]
        f = [value / 2 ** max(0, kept - 1) for value, kept in zip(f, self._kept, strict=True)]
        a, b = math.log(low), math.log(high)
        x = (a * f[1] - b * f[0]) / (f[1] - f[0]) if f[1] > f[0] else (a + b) / 2
        inside = a + 0.01 * (b - a) < x < b - 0.01 * (b - a)
        return float(f"{math.exp(x if inside else (a + b) / 2):.5g}")
