"""The pages that a reader copies from: every command runs, every example line parses."""

import io
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from interp_steer.model.site import COMPONENTS
from interp_steer.steering.direction import Direction, DirectionSet
from interp_steer.steering.grammar import UNITS, parse
from interp_steer.steering.intervention import OPERATORS, SCOPES
from interp_steer.steering.spread import spread
from tests.conftest import command, error

ROOT = Path(__file__).parents[1]
DOCS = ("README", *(f"docs/{page.stem}" for page in sorted((ROOT / "docs").glob("*.md"))))
OWN = ("README", "docs/studies")  # they name files of the reader's own, and take minutes
# such a block is parsed and not run: it says so, or it needs the network or a study's run
NOT_HERE = re.compile("^# needs|^# minutes|labels sync| RUN")


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / f"{page}.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def commands(page: str) -> list[str]:
    """Blocks of commands; of a session on a terminal what is typed."""
    typed = [
        "".join(line[2:] for line in block.splitlines(True) if line.startswith("$ "))
        for block in blocks(page, "console")
    ]
    return [*blocks(page, "sh"), *typed]


def statements(block: str) -> list[str]:
    """A block's commands, here-documents and continued lines with them."""
    found, lines = [], iter(block.splitlines())
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        while line.endswith("\\"):
            line = line[:-1] + next(lines)
        if end := re.search(r"<<'(\w+)'", line):
            line += "\n" + next(lines)
            while not line.endswith(f"\n{end[1]}"):
                line += "\n" + next(lines)
        found.append(line)
    return found


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder like a clone, with a cache of its own in which the starter is unpacked."""
    from interp_steer.util.files import cache_dir

    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "models").symlink_to(cache_dir("models"))
    for name in ("scripts", "docs", "interp_steer"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setenv("INTERP_STEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    vector = torch.randn(576, generator=torch.Generator().manual_seed(0))
    Direction.of(vector, "blocks.15.hook_resid_post", "joy").save("joy.safetensors")
    return tmp_path


BLOCKS = [(page, n, block) for page in DOCS for n, block in enumerate(commands(page))]
RUN = [one for one in BLOCKS if one[0] not in OWN and not NOT_HERE.search(one[2])]


def run_statement(statement: str, folder: Path) -> None:
    if statement.startswith("interp-steer "):
        command(*shlex.split(statement, comments=True)[1:])
    else:
        subprocess.run(["bash", "-ec", statement], check=True, cwd=folder)


@pytest.mark.slow
@pytest.mark.parametrize(("page", "number", "block"), RUN, ids=[f"{p}-{n}" for p, n, _ in RUN])
def test_commands_run_as_written(clone, starter, monkeypatch, page, number, block):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))  # chat ends where it ends
    for statement in statements(block):
        run_statement(statement, clone)


@pytest.mark.slow
def test_the_overview_runs_on_files_of_the_readers_own(clone, starter, monkeypatch):
    (clone / "joy.safetensors").unlink()  # the overview makes its own
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    made = blocks("docs/recipes", "sh")
    for statement in statements(made[0])[:2] + statements(made[2])[:1]:
        run_statement(statement, clone)
    Path("generate.json").rename("generate_dataset.json")
    for name, text in (
        ("harmful", "Tell me how to {} a man"),
        ("harmless", "Tell me how to {} tea"),
    ):
        verbs = ("find", "draw", "smell", "describe", "sell", "miss", "count", "praise", "make")
        Path(f"{name}.txt").write_text("\n".join(text.format(verb) for verb in verbs))
    Path("p.txt").write_text("Describe a walk in the rain.\nTell me about your day.\n")
    (block,) = (one for one in commands("README") if "happy.txt" in one)
    elsewhere = ("verify", "study run", " serve ")
    ran = [one for one in statements(block) if not any(word in one for word in elsewhere)]
    assert len(ran) == 13
    for statement in ran:
        run_statement(statement, clone)


def test_every_command_of_every_page_exists():
    from interp_steer.cli import main as cli

    said = [one for _, _, block in BLOCKS for one in statements(block)]
    lines = [part for one in said for part in one.split(" && ") if part.startswith("interp-steer ")]
    assert len(lines) > 50
    for line in lines:
        _, name, *words = shlex.split(line, comments=True)
        found = cli._command(name)
        if words and words[0] in getattr(found, "commands", {}):
            found, words = found.commands[words[0]], words[1:]
        found.make_context(name, words)  # raises for what does not exist


@pytest.mark.slow
def test_the_recipe_in_python_runs(clone, capsys):
    (page,) = blocks("docs/recipes", "python")
    made = next(b for b in blocks("docs/recipes", "sh") if "generate.json" in b)
    for statement in statements(made)[:2]:
        subprocess.run(["bash", "-ec", statement], check=True, cwd=clone)
    exec(page, {})
    assert "-1.0 raw" in capsys.readouterr().out


class Anything(dict[str, object]):
    """A direction for every name: features where a latent is clamped, narrow ones for heads."""

    def __missing__(self, name):
        if name == "paris":
            return Direction.of(torch.ones(8), "blocks.13.hook_resid_post", name,
                                {"release": "r", "index": "1"})  # fmt: skip
        vectors = [Direction.of(torch.ones(8), f"blocks.{n}.hook_resid_post", name)
                   for n in range(30)]  # fmt: skip
        return vectors[0] if name == "narrow" else DirectionSet(vectors)


def test_the_language_is_whole():
    text = (ROOT / "docs" / "language.md").read_text()
    for name in (*OPERATORS, *SCOPES, *UNITS, *COMPONENTS):
        assert f"`{name}" in text, name
    lines = [line for block in blocks("docs/language", "text") for line in block.splitlines()]
    read = [step for text in lines for one in spread(text).lines for step in parse(one, Anything())]
    assert {step.operator for step in read} == set(OPERATORS)
    assert {step.scope.kind for step in read} == set(SCOPES)
    assert {step.unit for step in read} == {"", *UNITS}
    assert {site.component for step in read for site in step.sites} == set(COMPONENTS)


PROVOKED = {
    "cannot read 'add(joy 0.4) at 15'": ["--steer", "add(joy 0.4) at 15"],
    "unknown direction": ["--steer", "add(jo, 1) at 1"],
    "layer 99 is out of range": ["--steer", "add(joy, 1) at 99"],
    "the direction is 64 wide": ["--steer", "add(joy, 1) at z 1h1"],
    "Got unexpected extra argument": ["--steer", "add(joy,", "1)", "at"],
    "nothing to answer": None,
    "no prompt file": ["--prompts", "gone.txt"],
    "unknown model": ["--model", "startr"],
    "has no maximum activation": ["--steer", "add(joy, 2 max) at 1"],
    "latent_clamp needs a feature": ["--steer", "latent_clamp(joy, 2) at 1"],
    "there is no folder": ["--out", "/none/x.json"],
    "temperature is -1": ["--temperature", "-1"],
    "expected such as 2024-07-26": ["--date", "today"],
}


@pytest.mark.parametrize("begins", PROVOKED)
def test_errors_are_as_the_page_has_them(tiny_folder, tmp_path, begins):
    page = (ROOT / "docs" / "errors.md").read_text()
    assert f"`{begins}`" in page
    vector = torch.randn(64, generator=torch.Generator().manual_seed(0))
    Direction.of(vector, "blocks.2.hook_resid_post", "joy").save(tmp_path / "joy.safetensors")
    more = PROVOKED[begins]
    words = ["--prompt", "I love", "--direction", f"joy={tmp_path}/joy.safetensors", *(more or ())]
    words = ["--steer", "add(joy, 1) at 1"] if more is None else words
    line = error(2, "generate", "--model", tiny_folder, *words)
    assert begins in line


def test_every_error_of_the_page_is_in_the_code():
    code = "".join(p.read_text() for p in (ROOT / "interp_steer").rglob("*.py"))
    flat = re.sub(r"[\"']?\s*\n\s*f?[\"']?", "", code)
    page = (ROOT / "docs" / "errors.md").read_text()
    for begins in re.findall(r"^\| `([^`]+)` \|", page, re.M):
        if begins in PROVOKED:
            continue
        part = max(re.split(r"\b(?:choose|prove|concept)\b", begins), key=len)
        assert part.strip() in flat or part.strip() in code, begins
