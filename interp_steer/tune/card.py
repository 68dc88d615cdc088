"""A card: one page for one direction. Does it steer, how strongly, at what damage, better than
asking?

    made = card(model, feature("starter", 2652), "CARD")
    print(made); made.write("card.html")

What it should bring about are words: given ones, or those of the feature's label. Whether it does
is read from probabilities, not from text: how many times likelier it makes the words
(`concept_logprob`), at the strongest of a few doses that stays within a budget of KL on selection
prompts. Random directions make the same choice. Texts are generated at that dose alone.
"""

import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from interp_steer.engine.row import Sampling
from interp_steer.features.contexts import Context, top_contexts, windows
from interp_steer.features.fit import Fit, check
from interp_steer.features.sae import Sae
from interp_steer.features.screen import output_scores, promoted, screen
from interp_steer.labels.label import CONTEXT, named
from interp_steer.model.model import SteeringModel
from interp_steer.prompts.entry import SIDES
from interp_steer.prompts.file import QUESTIONS as QUESTIONS
from interp_steer.prompts.file import read_items, read_prompts
from interp_steer.prompts.parts import split_items
from interp_steer.prompts.prompt import Prompt
from interp_steer.report.card import UNSAID
from interp_steer.report.findings import Findings
from interp_steer.steering.direction import Direction
from interp_steer.steering.intervention import sites_text
from interp_steer.steering.scale import Scale
from interp_steer.study.cell import Controls
from interp_steer.study.measured import beginnings
from interp_steer.study.study import Study

DOSES = (0.1, 0.2, 0.3, 0.45)
BUDGET = 1.0  # nats a token on selection prompts that the operating point may cost
CONTROLS = 19  # random directions; with 19 the least p is 0.05
BESIDE = 3  # of them that are drawn over all doses on held-out prompts
READ, SAID = 20, 32  # tokens of an answer: unsteered ones that are read, steered ones that are said
SHOWN = 3  # texts
METRICS = ("concept_logprob", "kl_mean")
SEED = 0  # of the texts that are drawn
NAME = "this"  # of the direction in the studies' lines
ARMS = {"unsteered": "unsteered", "chosen": "steered", "prompted": "prompted"}  # by role

# Words in labels that say what kind of thing a feature fires on, not which.
_EMPTY = """
the and for with that this from not are was were has have had its their his her you your into when
what which who how all any can may some such than then there these those they word words phrase
phrases term terms text texts token tokens concept concepts topic topics reference references
mention mentions related relating various specific instances name names context contexts expressions
statements discussions but one two she him our out very use used using just more most other about
"""
EMPTY = frozenset(_EMPTY.split())
MOST = 8  # words of a label


