"""interp-steer: steer large language models without fine-tuning, and study what steering does.

The public names, imported when first used, so that `import interp_steer` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from interp_steer.steering import encoder as _encoder

__version__ = "0.1.0"

if TYPE_CHECKING:
    from interp_steer.engine.engine import Engine
    from interp_steer.engine.hooks import fwd_hooks, run_with_cache
    from interp_steer.engine.row import Result, Results, Row, Sampling, Score, record
    from interp_steer.engine.stepper import Event, Stepper
    from interp_steer.errors import RequestError, RunError, SteerError, SteerWarning
    from interp_steer.features.feature import feature
    from interp_steer.features.sae import Sae, SaeStore
    from interp_steer.model.model import SteeringModel
    from interp_steer.model.site import Site
    from interp_steer.prompts.file import PromptFile, read_items, read_prompts
    from interp_steer.prompts.item import Item
    from interp_steer.prompts.parts import split_items
    from interp_steer.prompts.prompt import Encoded, chat
    from interp_steer.report.run import Run
    from interp_steer.results.words import names
    from interp_steer.steering.contrast import Contrast, act_add
    from interp_steer.steering.direction import Direction, DirectionSet, load
    from interp_steer.steering.directions import Directions
    from interp_steer.steering.grammar import parse, steer
    from interp_steer.steering.intervention import Gate, Intervention, Scope, line, resolve
    from interp_steer.steering.scale import Scale
    from interp_steer.steering.spread import Spread, spread
    from interp_steer.study.cell import Controls
    from interp_steer.study.metrics import Measured, metric, rep3, surprise
    from interp_steer.study.study import Study

_HOME = {
    "study.cell": ("Controls",),
    "steering.contrast": ("Contrast", "act_add"),
    "steering.direction": ("Direction", "DirectionSet", "load"),
    "steering.directions": ("Directions",),
    "steering.grammar": ("parse", "steer"),
    "engine.engine": ("Engine",),
    "errors": ("RequestError", "RunError", "SteerError", "SteerWarning"),
    "features.feature": ("feature",),
    "engine.hooks": ("fwd_hooks", "run_with_cache"),
    "steering.intervention": ("Gate", "Intervention", "Scope", "line", "resolve"),
    "prompts.item": ("Item",),
    "study.metrics": ("Measured", "metric", "rep3", "surprise"),
    "model.model": ("SteeringModel",),
    "prompts.parts": ("split_items",),
    "prompts.prompt": ("Encoded", "chat"),
    "prompts.file": ("PromptFile", "read_items", "read_prompts"),
    "engine.row": ("Result", "Results", "Row", "Sampling", "Score", "record"),
    "report.run": ("Run",),
    "features.sae": ("Sae", "SaeStore"),
    "steering.scale": ("Scale",),
    "steering.spread": ("Spread", "spread"),
    "model.site": ("Site",),
    "engine.stepper": ("Event", "Stepper"),
    "study.study": ("Study",),
    "results.words": ("names",),
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
    "Results",
    "Row",
    "Run",
    "RunError",
    "Sae",
    "SaeStore",
    "Sampling",
    "Scale",
    "Scope",
    "Score",
    "Site",
    "Spread",
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
    "spread",
    "steer",
    "surprise",
]


def _features() -> _encoder.Features:
    """What is known of SAEs: steering and the engine ask for it and do not import it."""
    from interp_steer.features import at_hand

    return at_hand


_encoder.features = _features


def __getattr__(name: str) -> Any:
    if name not in _FILE:
        raise AttributeError(f"module 'interp_steer' has no attribute {name!r}")
    return getattr(import_module(f"interp_steer.{_FILE[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
