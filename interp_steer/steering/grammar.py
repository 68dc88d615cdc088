"""Reads the one-line text of interventions; every error says at which column and what was expected.

interventions = intervention { ";" intervention }
intervention  = operator "(" name {"," name} ["," coefficient] ")" "at" sites ["on" scope]
                ["if" gate]
coefficient   = number [ "dose" | "max" | "raw" | "deg" ]
sites         = group { "+" group }          group = [component] layers
layers        = layer ["-" layer ["/" stride] | "h" head] { "," ... }
scope         = ( "all" | "prompt" | "generated" | "last" | "content"
                | "positions" from "-" to ) ["+first"]
gate          = "cos" "(" name "," [component] layer ")" ( ">" | "<" ) number

Braces, as in `{0.2,0.4}` and `{8-20}`, make many lines of one text: see `spread`.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NoReturn, TypeVar

from interp_steer.errors import RequestError, nearest
from interp_steer.model.site import COMPONENTS, Site
from interp_steer.steering.direction import is_name
from interp_steer.steering.intervention import OPERATORS, SCOPES, Gate, Intervention, Scope, Vector
from interp_steer.steering.spread import spread

T = TypeVar("T")
UNITS = ("dose", "max", "raw", "deg")

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[+-]?(?:nan|inf)\b"
_NAME = r"[\w./~+-]+(?:@[0-9a-f]{8})?"


class Reader:
    """Reads one text from left to right."""

    def __init__(self, text: str, directions: Mapping[str, Vector] | None = None) -> None:
        # not `directions or {}`: a mapping of files may list none and still find one by its path
        self.directions = {} if directions is None else directions
        self.text, self.cursor = text, 0

    def only(self, part: "Callable[[Reader], T]") -> T:
        """Reads one part that must be the whole text."""
        found = part(self)
        if self.peek(r"\S") is not None:
            self.fail("the end")
        return found

    def peek(self, pattern: str) -> str | None:
        """The text at the cursor that matches, after spaces."""
        found = re.compile(r"\s*(" + pattern + ")").match(self.text, self.cursor)
        return found.group(1) if found else None

    def take(self, pattern: str) -> str | None:
        """The same, and moves past it."""
        found = re.compile(r"\s*(" + pattern + ")").match(self.text, self.cursor)
        if not found:
            return None
        self.cursor = found.end()
        return found.group(1)

    def need(self, pattern: str, what: str) -> str:
        """The same, or an error that names what was expected."""
        found = self.take(pattern)
        return self.fail(what) if found is None else found

    def fail(self, expected: str) -> NoReturn:
        """Says where reading stopped and what was expected there."""
        rest = self.text[self.cursor :].lstrip()
        column = len(self.text) - len(rest) + 1
        shown = f"found {rest[:12]!r}" if rest else "the text ends"
        raise RequestError(
            f"cannot read {self.text!r} at column {column}: expected {expected}, {shown}"
        )

    def interventions(self) -> tuple[Intervention, ...]:
        found = [self.intervention()]
        while self.take(";"):
            found.append(self.intervention())
        return tuple(found)

    def intervention(self) -> Intervention:
        operator = self.need(r"\w+", "an operator such as 'add'")
        if operator not in OPERATORS:
            self.cursor -= len(operator)
            self.fail(f"an operator{_nearest(operator, OPERATORS)}")
        count, units = OPERATORS[operator]
        self.need(r"\(", "'('")
        directions = [self.name()]
        for _ in range(count - 1):
            self.need(",", "',' and a second direction")
            directions.append(self.name())
        value, unit = 0.0, ""
        if units:
            self.need(",", "',' and a coefficient")
            value, unit = self.coefficient(units)
            if unit not in units:
                self.fail(f"the unit {' or '.join(u for u in units if u)} before ')'")
        self.need(r"\)", "')'")
        self.need(r"at\b", "'at' and a site")
        sites = self.sites()
        scope = self.scope() if self.take(r"on\b") else Scope()
        gate = self.gate() if self.take(r"if\b") else None
        return Intervention(operator, tuple(directions), value, unit, sites, scope, gate)

    def name(self) -> Vector:
        start = self.cursor
        written = self.need(_NAME, "the name of a direction")
        name, _, sha = written.partition("@")
        try:
            found = self.directions[name]
        except KeyError:
            column = len(self.text) - len(self.text[start:].lstrip()) + 1
            raise RequestError(
                f"unknown direction {name!r} in {self.text!r} at column {column}"
                f"{nearest(name, self.directions)}"
            ) from None
        if sha and found.sha != sha:
            raise RequestError(f"{written} is asked for, but the {name} at hand is {found.label}")
        return found.named(name) if is_name(name) else found

    def coefficient(self, units: Sequence[str] = UNITS) -> tuple[float, str]:
        number = float(self.need(_NUMBER, "a number"))
        unit = self.take(rf"(?:{'|'.join(UNITS)})\b") or ""
        if not unit and (word := self.peek(r"(?!at\b)[a-z]+")):
            known = [u for u in units if u]
            self.fail(f"the unit {' or '.join(known)}{_nearest(word, known)}")
        return number, unit

    def sites(self) -> tuple[Site, ...]:
        found = self.group()
        while self.take(r"\+"):
            found += self.group()
        return tuple(found)

    def group(self) -> list[Site]:
        component = self.component()
        found = self.layers(component)
        while self.take(","):
            found += self.layers(component)
        return found

    def component(self) -> str:
        written = self.take(r"[A-Za-z_]\w*")
        if written is not None and written not in COMPONENTS:
            self.cursor -= len(written)
            self.fail(f"a layer or a component{_nearest(written, COMPONENTS)}")
        return written or "resid_post"

    def layers(self, component: str) -> list[Site]:
        first = int(self.need(r"\d{1,9}", "a layer"))
        if self.take("h"):
            return [Site(component, first, int(self.need(r"\d{1,9}", "a head")))]
        last = int(self.need(r"\d{1,9}", "a layer")) if self.take("-") else first
        if last - first >= 1000:
            raise RequestError(f"layers {first}-{last} are more than any model has")
        if last < first:
            raise RequestError(f"layers {first}-{last} are not a range: give the lower one first")
        stride = 1
        if last > first and self.take("/"):
            stride = int(self.need(r"[1-9]\d{0,8}", "a stride of 1 or more"))
        return [Site(component, layer) for layer in range(first, last + 1, stride)]

    def scope(self) -> Scope:
        kind = self.need(r"[a-z]+", "a scope: " + ", ".join(SCOPES))
        if kind not in SCOPES:
            self.cursor -= len(kind)
            self.fail(f"a scope{_nearest(kind, SCOPES)}")
        begin = end = 0
        if kind == "positions":
            begin = int(self.need(r"\d{1,9}", "a position"))
            end = int(self.need(r"\d{1,9}", "a position")) if self.take("-") else begin
        return Scope(kind, begin, end, self.take(r"\+\s*first\b") is not None)

    def gate(self) -> Gate:
        self.need(r"cos\b", "'cos(direction, site)'")
        self.need(r"\(", "'('")
        direction = self.name()
        self.need(",", "',' and a site")
        component = self.component()
        site = self.layers(component)
        if len(site) > 1:
            self.fail("one layer")
        self.need(r"\)", "')'")
        sign = self.need("[<>]", "'>' or '<'")
        return Gate(direction, site[0], sign == ">", float(self.need(_NUMBER, "a threshold")))


def _nearest(given: str, choices: Iterable[str]) -> str:
    """The choices most like what was given, within a sentence."""
    return nearest(given, choices).replace(";", ",")


def steer(
    operator: str,
    *directions: Vector,
    coefficient: float | str = 0.0,
    at: int | str | Sequence[int | Site],
    on: str = "all",
    gate: Gate | None = None,
) -> Intervention:
    """An intervention from Python, with the texts of the line grammar for its parts.

    Args:
        operator: a key of `OPERATORS`.
        directions: one; two for `rotate` and `angular`.
        coefficient: a number, or text with a unit: `"0.35 dose"`, `"2 max"`, `"2 raw"`,
            `"30 deg"`.
        at: a layer, sites as text (`"14-16"`, `"z 15h3"`), or several layers or `Site`s.
        on: the scope as text.
        gate: a condition on the prompt.

    Example:
        `steer("add", eiffel, coefficient="0.35 dose", at=15, on="generated")`
    """
    value, unit = Reader(str(coefficient)).only(Reader.coefficient)
    if isinstance(at, (int, str)):
        sites = Reader(str(at)).only(Reader.sites)
    else:
        sites = tuple(s if isinstance(s, Site) else Site("resid_post", s) for s in at)
    return Intervention(
        operator, directions, value, unit, sites, Reader(on).only(Reader.scope), gate
    )


def parse(text: str, directions: Mapping[str, Vector]) -> tuple[Intervention, ...]:
    """Reads interventions, separated by `;`, in order.

    Args:
        text: lines as in the module's examples; "" is no intervention.
        directions: what the names mean. `name@sha8` must have that content.

    Raises:
        RequestError: the text cannot be read (it says where), a name is unknown, or braces make
            several lines of it.
    """
    if not text.strip():
        return ()
    if "{" in text or "}" in text:
        count = len(spread(text).lines)
        raise RequestError(
            f"{text!r} has braces and stands for {count} line{'s' * (count > 1)}, and one is "
            "expected; `spread(text).lines` gives each"
        )
    return Reader(text, directions).only(Reader.interventions)