@dataclass(frozen=True, eq=False)
class Card:
    """What is known of a direction, and what it does to a model.

    Attributes:
        direction, model: which.
        words: that it should bring about; none, and nothing is declared.
        label: of a feature.
        fit: of its SAE on the texts; None for what is no feature.
        contexts: where it fires most, in the texts.
        screened: scores of the feature, or `output_score` and `promoted` of another direction.
        findings: of the doses on selection prompts and the chosen one on held-out prompts, with its
            controls; None without words.
        curve: on held-out prompts: `who` (the direction, or a random one), `dose`, `effect` on
            `concept_logprob` and `kl`, means over prompts.
        said: a row for each arm (unsteered, steered, prompted) on the held-out prompts: metrics of
            generated text.
        texts: drawn at random: `prompt`, `unsteered`, `steered`, and `prompted` where asked.
        folder: of the rows.
    """

    direction: Direction
    model: str
    words: tuple[str, ...]
    label: str | None
    fit: Fit | None
    contexts: Sequence[Context]
    screened: Mapping[str, Any]
    findings: Findings | None
    curve: pd.DataFrame
    said: pd.DataFrame
    texts: Sequence[Mapping[str, str]]
    folder: Path
    asked: str | None = field(default=None)

    @property
    def steers(self) -> bool | None:
        """The verdict; None where nothing can be declared."""
        return self.findings.verdict.steers if self.findings else None

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.findings is None:
            return UNSAID
        text = self.findings.verdict.text.replace(f"add({NAME}", f"add({self.direction.name}")
        return f"{text} {self.times}".strip()

    @property
    def times(self) -> str:
        """How many times as likely its words become on the held-out prompts, in a sentence."""
        claims = self.findings.claims if self.findings else pd.DataFrame()
        if claims.empty:
            return ""
        mine = claims[(claims["role"] == "chosen") & (claims["metric"] == METRICS[0])]
        if mine.empty or mine["low"].isna().any():
            return ""
        much, low, high = (f"{math.exp(mine[k].iloc[0]):.3g}" for k in ("effect", "low", "high"))
        return f"Its words become {much} times as likely [{low}, {high}]."

    @property
    def dose(self) -> float | None:
        """The operating point."""
        return _dose(self.findings)

    def as_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        found, one = self.findings, self.direction
        return {
            "direction": one.label,
            "hook_point": one.hook_point,
            "norm": one.norm,
            "source": dict(one.source),
            "model": self.model,
            "label": self.label,
            "title": named(self.label) if self.label else one.label,
            "words": list(self.words),
            "fit": self.fit.as_json() if self.fit else None,
            "contexts": [asdict(place) for place in self.contexts],
            "screened": dict(self.screened),
            "verdict": {**vars(found.verdict), "text": self.verdict} if found else None,
            "dose": self.dose,
            "claims": _records(found.claims) if found else [],
            "controls": _records(found.p) if found else [],
            "selection": _records(found.grid) if found else [],
            "curve": _records(self.curve),
            "said": _records(self.said),
            "prompting": self.asked,
            "texts": list(map(dict, self.texts)),
            "folder": str(self.folder),
        }

    def write(self, path: str | Path) -> Path:
        """The card as a page, whole or not at all."""
        from interp_steer.report import card as page

        return page.write(self.as_json(), self.findings, path)

    def __str__(self) -> str:
        one, found = self.direction, self.findings
        lines = [f"{one.label} at {one.hook_point} of {self.model}", self.verdict]
        if self.label:
            lines.append(f"label       {self.label}")
        lines.append(f"words       {', '.join(self.words) or 'none'}")
        if self.fit:
            lines.append(
                f"SAE fit     explained variance {self.fit.explained_variance:.3f}, L0 "
                f"{self.fit.l0:.0f}, on {self.fit.tokens:,} tokens"
            )
        for place in self.contexts:
            text = " ".join(f"{place.before}[[{place.token}]]{place.after}".split())
            lines.append(f"fires       {place.activation:.1f}  {text}")
        score = self.screened["output_score"]
        lines.append(
            f"promotes    {' '.join(t.strip() for t in self.screened['promoted'][:10])} "
            f"(output score {score:.3f}; from 0.01 on a feature may steer)"
        )
        if found is not None and len(self.curve):
            rows = self.curve
            lines.append(f"dose        effect      KL    of {BESIDE} random ones: effect      KL")
            for dose, some in rows.groupby("dose", sort=True):
                mine, other = some[some["who"] == NAME].iloc[0], some[some["who"] != NAME]
                mark = " <- operating point" if dose == self.dose else ""
                lines.append(
                    f"  {dose:<8g}  {mine['effect']:+7.2f}  {mine['kl']:6.3f}   "
                    f"{other['effect'].mean():+16.2f} {other['kl'].mean():12.3f}{mark}"
                )
        if len(self.said):
            heads = [name for name in self.said.columns if name != "arm"]
            lines.append("            " + "".join(f"{head:>10}" for head in heads))
            for row in self.said.to_dict("records"):
                lines.append(f"{row['arm']:<12}" + "".join(f"{row[h]:>10.3f}" for h in heads))
        if self.asked:
            lines.append(f"prompted    {self.asked}")
        for answers in self.texts:
            lines.append(f"To {answers['prompt']!r}:")
            lines += [
                f"  {k:<9} {' '.join(v.split())}" for k, v in answers.items() if k != "prompt"
            ]
        if found is not None:
            lines += [f"note: {note}" for note in found.notes]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from interp_steer.report import card as page

        return page.brief(self.as_json(), self.findings)


