"""`interp-steer generate`: answers to prompts, unsteered and steered, as one batch."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from interp_steer.cli import common
from interp_steer.cli.terminal.hints import QUOTE
from interp_steer.errors import RequestError
from interp_steer.util.console import print_panels, progress, safe, side_by_side

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interp_steer.engine.row import Row
    from interp_steer.steering.scale import Scale

STREAMED = 6  # answers that are shown while they are written


def generate(
    asking: Annotated[str | None, common.arg("A prompt, in quotes.", metavar="[PROMPT]")] = None,
    model: common.Model = "starter",
    prompt: Annotated[list[str] | None, common.opt("A prompt. May be repeated.")] = None,
    prompts: Annotated[
        Path | None,
        common.opt("File of prompts: .txt, .json, .jsonl or .csv. FILE.csv:COLUMN picks a column."),
    ] = None,
    steer: Annotated[
        list[str] | None,
        common.opt(
            "Interventions, such as 'add(eiffel, 0.3 dose) at 15'. May be repeated: each is "
            "another answer, and so is each value in braces: '{0.2,0.4} dose', 'at {8-20/4}'."
        ),
    ] = None,
    named: common.Named = None,
    system: common.System = None,
    text: common.Text = False,
    max_new_tokens: common.MaxNewTokens = 64,
    temperature: common.Temperature = 0.0,
    top_p: common.TopP = 1.0,
    top_k: Annotated[int, common.opt("Draw from so many tokens; 0: from all.")] = 0,
    repetition_penalty: common.Penalty = 1.0,
    seed: common.Seed = 0,
    batch: common.Batch = None,
    out: Annotated[
        Path | None, common.opt("Write the answers to this .json file, and do not print.")
    ] = None,
    as_json: common.Json = False,
    dtype: common.Dtype = None,
    device: common.Device = None,
    date: common.Date = None,
) -> None:
    """Answer prompts, unsteered and under every --steer.

    All answers are computed in one batch.
    """
    prompt = [*([] if asking is None else [asking]), *(prompt or [])]
    if not prompt and not prompts:
        raise RequestError("nothing to answer: give a prompt in quotes, or --prompts FILE")
    if any(not line.strip() for line in steer or []):
        raise RequestError("--steer is empty; leave it out for the unsteered model")
    common.at_least_one(batch=batch)
    common.writable("--out", out)
    with progress("starting", every=5):
        from interp_steer.engine.engine import Engine
        from interp_steer.engine.row import Row, Sampling, record
        from interp_steer.prompts.file import PromptFile, numbered
        from interp_steer.prompts.item import Item
        from interp_steer.prompts.prompt import last_said
        from interp_steer.steering.directions import Directions
        from interp_steer.steering.grammar import parse
        from interp_steer.steering.intervention import brief, resolve
        from interp_steer.steering.scale import Scale
        from interp_steer.steering.spread import spread
        from interp_steer.util.files import whole

    file = PromptFile.read(prompts) if prompts else None
    known = Directions(named or [])
    try:
        lines = [line for text in steer or [] for line in spread(text).lines]
        settings = [(), *(parse(line, known) for line in lines)]
    except RequestError as error:
        cut = "the text ends" in str(error) or any(")" not in text for text in steer or [])
        if asking is None or " " in asking.strip() or not cut:
            raise
        raise RequestError(f"{error}; {QUOTE}") from None  # a word of it became the prompt
    sampling = Sampling(temperature, top_p, top_k, repetition_penalty, max_new_tokens)
    common.check_fits(model, settings)
    loaded = common.load(model, dtype, device, date=date)
    as_chat = loaded.is_chat and not text
    asked = [Item.of(one, as_chat=as_chat, system=system).prompt for one in prompt or []]
    encoded = [loaded.encode(p) for p in asked]
    for number, item in enumerate(file.items(as_chat=as_chat, system=system) if file else [], 1):
        with numbered(prompts or "", number):
            encoded.append(loaded.encode(item.prompt))
        asked.append(item.prompt)
    scale = Scale.of(loaded, encoded) if any(len(one.ids) > 1 for one in encoded) else None
    rows = [Row(p, resolve(setting, scale), sampling, seed) for p in asked for setting in settings]
    engine = Engine(loaded)
    shown = sys.stdout.isatty() and not as_json and not out
    titles = ["unsteered", *map(brief, settings[1:])]
    if shown and len(asked) == 1 and len(rows) <= STREAMED:
        side_by_side(engine.stream(rows), titles)
        _legend(rows, scale)
        return
    with progress("generating", len(rows)) as report:
        results = engine.generate(rows, batch=batch, report=report)
    records = json.dumps([record(r, scale) for r in results], ensure_ascii=False, indent=1)
    if out:
        with whole(out) as part:
            part.write_text(records, encoding="utf-8")
    if as_json:
        print(records)
    elif shown:
        for n, prompt_asked in enumerate(asked):
            if len(asked) > 1:
                print(f"\n{safe(last_said(prompt_asked))}")
            some = results[n * len(settings) : (n + 1) * len(settings)]
            print_panels([result.text for result in some], titles)
        _legend(rows[: len(settings)], scale)
    elif not out:
        for result in results:
            if not result.row.steer:
                print(f"\n# {safe(last_said(result.row.prompt))}")
            print(f"\n[{safe(_title(result.row, scale))}]\n{safe(result.text)}")


def _legend(rows: "Sequence[Row]", scale: "Scale | None") -> None:
    """Every form of each row's strength, below the answers."""
    for row in rows:
        if row.steer:
            print(safe(_title(row, scale)))


def _title(row: "Row", scale: "Scale | None") -> str:
    """A row's interventions with every form of their strength."""
    if not row.steer:
        return "unsteered"
    titles = []
    for intervention in row.steer:
        forms = []
        for strength in intervention.strengths(scale):
            form = f"{strength['coefficient']:.4g}"
            for unit in ("dose", "max"):
                form += f" = {strength[unit]:.2f} {unit}" if strength[unit] is not None else ""
            forms.append(form)
        titles.append(f"{intervention}: {', '.join(dict.fromkeys(forms))}")
    return "; ".join(titles)
