"""What may come next in a command that is being typed, for bash, zsh and fish.

A shell asks at every press of the tab key, so nothing heavy is imported: choices that the code
below knows from modules with torch stand here once more, and a test compares them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from interp_steer.errors import RequestError, nearest
from interp_steer.util.files import cache_dir

Item = tuple[str, str]
"""A word that may come next, and what it is."""

SCRIPTS = {
    "bash": """_interp_steer() {
    local IFS=$'\\n'
    COMPREPLY=($("$1" --complete bash "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o bashdefault -o default -F _interp_steer interp-steer""",
    "zsh": """#compdef interp-steer
_interp_steer() {
    local answer
    answer="$("${words[1]}" --complete zsh "${(@)words[2,CURRENT]}" 2>/dev/null)"
    local -a found=("${(@f)answer}")
    if [[ -n "$answer" ]]; then _describe 'interp-steer' found; else _files; fi
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _interp_steer interp-steer""",
    "fish": """function __interp_steer
    set -l tokens (commandline -opc)
    set -l answer ($tokens[1] --complete fish $tokens[2..-1] (commandline -ct) 2>/dev/null)
    if count $answer >/dev/null
        printf '%s\\n' $answer
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c interp-steer -f -a '(__interp_steer)'""",
}
TOP = {
    "--help": "show the commands",
    "--version": "show the version",
    "--completion": "print what switches on completion",
}
CHOICES = {
    "--dtype": ("float32", "bfloat16", "float16"),
    "--device": ("cpu", "cuda:0"),
    "--method": ("mean-difference", "principal-component", "logistic-probe", "actadd"),
    "--position": ("mean", "last", "answer"),
}
"""Values of options that mean the same in every command."""
NAMED = {("direction", "show")}
"""Commands whose argument is a stored direction."""


def script(shell: str) -> str:
    """What a shell reads to complete `interp-steer`; raises RequestError for other shells."""
    if shell not in SCRIPTS:
        raise RequestError(f"no completion for the shell {shell!r}{nearest(shell, SCRIPTS)}")
    return SCRIPTS[shell]


def answer(
    shell: str,
    words: Sequence[str],
    commands: Mapping[str, tuple[str, str]],
    made: Callable[[str], Any],
) -> list[str]:
    """The lines that answer a shell, none where files may follow.

    Args:
        words: what is typed after the program's name; the last one is not finished, perhaps "".
        commands: name -> (place, sentence).
        made: a command of that name, as typer makes it.
    """
    words = list(words) or [""]
    if shell == "bash":
        words = _joined(words)
    *before, current = words
    name, sign, value = current.partition("=")
    if sign and name.startswith("--"):  # --option=value in one word
        before, current = [*before, name], value
    lead = f"{name}=" if sign and name.startswith("--") else ""
    found = [one for one in _next(before, current, commands, made) if one[0].startswith(current)]
    return [_line(shell, lead + word, about) for word, about in found]


def _joined(words: list[str]) -> list[str]:
    """Bash parts `--option=value` in three words and completes the last one alone."""
    *before, current = words
    return [*(word for word in before if word != "="), "" if current == "=" else current]


def _line(shell: str, word: str, about: str) -> str:
    about = " ".join(about.split())
    if shell == "bash" or not about:
        return word
    return f"{word.replace(':', chr(92) + ':')}:{about}" if shell == "zsh" else f"{word}\t{about}"


def _next(
    before: list[str],
    current: str,
    commands: Mapping[str, tuple[str, str]],
    made: Callable[[str], Any],
) -> Iterator[Item]:
    """What may stand where `current` does, whatever its beginning."""
    if not before:
        if current.startswith("-"):
            yield from TOP.items()
        else:
            yield from ((name, about) for name, (_, about) in commands.items())
        return
    if before[0] not in commands:
        if before == ["--completion"]:
            yield from ((shell, "") for shell in SCRIPTS)
        return
    command, path, rest = made(before[0]), before[:1], before[1:]
    members: Mapping[str, Any] | None = getattr(command, "commands", None)
    if members is not None:
        if not rest and not current.startswith("-"):
            yield from ((name, one.get_short_help_str(80)) for name, one in members.items())
            return
        if rest and rest[0] not in members:
            return
        if rest:
            command, path, rest = members[rest[0]], [*path, rest[0]], rest[1:]
    options = [one for one in command.params if one.param_type_name == "option"]
    asked = {name: one for one in options for name in (*one.opts, *one.secondary_opts)}
    if rest and (last := asked.get(rest[-1])) is not None and not last.is_flag:
        yield from _values(rest[-1])
        return
    arguments = len(options) < len(command.params)
    if current.startswith("-") or (not current and not arguments):
        for one in options:
            names = (*one.opts, *one.secondary_opts)
            if not one.hidden and (one.multiple or not set(names) & set(rest)):
                yield from ((name, one.help or "") for name in names)
        yield "--help", "show what the command does"
    elif tuple(path) in NAMED:
        yield from ((name, "stored direction") for name in _stored())


def _values(option: str) -> Iterator[Item]:
    """Values of an option; none where it takes a file or free text."""
    if option == "--model":
        yield "starter", "the model that comes with the package"
    yield from ((value, "") for value in CHOICES.get(option, ()))


def _stored() -> list[str]:
    return sorted(path.stem for path in cache_dir("directions").glob("*.safetensors"))