def _dose(findings: Findings | None) -> float | None:
    """The dose that the selection prompts chose."""
    chosen = findings.chosen if findings else None
    return float(chosen["level"].split()[0]) if chosen else None


def words_of(label: str) -> tuple[str, ...]:
    """The words of a label that say what a feature is about: before its context, three letters or
    more, without words such as "references".
    """
    found = re.findall(r"[^\W\d_]{3,}", label.partition(CONTEXT)[0])
    told = {word.casefold(): word for word in reversed(found) if word.casefold() not in EMPTY}
    return tuple(reversed(told.values()))[:MOST]


def card(
    model: SteeringModel,
    direction: Direction,
    folder: str | Path,
    *,
    words: Sequence[str] = (),
    prompts: Sequence[Any] = (),
    texts: Sequence[Prompt] = (),
    doses: Sequence[float] = DOSES,
    budget: float = BUDGET,
    controls: int = CONTROLS,
    prompting: str | None = None,
) -> Card:
    """Makes the card of a direction. Its rows lie in a folder: what was run is not run again.

    Args:
        words: that it should bring about; by default those of the feature's label.
        prompts: half of them choose the dose, half test it; by default 16 questions that ship.
        texts: that show where a feature fires; by default 48 sentences that ship.
        doses: that are tried.
        budget: nats a token that the dose may cost on the selection prompts.
        controls: random directions that make the same choice.
        prompting: a system prompt that asks for the concept; by default one that names the words.

    Raises:
        RequestError: the direction does not fit the model, or as `Study` does.
    """
    folder = Path(folder)
    model.check(direction.site, len(direction.unit))
    label = direction.source.get("label")
    told = tuple(words) or words_of(label or "")
    told = tuple(word for word in told if words or beginnings(model, [word]))
    known = {NAME: direction.named(NAME)}
    items = list(prompts) or read_items(QUESTIONS)
    choose, prove = split_items(items, 0.5 if prompts else 6 / len(items))
    asked = prompting or (_asked(told) if told and model.is_chat else None)
    at = sites_text((direction.site,))
    # one unit of dose on every page of the card: the selection prompts'
    asking = Study.sweep(f"add({NAME}, 1) at {at}", choose, known)
    unit = asking.bound(model).scale(model).at(direction.site)
    findings, curve = None, pd.DataFrame()
    if told:
        study = dosed(direction, told, choose, prove, doses, budget, controls)
        findings = study.run(model, folder / "doses").findings()
        curve = _curve(model, study, doses, unit, folder / "curve")
    dose = _dose(findings)
    length = (min(doses) if dose is None else dose) * unit
    talk = Study.sweep(
        f"add({NAME}, {length:.6g}) at {at}", prove, known, concept=told,
        metrics=(*(("mention", "concept") if told else ()), "rep3", "surprise", "kl_mean"),
        sampling=Sampling(max_new_tokens=SAID),
        prompting={"prompt": {"system": asked}} if asked else {},
    )  # fmt: skip
    run = talk.run(model, folder / "texts")
    table = run.table()
    arms = dict(list(table.groupby(table["role"].map(ARMS), sort=False)))
    said, shown = _said(arms, run.manifest["metrics"]), _texts(arms)
    fit, contexts, screened = _about(model, direction, texts)
    return Card(
        direction, model.name, told, label, fit, contexts, screened, findings, curve, said, shown,
        folder, asked,
    )  # fmt: skip


def dosed(
    direction: Direction,
    words: Sequence[str],
    choose: Sequence[Any],
    prove: Sequence[Any],
    doses: Sequence[float] = DOSES,
    budget: float = BUDGET,
    controls: int = CONTROLS,
) -> Study:
    """The study by which a card declares: selection prompts choose the dose with the largest effect
    within the budget, and random directions choose theirs.
    """
    return Study(
        choose=choose, prove=prove, directions={NAME: direction.named(NAME)},
        sites=[sites_text((direction.site,))],
        coefficients=[f"{dose:g} dose" for dose in doses], concept=tuple(words), metrics=METRICS,
        limits={"kl_mean": budget}, sampling=Sampling(max_new_tokens=READ),
        controls=Controls(random=0, features=0, shuffled=0, selected=controls),
    )  # fmt: skip


