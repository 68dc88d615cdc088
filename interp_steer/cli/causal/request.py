"""What `interp-steer ablate` is asked, checked before a model is loaded."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from interp_steer.cli.common import at_least_one, indices, writable
from interp_steer.errors import RequestError, nearest

if TYPE_CHECKING:
    from interp_steer.prompts.file import PromptFile
    from interp_steer.steering.intervention import Vector

# the options that each of the four things takes; those of all are left out
TAKES = {
    "ablation": (
        "prompts", "component", "method", "span", "width", "layers", "heads", "direction", "score",
        "word", "answer", "first", "text", "batch",
    ),
    "--patch": ("prompts", "component", "layers", "heads", "positions", "text", "batch"),
    "--mediate": ("run", "component", "heads", "score", "word", "answer", "batch"),
    "--propagate": ("run", "lens", "batch"),
}  # fmt: skip
EVERYWHERE = ("out", "plot", "model", "as_json", "dtype", "device")
FILES = {"out": (".csv", ".parquet"), "plot": (".png", ".svg")}


@dataclass(frozen=True)
class Request:
    """The options that were given, by name, and which of the four things is asked for."""

    kind: str
    given: Mapping[str, Any]
    vector: "Vector | None" = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Request":
        """Raises RequestError for whatever cannot be done."""
        from interp_steer.model.loading import glance
        from interp_steer.model.site import Site

        unset = (None, False)  # and not 0, which equals False
        given = {k: v for k, v in options.items() if not any(v is one for one in unset) and v != []}
        asked = [name for name in ("patch", "mediate", "propagate") if given.pop(name, False)]
        if len(asked) > 1:
            raise RequestError("--patch, --mediate and --propagate are three things; give one")
        kind = f"--{asked[0]}" if asked else "ablation"
        takes = TAKES[kind]
        if ("run" in given) != ("run" in takes):
            raise RequestError("--mediate and --propagate take a run's folder; nothing else does")
        for name in given:
            if name not in (*takes, *EVERYWHERE):
                others = ", ".join(_option(one) for one in takes if one != "run")
                raise RequestError(f"{_option(name)} does nothing with {kind}; it takes {others}")
        if "prompts" in takes and "prompts" not in given:
            raise RequestError("nothing to ablate on: give --prompts, or a run with --mediate")
        for name, suffixes in FILES.items():
            if name in given:
                writable(_option(name), given[name], suffixes, new_folders=True)
        at_least_one(**{name: given.get(name) for name in ("width", "answer", "batch")})
        request = cls(kind, given, _vector(given.get("direction")))
        _ = request.layers, request.heads, request.positions  # each raises
        if "run" not in given and (bounds := glance(str(given.get("model", "starter")))):
            for layer in request.layers or ():
                bounds.check(Site("resid_post", layer), bounds.d_model)
            for head in request.heads or ():
                bounds.check(Site("z", 0, head), bounds.d_head)
        {"ablation": request._ablation, "--patch": request._patch}.get(kind, request._traced)()
        return request

    def many(self, name: str, default: Sequence[str] = ()) -> list[str]:
        """A repeated option."""
        return list(self.given.get(name, default))

    @cached_property
    def prompts(self) -> "PromptFile":
        """What `--prompts` names, read once."""
        from interp_steer.prompts.file import PromptFile

        return PromptFile.read(self.given["prompts"])

    @property
    def layers(self) -> list[int] | None:
        """None for all."""
        return self._indices("layers")

    @property
    def heads(self) -> list[int] | None:
        """None for all."""
        return self._indices("heads")

    def _indices(self, name: str) -> list[int] | None:
        return indices(name, self.given[name]) if name in self.given else None

    @property
    def positions(self) -> str | list[int]:
        """Of patching: `each`, `all`, `last`, or numbers, negative ones from the end."""
        text = str(self.given.get("positions", "each")).strip()
        if not re.search(r"\d", text):
            return text
        return indices("positions", text.replace("last", "-1"), "-?")

    def _ablation(self) -> None:
        from interp_steer.causal import ablate as ablation

        components = self.many("component", ablation.COMPONENTS_OF_A_BLOCK)
        methods, span = self.many("method", ["zero"]), self.given.get("span", "layer")
        try:
            ablation.check(components, methods, span, self.vector)
        except RequestError as error:
            hint = "; give --direction" if "needs a vector" in str(error) else ""
            raise RequestError(f"{error}{hint}") from None
        used = {"direction", "feature"} & set(components) or "directional" in methods
        for name, useful, what in (
            ("direction", used, "component direction or feature, or method directional"),
            ("width", span == "window", "--span window"),
            ("heads", "z" in components, "component z"),
        ):
            if name in self.given and not useful:
                raise RequestError(f"{_option(name)} is for {what}")
        self._scores(self.prompts.items(), "word" in self.given)

    def _patch(self) -> None:
        from interp_steer.causal import patch as patching

        components = self.many("component", ["resid_pre"])
        if "heads" in self.given and "z" not in components:
            raise RequestError("--heads is for component z")
        patching.check(self.prompts.items(), components, self.positions)

    def _traced(self) -> None:
        from interp_steer.causal import trace as tracing
        from interp_steer.causal.branch import check_names

        if "lens" in self.given and not self.given["lens"].is_file():
            raise RequestError(f"no lens file {self.given['lens']}")
        components = self.many("component", ["attn_out", "mlp_out"])
        check_names("component", components, tracing.RESTORED)
        if "heads" in self.given and "z" not in components:
            raise RequestError("--heads is for component z")
        if len(self.many("score")) > 1:
            raise RequestError("--mediate takes one --score: shares are of one effect")
        self._scores([], True)

    def _scores(self, items: Sequence[Any], has_words: bool) -> None:
        from interp_steer.causal.branch import check_names
        from interp_steer.causal.scores import SCORES

        scores = self.many("score", SCORES)
        check_names("score", scores, SCORES)
        if "words" in scores and "score" in self.given and not has_words:
            raise RequestError("--score words needs --word: what is looked for")
        for name in ("word", "answer"):
            if name in self.given and not ("words" in scores and has_words):
                raise RequestError(f"{_option(name)} is for --score words")
        if any(not word.strip() for word in self.many("word")):
            raise RequestError("a --word is empty")
        pairs = any(one.positive is not None and one.negative is not None for one in items)
        if items and "score" in self.given and "logit_difference" in scores and not pairs:
            raise RequestError(
                "--score logit_difference needs prompts with answers, positive and negative; "
                f"{self.given['prompts']} has none"
            )


def _option(name: str) -> str:
    return "a run's folder" if name == "run" else f"--{name.removeprefix('as_')}"


def _vector(name: str | None) -> "Vector | None":
    if name is None:
        return None
    from interp_steer.steering.directions import Directions

    known = Directions([])
    try:
        return known[name]
    except KeyError:
        raise RequestError(f"no direction {name!r}{nearest(name, known)}") from None
