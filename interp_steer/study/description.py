"""What a run's folder says of its rows: `study.yaml`, `directions/`, `manifest.json`, `plan.jsonl`.

They are written by a run that holds the folder (see `locking`), and always mean rows that are
there. What another study in the same folder says takes their place with its first row, not before.
Shards of one study say the same: one of them writes it, and one that would say something else is
refused while others are at work.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from interp_steer.model.model import SteeringModel
from interp_steer.report.run import read_manifest
from interp_steer.steering.contrast import Contrast
from interp_steer.study.file import declared, stored, write
from interp_steer.study.metrics import METRICS
from interp_steer.study.study import Study
from interp_steer.util.files import explained, whole
from interp_steer.util.locking import briefly

PASSING = ("written_at", "arguments", "earlier")  # of a manifest: they differ at every start
CHANGING = ("versions", "machine", "device")  # what may differ between a folder's rows
WHERE = ("model", "revision", "modules", "question")  # of a study: they decide no row


class Description:
    """What a folder says, and what it shall say for a study.

    Args:
        folder: of the run.
        study: bound to the model.
        manifest: of this start; a folder's first one pins its `threads`.

    Raises:
        RunError: the manifest that is there is damaged.
    """

    def __init__(
        self,
        folder: Path,
        study: Study,
        model: SteeringModel,
        manifest: Mapping[str, Any],
    ) -> None:
        self.folder, self.study, self.model = folder, study, model
        self.before: Mapping[str, Any] = read_manifest(folder) or {}
        pinned = {"threads": self.before["threads"]} if self.before else {}
        self.manifest = {**manifest, **pinned, "study": _identity(study, model)}
        self._begun = False

    @property
    def same(self) -> bool:
        """Whether the folder says already what the study is."""
        paths = [Path("study.yaml"), *map(stored, self.study.directions)]
        there = all((self.folder / path).is_file() for path in paths)
        return there and self.before.get("study") == self.manifest["study"]

    def begin(self, lines: Iterable[str] = ()) -> None:
        """Says what the study is, before its first new row.

        Under which versions and on which machine other rows were run is kept as `earlier`.

        Args:
            lines: the plan as far as it has come, in place of another study's.
        """
        if self._begun:
            return
        self._begun = True
        if self.same and _lasting(self.before) == _lasting(self.manifest):
            return
        earlier = list(self.before.get("earlier") or ())
        if self.before and any(self.before.get(n) != self.manifest[n] for n in CHANGING):
            earlier.append({n: self.before.get(n) for n in ("written_at", *CHANGING)})
        if not self.same:
            write(self.study, self.model, self.folder)
        with whole(self.folder / "manifest.json") as part:
            manifest = {**self.manifest, **({"earlier": earlier} if earlier else {})}
            part.write_text(json.dumps(manifest, ensure_ascii=False, indent=1), encoding="utf-8")
        if not self.same:
            self._plan(lines, exactly=True)

    def plan(self, lines: Iterable[str], *, done: bool = False) -> None:
        """Says which row plays which part, as far as the stages have come.

        Nothing is said before the study has begun, where the folder still means another one.

        Args:
            done: whether that is all; else what is there already may go further.
        """
        if self._begun or self.same:
            with briefly(self.folder):
                self._plan(lines, exactly=done)

    def _plan(self, lines: Iterable[str], exactly: bool) -> None:
        path = self.folder / "plan.jsonl"
        mine = "".join(line + "\n" for line in lines).encode()
        with explained(path):
            before = path.read_bytes() if path.is_file() else b""
            if before == mine or (not exactly and before.startswith(mine)):
                return
            with whole(path) as part:
                part.write_bytes(mine)

    def failures(self, failed: Sequence[Mapping[str, str]], part: str, done: bool) -> None:
        """Lists the rows that could not be run.

        Args:
            part: of a shard: what its files' names end with.
            done: whether every stage was gone through; what shards listed is settled then.
        """
        path = self.folder / f"failures{part}.json"
        data = json.dumps(failed, ensure_ascii=False, indent=1).encode(errors="replace")
        with explained(path):
            if not path.is_file() or path.read_bytes() != data:
                with whole(path) as new:
                    new.write_bytes(data)
            if done and not part:
                for path in self.folder.glob("failures-*-of-*.json"):
                    path.unlink()


def _lasting(manifest: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in manifest.items() if name not in PASSING}
    told: dict[str, Any] = json.loads(json.dumps(kept))  # tuples as lists
    return told


def _identity(study: Study, model: SteeringModel) -> str:
    """A hash of what decides a study's rows and their parts: the numbers of its directions and what
    its metrics mean are part of it.
    """
    told = declared(study, model)
    content: dict[str, Any] = {name: told[name] for name in told if name not in WHERE}
    content["meanings"] = {name: METRICS[name].meaning for name in study.metrics}
    content["shas"] = {name: vector.sha for name, vector in study.vectors.items()}
    for name, given in study.directions.items():
        if isinstance(given, Contrast):
            sides = (given.positive, given.negative)
            digest = hashlib.sha256(b"".join(x.contiguous().numpy().tobytes() for x in sides))
            content["shas"][f"contrast {name}"] = digest.hexdigest()
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
