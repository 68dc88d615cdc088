"""What a planned row is to its study: its setting, and the part that it plays."""

import re
from collections.abc import Iterable, Mapping

SETTING = ("direction", "operator", "site", "level", "scope")
Setting = tuple[str, str, str, str, str]
"""Direction, operator, site, level and scope as a study declares them; "" where there is none."""

CAPABILITY = "capability {}"
"""The split of a set of multiple-choice questions, by its name."""
_PLAIN = re.compile(
    r"\s*(?P<operator>\w+)\(\s*(?P<direction>[^\s,;()@]+)(?:@[0-9a-f]{8})?\s*"
    r"(?:,\s*(?P<number>[-+.\deE]+)\s*(?P<unit>[a-z]*)\s*)?\)"
    r"\s*at\s+(?P<site>[^;()]+?)(?:\s+on\s+(?P<scope>[^;()]+?))?\s*"
)
"""A line of interventions that is one intervention of one direction without a condition."""


def declared_in(planned: Mapping[str, object]) -> Setting:
    """The setting of a line of a plan, as it was declared."""
    direction, operator, site, level, scope = (str(planned[part]) for part in SETTING)
    return direction, operator, site, level, scope


def in_parts(settings: Iterable[Setting]) -> dict[Setting, Setting]:
    """Settings that are whole lines of text, as they would be declared in parts.

    `add(joy, 0.4 dose) at 15` has a direction, an operator, a site, a level and the scope `all`. So
    tables and pictures put it in its place by layer and strength. A line that cannot be taken apart
    stays whole, and so do two that would become one.

    Returns:
        Setting as declared -> in parts.
    """
    parted = {setting: _in_parts(setting) for setting in settings}
    found = list(parted.values())
    return {s: p if found.count(p) == 1 else s for s, p in parted.items()}


def _in_parts(setting: Setting) -> Setting:
    line, operator, *_ = setting
    plain = None if operator else _PLAIN.fullmatch(line)
    if plain is None:
        return setting
    level = f"{float(plain['number'])!r} {plain['unit']}".strip() if plain["number"] else ""
    site = plain["site"] if plain["site"][0].isalpha() else f"resid_post {plain['site']}"
    return plain["direction"], plain["operator"], site, level, plain["scope"] or "all"


ROLES = {
    "unsteered": "no intervention",
    "grid": "every setting, on the selection prompts",
    "null_grid": "the same grid with random directions, on the selection prompts",
    "chosen": "the chosen setting, on the held-out prompts",
    "prompted": "a prompt that asks for it in words, without steering, on the held-out prompts",
    "flip": "the chosen setting with the coefficient's sign turned",
    "wrong_layer": "the chosen setting's direction half the model away",
    "random": "random directions of the same norm in the chosen setting",
    "features": "other features of the SAE, alike in density and largest activation",
    "shuffled": "directions from the same prompts with shuffled labels",
    "null": "random directions, each in the setting that it chose for itself",
}
