"""Feature labels: what each feature is said to mean, synced once, searched offline.

    store       Store: labels in SQLite, with their index (schema)
    searching   `search`, `show`, `coverage`: what is here
    semantic    search by meaning
    syncing     `sync`, `fetch`, `import_files`, `pack`: what comes in and goes out
    client      Client: Neuronpedia over HTTP (http, exports)
    rows        lines of export files, unpacked and checked
    label       Label, Feature, Source, Coverage: values
    registry    what SAELens's registry says of every pretrained SAE
    naming      the names that people give sources

Start at `labels.search("Paris")`. The public names are imported when first used: search needs
neither torch nor the network.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# The modules are not called `sync` and `search`: a submodule would hide the function of its name.
_HOME = {
    "Client": "client",
    "Coverage": "label",
    "Feature": "label",
    "Label": "label",
    "Store": "store",
    "coverage": "searching",
    "fetch": "syncing",
    "import_files": "syncing",
    "pack": "syncing",
    "search": "searching",
    "show": "searching",
    "sync": "syncing",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"interp_steer.labels.{_HOME[name]}"), name)
    raise AttributeError(f"module 'interp_steer.labels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from interp_steer.labels.client import Client as Client
    from interp_steer.labels.label import Coverage as Coverage
    from interp_steer.labels.label import Feature as Feature
    from interp_steer.labels.label import Label as Label
    from interp_steer.labels.searching import coverage as coverage
    from interp_steer.labels.searching import search as search
    from interp_steer.labels.searching import show as show
    from interp_steer.labels.store import Store as Store
    from interp_steer.labels.syncing import fetch as fetch
    from interp_steer.labels.syncing import import_files as import_files
    from interp_steer.labels.syncing import pack as pack
    from interp_steer.labels.syncing import sync as sync
