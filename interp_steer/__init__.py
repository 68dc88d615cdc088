"""interp-steer: steer large language models without fine-tuning, and study what steering does.

The public names, imported when first used, so that `import interp_steer` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from interp_steer.cell import Controls
    from interp_steer.contrast import Contrast, act_add
    from interp_steer.direction import Direction, Directions, DirectionSet, load
    from interp_steer.engine import Engine
    from interp_steer.errors import RequestError, RunError, SteerError, SteerWarning
    from interp_steer.features import feature
    from interp_steer.hooks import fwd_hooks, run_with_cache
    from interp_steer.intervention import (
        Gate,
        Intervention,
        Scope,
        line,
        parse,
        resolve,
        steer,
    )
    from interp_steer.item import Item
    from interp_steer.metrics import Measured, metric, rep3, surprise
    from interp_steer.model import SteeringModel
    from interp_steer.parts import split_items
    from interp_steer.prompt import Encoded, chat
    from interp_steer.prompt_file import PromptFile, read_items, read_prompts
    from interp_steer.row import Result, Row, Sampling, Score, record
    from interp_steer.runs import Run
    from interp_steer.sae import Sae
    from interp_steer.scale import Scale
    from interp_steer.site import Site
    from interp_steer.stepper import Event, Stepper
    from interp_steer.study import Study
    from interp_steer.words import names

_HOME = {
    "cell": ("Controls",),
    "contrast": ("Contrast", "act_add"),
    "direction": ("Direction", "DirectionSet", "Directions", "load"),
    "engine": ("Engine",),
    "errors": ("RequestError", "RunError", "SteerError", "SteerWarning"),
    "features": ("feature",),
    "hooks": ("fwd_hooks", "run_with_cache"),
    "intervention": ("Gate", "Intervention", "Scope", "line", "parse", "resolve", "steer"),
    "item": ("Item",),
    "metrics": ("Measured", "metric", "rep3", "surprise"),
    "model": ("SteeringModel",),
    "parts": ("split_items",),
    "prompt": ("Encoded", "chat"),
    "prompt_file": ("PromptFile", "read_items", "read_prompts"),
    "row": ("Result", "Row", "Sampling", "Score", "record"),
    "runs": ("Run",),
    "sae": ("Sae",),
    "scale": ("Scale",),
    "site": ("Site",),
    "stepper": ("Event", "Stepper"),
    "study": ("Study",),
    "words": ("names",),
}
_FILE = {name: file for file, members in _HOME.items() for name in members}

__all__ = [
    "Contrast",
    "Controls",
    "Direction",
    "DirectionSet",
    "Directions",
    "Encoded",
    "Engine",
    "Event",
    "Gate",
    "Intervention",
    "Item",
    "Measured",
    "PromptFile",
    "RequestError",
    "Result",
    "Row",
    "Run",
    "RunError",
    "Sae",
    "Sampling",
    "Scale",
    "Scope",
    "Score",
    "Site",
    "SteerError",
    "SteerWarning",
    "SteeringModel",
    "Stepper",
    "Study",
    "act_add",
    "chat",
    "feature",
    "fwd_hooks",
    "line",
    "load",
    "metric",
    "names",
    "parse",
    "read_items",
    "read_prompts",
    "record",
    "rep3",
    "resolve",
    "run_with_cache",
    "split_items",
    "steer",
    "surprise",
]


def __getattr__(name: str) -> Any:
    if name not in _FILE:
        raise AttributeError(f"module 'interp_steer' has no attribute {name!r}")
    return getattr(import_module(f"interp_steer.{_FILE[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
