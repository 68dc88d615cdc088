"""The walls of the house: who may import whom.

Imports inside functions and for types count. Only a library that is named for its types alone is
free, as that loads nothing.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# each package may import what stands after it; from `labels` on nothing needs a model
ORDER = (
    *("cli", "serve", "export", "tune", "study", "causal", "features", "engine", "steering"),
    *("model", "labels", "report", "results", "prompts", "stats", "util", "errors"),
)
NO_TORCH = ("report", "results", "prompts", "stats")
TORCH = {"torch", "transformers", "transformer_lens", "sae_lens", "safetensors"}
ALONE = {  # library: the only packages or modules that may import it
    "transformer_lens": ("model.hooked", "engine.hooks", "engine.verify"),
    "sae_lens": ("features",),
    "requests": ("labels",),
    "matplotlib": ("report", "cli"),
    "typer": ("cli",),
    "prompt_toolkit": ("cli",),
    "rich": ("cli", "util"),
    "ray": ("study",),
    "fastapi": ("serve",),
    "starlette": ("serve",),
    "pydantic": ("serve",),
    "uvicorn": ("cli",),
    "gguf": ("export", "model"),
    "transformers": ("model", "engine.verify", "labels.semantic"),
}


def modules(root: Path) -> dict[str, Path]:
    """`package.module` -> file; a package itself is its `__init__`."""
    house = root / "interp_steer"
    found = {}
    for path in house.rglob("*.py"):
        parts = path.relative_to(house).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> tuple[set[str], set[str]]:
    """(modules of this package, names of libraries) that a file imports, anywhere in it."""
    own, libraries = set(), set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guards = [n for n in ast.walk(tree) if isinstance(n, ast.If)]
    types = {m for n in guards if ast.unparse(n.test) == "TYPE_CHECKING" for m in ast.walk(n)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are written in full"
            named = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in named:
            top, _, rest = name.partition(".")
            if top != "interp_steer":
                libraries |= {top} - ({top} if node in types else set())
                continue
            while rest and rest not in known:  # a name inside a module
                rest = rest.rpartition(".")[0]
            own.add(rest)
    return own, libraries


def wrong(root: Path) -> list[str]:
    """Every import that breaks a rule."""
    known = modules(root)
    edges, told = {}, []
    for name, path in known.items():
        package = name.partition(".")[0]
        own, libraries = imports(path, known)
        if package in ("", "__main__"):  # the public face may name every package
            continue
        edges[name] = own
        told += [f"{name} is in no package"] if package not in ORDER else []
        for other in own:
            room = other.partition(".")[0]
            if not room:
                told.append(f"{name} imports the public face")
            elif package in ORDER and ORDER.index(room) < ORDER.index(package):
                told.append(f"{name} imports {other}, which stands above it")
        if package in NO_TORCH and (heavy := libraries & TORCH):
            told.append(f"{name} imports {', '.join(sorted(heavy))}")
        for library, homes in ALONE.items():
            if library in libraries and not {name, package} & set(homes):
                told.append(f"{name} imports {library}")
    return told + [f"a cycle: {' -> '.join(cycle)}" for cycle in cycles(edges)]


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """One cycle of modules for each module that first closes one."""
    found, done = [], set()

    def walk(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for other in sorted(edges.get(name, ())):
                walk(other, [*path, name])
            done.add(name)

    for name in sorted(edges):
        walk(name, [])
    return found


def test_imports_point_down():
    assert wrong(ROOT) == []


@pytest.mark.parametrize(
    "module, line, expected",
    [
        ("engine/bank.py", "import interp_steer.features.sae", "engine.bank imports features.sae"),
        ("report/report.py", "def f():\n    import torch", "report.report imports torch"),
        ("stats/new.py", "from interp_steer.stats import new", "a cycle: stats.new -> stats.new"),
        ("study/new.py", "from interp_steer import Study", "study.new imports the public face"),
        ("model/new.py", "import transformer_lens", "model.new imports transformer_lens"),
        ("steering/new.py", "from transformers import x", "steering.new imports transformers"),
        ("new/new.py", "", "new.new is in no package"),
    ],
)
def test_a_wall_that_is_broken_is_named(tmp_path, module, line, expected):
    house = tmp_path / "interp_steer"
    for name in modules(ROOT).values():
        copy = house / name.relative_to(ROOT / "interp_steer")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(name.read_bytes())
    file = house / module
    file.parent.mkdir(exist_ok=True)
    before = file.read_text() if file.exists() else ""
    file.write_text(f"{before}\n{line}\n")
    assert any(told.startswith(expected) for told in wrong(tmp_path)), wrong(tmp_path)