def _asked(words: Sequence[str]) -> str:
    """A system prompt that asks for the words."""
    return f"Mention {' or '.join(words[:3])} in every answer, whatever the question is about."


def _curve(
    model: SteeringModel, study: Study, doses: Sequence[float], unit: float, folder: Path
) -> pd.DataFrame:
    """The doses on held-out prompts, of the direction and of some random ones."""
    drawn = {f"random{n}": study.null_vectors(n)[NAME].named(f"random{n}") for n in range(BESIDE)}
    known = {**study.vectors, **drawn}
    (at,) = study.sites
    sweep = Study(
        choose=(), prove=study.prove, directions=known, sites=[at], concept=study.concept,
        coefficients=[f"{dose * unit:.6g}" for dose in doses], metrics=METRICS,
        sampling=study.sampling,
        controls=Controls(0, 0, 0, flip=False, wrong_layer=False, selected=0),
    )  # fmt: skip
    table = sweep.run(model, folder).table()
    before = table[table["role"] == "unsteered"].set_index("item")["concept_logprob"]
    rows = table[table["role"] == "grid"].copy()
    rows["effect"] = rows["concept_logprob"] - before.reindex(rows["item"]).to_numpy()
    rows["given"] = (rows["coefficient"] / unit).round(4)
    found = [
        (who, dose, some["effect"].mean(), some["kl_mean"].mean())
        for (who, dose), some in rows.groupby(["direction", "given"], sort=False)
    ]
    return pd.DataFrame(found, columns=["who", "dose", "effect", "kl"])


def _said(arms: Mapping[str, pd.DataFrame], metrics: list[str]) -> pd.DataFrame:
    """Means of what each arm says."""
    return pd.DataFrame([{"arm": name, **rows[metrics].mean()} for name, rows in arms.items()])


def _texts(arms: Mapping[str, pd.DataFrame]) -> list[Mapping[str, str]]:
    """What each arm says to prompts that are drawn at random."""
    by_item = {name: rows.set_index("item") for name, rows in arms.items()}
    prompts = by_item["unsteered"]["prompt"]
    items = random.Random(SEED).sample(sorted(prompts.index), min(SHOWN, len(prompts)))
    return [
        {
            "prompt": str(prompts[item]),
            **{name: rows["text"].fillna("")[item] for name, rows in by_item.items()},
        }
        for item in items
    ]


def _about(
    model: SteeringModel, direction: Direction, texts: Sequence[Prompt]
) -> tuple[Fit | None, Sequence[Context], Mapping[str, Any]]:
    """Fit, contexts and scores of a feature; scores alone of another direction."""
    if not direction.is_feature:
        site = direction.site
        encoded = [model.encode(item.prompt) for item in read_items(QUESTIONS)]
        length = Scale.of(model, encoded).at(site)
        (score,) = output_scores(model, [direction], length)
        _, tokens = promoted(model, direction.unit[None])
        return None, (), {"output_score": score, "promoted": tokens[0]}
    where = direction.source["release"]
    sae = Sae.load(where, direction.source.get("sae_id") or None, device=model.device)
    index = int(direction.source["index"])
    demo = QUESTIONS.parent / "demo_texts"
    given = texts or [p for side in SIDES for p in read_prompts(demo / f"{side}.txt")]
    encoded = windows(model, given, 128)
    contexts = top_contexts(sae, model, encoded, [index], 5)[index]
    (scored,) = screen(sae, model, [index], contexts={index: contexts})
    return check(sae, model, encoded, loss_texts=0), contexts, asdict(scored)


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON has them: None in place of NaN."""
    found: list[dict[str, Any]] = json.loads(table.to_json(orient="records"))
    return found
