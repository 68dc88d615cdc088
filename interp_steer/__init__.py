"""interp-steer: steer large language models without fine-tuning, and study what steering does.

The public names, imported when first used, so that `import interp_steer` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "RequestError": "errors",
    "RunError": "errors",
    "SteerError": "errors",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"interp_steer.{_HOME[name]}"), name)
    raise AttributeError(f"module 'interp_steer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


if TYPE_CHECKING:
    from interp_steer.errors import RequestError as RequestError
    from interp_steer.errors import RunError as RunError
    from interp_steer.errors import SteerError as SteerError
