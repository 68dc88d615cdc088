"""Ablation against TransformerLens: each item alone, without padding, one full pass a variant."""

import itertools
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from interp_steer.causal.ablate import COMPONENTS, Ablation, ablate
from interp_steer.causal.branch import Edit, Trunk
from interp_steer.causal.scores import SCORES, Reading, summarised
from interp_steer.errors import RequestError
from interp_steer.features.feature import feature
from interp_steer.model.model import SteeringModel
from interp_steer.model.site import Site
from interp_steer.prompts.item import Item
from interp_steer.stats import intervals
from interp_steer.steering.direction import Direction, DirectionSet
from tests.conftest import hf_streams, make_llama, state
from tests.features.test_sae import LAYER, saved

FOX = Item("The quick brown fox jumps", " dog", " fox", corrupted="The lazy brown dog jumps")
TOWER = Item("I love the tower; I hate", " the dog", " the fox")  # answers that begin alike
HILL = Item("What is the tallest mountain", continuation=" happy and sad")
ITEMS = [FOX, TOWER, HILL]
WORDS = ("dog", "tower")
NAMED = {"words": WORDS, "answer": 1}  # of an answer its first position
REFERENCE = [Item("Name three fruits"), Item("You are a helpful assistant")]
HOOKS = {
    "resid_pre": ["hook_resid_pre"],
    "resid_post": ["hook_resid_post"],
    "block": ["hook_attn_out", "hook_mlp_out"],
    "attn_out": ["hook_attn_out"],
    "mlp_out": ["hook_mlp_out"],
    "z": ["attn.hook_z"],
    "direction": ["hook_resid_post"],
}


def ones(width: int) -> Direction:
    return Direction.of(torch.ones(width), "blocks.2.hook_resid_post")


def ids_of(model, text: str) -> list[int]:
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


def sequence(model, item: Item, prompt=None) -> list[int]:
    """What is read: TOWER's answers share ' the', HILL has a continuation."""
    tail = {TOWER.id: " the", HILL.id: HILL.continuation}.get(item.id, "")
    return [*model.encode(prompt or item.prompt).ids, *ids_of(model, tail)]


def run(model, ids, hooks=()) -> tuple[torch.Tensor, torch.Tensor]:
    """Stream after the last block and log-probabilities, from TransformerLens."""
    kept = []
    last = f"blocks.{model.n_layers - 1}.hook_resid_post"
    with torch.no_grad():
        logits = model.hooked.run_with_hooks(
            torch.tensor([ids]), fwd_hooks=[*hooks, (last, lambda x, hook: kept.append(x))]
        )
    return kept[0][0], logits[0].log_softmax(-1)


def activations(model, ids) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return model.hooked.run_with_cache(torch.tensor([ids]))[1]


def replacing(value, head=None, first=1):
    """A hook that puts a value `[pos, d]`, `[d]` or 0 in, from position `first` on."""

    def hook(x, hook):
        x = x.clone()
        there = x[0, first:] if head is None else x[0, first:, head]
        there[:] = value[first:] if isinstance(value, torch.Tensor) and value.ndim > 1 else value
        return x

    return hook


def expected(model, item: Item, clean, changed) -> dict[str, float]:
    """Every score that an item has, by its definition."""
    ids, n = sequence(model, item), len(model.encode(item.prompt).ids)
    kl = (clean.exp() * (clean - changed)).sum(-1)
    found = {"kl_last": kl[n - 1], "kl_all": kl[1:].mean()}
    begin, end = (n - 1, len(ids) - 1) if item.continuation else (0, n - 1)
    found["loss"] = -torch.stack([changed[i, ids[i + 1]] for i in range(begin, end)]).mean()
    if item.positive:
        yes, no = (ids_of(model, text)[-1] for text in (item.positive, item.negative))
        found["logit_difference"] = changed[len(ids) - 1, yes] - changed[len(ids) - 1, no]
    tokens = {ids_of(model, text)[0] for word in WORDS for text in (word, " " + word)}
    found["words"] = changed[n - 1].exp()[list(tokens)].sum().log()
    return {name: value.item() for name, value in found.items()}


def check(model, found, hooks_of, items=ITEMS, tolerance=1e-4) -> int:
    """Every number of a table against a run of TransformerLens with `hooks_of(row, item)`."""
    seen = 0
    plain = {item.id: run(model, sequence(model, item))[1] for item in items}
    by = ["component", "method", "layer", "last", "head"]
    for setting, some in found.table.groupby(by, dropna=False):
        row = SimpleNamespace(**dict(zip(by, setting, strict=True)))
        for item in items:
            clean = plain[item.id]
            _, changed = run(model, sequence(model, item), hooks_of(row, item))
            before, after = (expected(model, item, clean, x) for x in (clean, changed))
            mine = some[some["item"] == item.id]
            assert set(mine["score"]) == set(after) & set(SCORES)
            for _, one in mine.iterrows():
                assert one["clean"] == pytest.approx(before[one["score"]], abs=tolerance)
                assert one["value"] == pytest.approx(after[one["score"]], abs=tolerance), one
                assert one["change"] == pytest.approx(one["value"] - one["clean"])
                seen += 1
    assert seen == len(found.table)
    return seen


@pytest.mark.parametrize("method", ["zero", "mean", "resample"])
def test_scores_of_every_component_and_layer(tiny, method):
    components = ["resid_pre", "resid_post", "block", "attn_out", "mlp_out", "z"]
    # FOX has a corrupted prompt; the others take the next item of their length
    tower = Item("I hate the tower; I love")
    items = [*ITEMS, tower] if method == "resample" else ITEMS
    found = ablate(tiny, items, components, [method], reference=REFERENCE, **NAMED)
    found = Ablation(found.table[found.table["item"] != tower.id])
    assert set(found.table.columns) == {
        "component", "method", "layer", "last", "span", "head", "item", "score", "clean", "value",
        "change",
    }  # fmt: skip
    partner = {FOX.id: FOX.corrupted, TOWER.id: tower.prompt, HILL.id: FOX.prompt}
    known = [activations(tiny, tiny.encode(one.prompt).ids) for one in REFERENCE]
    other = {i.id: activations(tiny, sequence(tiny, i, partner[i.id])) for i in ITEMS}

    def hooks(row, item):
        head = None if row.component != "z" else int(row.head)
        made = []
        for kind in HOOKS[row.component]:
            name = f"blocks.{row.layer}.{kind}"
            value = 0.0
            if method == "mean":
                value = torch.cat([cache[name][0, 1:] for cache in known]).mean(0)
            elif method == "resample":
                value = other[item.id][name][0]
            if head is not None and method != "zero":
                value = value.select(-2, head)
            made.append((name, replacing(value, head)))
        return made

    assert check(tiny, found, hooks) == 54 * 14


def test_the_mean_is_over_the_items_without_reference_prompts(tiny):
    found = ablate(tiny, ITEMS, ["mlp_out"], ["mean"], **NAMED, layers=[2])
    name = "blocks.2.hook_mlp_out"
    seen = [activations(tiny, tiny.encode(i.prompt).ids)[name][0, 1:] for i in ITEMS]
    value = torch.cat(seen).mean(0)
    assert check(tiny, found, lambda row, item: [(name, replacing(value))]) == 14


@pytest.mark.parametrize("span", ["window", "upward", "downward"])
def test_spans(tiny, span):
    found = ablate(tiny, ITEMS, ["attn_out", "block", "resid_post"], span=span, width=3, **NAMED)

    def hooks(row, item):
        layers = range(row.layer, row.last + 1)
        names = itertools.product(layers, HOOKS[row.component])
        return [(f"blocks.{layer}.{kind}", replacing(0.0)) for layer, kind in names]

    check(tiny, found, hooks)
    spans = list(dict.fromkeys(found.table["span"]))
    assert (
        spans
        == {
            "window": ["0-2", "1-3", "2-4", "3-5"],
            "upward": ["0", "0-1", "0-2", "0-3", "0-4", "0-5"],
            "downward": ["0-5", "1-5", "2-5", "3-5", "4-5", "5"],
        }[span]
    )


@pytest.mark.parametrize("kind", ["one", "set"])
def test_directional_ablation(tiny, kind):
    draw = torch.Generator().manual_seed(1)
    members = [
        Direction.of(torch.randn(64, generator=draw), Site("resid_post", layer).hook_point)
        for layer in range(tiny.n_layers)
    ]
    vector = members[2] if kind == "one" else DirectionSet(members)
    found = ablate(
        tiny, ITEMS, ["direction", "block"], ["directional"], span="window", width=2,
        vector=vector, **NAMED,
    )  # fmt: skip

    def hooks(row, item):
        def without(unit):
            def hook(x, hook):
                erased = x - (x @ unit)[..., None] * unit
                return torch.cat([x[:, :1], erased[:, 1:]], 1)

            return hook

        return [
            (f"blocks.{n}.{place}", without(members[2 if kind == "one" else n].unit))
            for n in range(row.layer, row.last + 1)
            for place in HOOKS[row.component]
        ]

    check(tiny, found, hooks)
    assert found.table["change"].abs().max() > 0.01


def test_a_feature_is_set_to_zero_at_its_own_site(tiny, tmp_path):
    from sae_lens import SAE

    folder = saved(tmp_path / "sae", "jumprelu")
    sae, index = SAE.load_from_disk(folder), 5
    found = ablate(tiny, ITEMS, ["feature"], vector=feature(folder, index), **NAMED, span="upward")

    def without(x, hook):
        moved = x - sae.encode(x)[..., index, None] * sae.W_dec[index]
        return torch.cat([x[:, :1], moved[:, 1:]], 1).detach()

    assert check(tiny, found, lambda row, item: [(f"blocks.{LAYER}.hook_resid_post", without)])
    assert set(found.table["span"]) == {str(LAYER)} and found.table["change"].abs().max() > 0.01


def test_a_model_with_fewer_layers_than_a_window(tmp_path):
    model = SteeringModel.load(str(make_llama(tmp_path, num_hidden_layers=2)))
    assert len(ablate(model, ITEMS[:1], ["mlp_out"], scores=["kl_last"]).table) == 2
    with pytest.raises(RequestError, match="a window of 3 layers"):
        ablate(model, ITEMS[:1], ["mlp_out"], span="window")


def test_the_first_position_is_ablated_only_if_asked(tiny):
    for first in (False, True):
        found = ablate(tiny, ITEMS, ["resid_pre"], first=first, **NAMED)

        def hooks(row, item, start=0 if first else 1):
            return [(f"blocks.{row.layer}.hook_resid_pre", replacing(0.0, first=start))]

        check(tiny, found, hooks)


def test_small_batches_full_passes_and_lone_items_say_the_same(tiny):
    given, heads = ["resid_pre", "z"], [1]
    whole = ablate(tiny, ITEMS, given, **NAMED, heads=heads).table
    for options in ({"batch": 1}, {"batch": 2}, {"batch": 7}, {"resume": False}):
        other = ablate(tiny, ITEMS, given, **NAMED, heads=heads, **options).table
        assert other.drop(columns=["clean", "value", "change"]).equals(
            whole.drop(columns=["clean", "value", "change"])
        )
        assert (other["value"] - whole["value"]).abs().max() < 1e-4
    alone = ablate(tiny, [HILL], given, **NAMED, heads=heads).table
    same = whole[whole["item"] == HILL.id]["value"].to_numpy()
    assert np.abs(alone["value"].to_numpy() - same).max() < 1e-4


def test_nothing_is_left_on_the_model(tiny_folder):
    tiny = SteeringModel.load(str(tiny_folder))  # of its own: what others left would be seen late
    streams = hf_streams(tiny, tiny.encode(FOX.prompt).ids)  # leaves transformers' own hooks
    before = state(tiny)
    found = ablate(tiny, ITEMS, ["z", "attn_out", "mlp_out", "resid_pre"], ["zero", "mean"])
    assert state(tiny) == before

    def broken(x):
        raise ZeroDivisionError

    for component in ("attn_out", "z", "resid_pre"):
        with pytest.raises(ZeroDivisionError):
            Trunk(tiny, [sequence(tiny, FOX)]).branch([(Edit(component, 2, broken),)])
        assert state(tiny) == before
    after = hf_streams(tiny, tiny.encode(FOX.prompt).ids)
    assert all(torch.equal(a, b) for a, b in zip(streams, after, strict=True))
    assert (
        ablate(tiny, ITEMS, ["z", "attn_out", "mlp_out", "resid_pre"], ["zero", "mean"])
        .table["value"]
        .equals(found.table["value"])
    )


def test_progress_ends_at_one(tiny):
    said = []
    ablate(tiny, ITEMS, ["mlp_out"], batch=2, report=lambda done, note="": said.append(done))
    assert said == sorted(said) and said[-1] == pytest.approx(1) and len(said) > 3


def test_scores_that_items_lack_are_left_out(tiny):
    found = ablate(tiny, ITEMS, ["mlp_out"]).table
    assert set(found["score"]) == {"logit_difference", "kl_last", "kl_all", "loss"}
    assert set(found[found["score"] == "logit_difference"]["item"]) == {FOX.id, TOWER.id}
    asked = ablate(tiny, ITEMS, ["mlp_out"], scores=["kl_last"]).table
    assert set(asked["score"]) == {"kl_last"} and (asked["clean"] == 0).all()


def test_an_answer_that_words_reads_changes_no_other_score(tiny):
    """The model's own answer follows the prompt, and only `words` looks at it."""
    options = {"components": ["mlp_out", "z"], "layers": [1, 4], "heads": [0]}
    plain = ablate(tiny, ITEMS, **options).table
    found = ablate(tiny, ITEMS, words=WORDS, **options).table
    others = found[found["score"] != "words"].reset_index(drop=True)
    assert list(others["score"]) == list(plain["score"]) and len(found) == len(plain) + 3 * 4
    for column in ("clean", "value"):
        assert (others[column] - plain[column]).abs().max() < 1e-4
    short = ablate(tiny, ITEMS, **NAMED, **options).table
    words = [one[(one["score"] == "words") & (one["item"] == FOX.id)] for one in (found, short)]
    assert (words[0]["value"] - words[1]["value"]).abs().min() > 1e-3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"components": ["atn_out"]}, "unknown component 'atn_out'; nearest: attn_out"),
        ({"components": []}, "no component given; choices: resid_pre"),
        ({"methods": ["means"]}, "unknown method 'means'; nearest: mean"),
        ({"span": "layers"}, "unknown span 'layers'; nearest: layer"),
        ({"scores": ["kl"]}, "unknown score 'kl'; nearest: kl_all"),
        ({"scores": ["words"]}, "words cannot be had: no words are given"),
        ({"items": [HILL], "scores": ["logit_difference"]}, "no item has answers"),
        ({"items": []}, "no items given"),
        ({"layers": [6]}, r"layer 6 is out of range: .* has layers 0-5"),
        ({"components": ["z"], "heads": [4]}, "head 4 is out of range: .* has heads 0-3"),
        ({"components": ["z"], "span": "upward"}, "one layer at a time"),
        ({"span": "window", "width": 7}, "a window of 7 layers"),
        ({"span": "window", "layers": [5]}, "no window of 3 layers begins at"),
        ({"components": ["direction"]}, "ablating direction needs a vector"),
        ({"methods": ["directional"]}, "ablating attn_out needs a vector"),
        (
            {"components": ["feature"], "vector": ones(64)},
            "needs a feature of an SAE",
        ),
        (
            {"components": ["direction"], "vector": ones(9)},
            "the direction is 9 wide",
        ),
        ({"methods": ["resample"], "items": [TOWER]}, "no other item has 8 tokens"),
        (
            {"methods": ["resample"], "items": [Item(FOX.prompt, corrupted="Yes, no")]},
            "has 6 tokens and its corrupted prompt 5: activations",
        ),
        ({"items": [Item("Yes", " the", " the dog")]}, "no token tells them apart"),
        ({"items": [Item("Yes", " the dog", " the fox", continuation=" no")]}, "make it two items"),
        ({"batch": 0}, "batch is 0"),
        ({"words": [" "]}, "a word is empty"),
    ],
)  # fmt: skip
def test_errors_name_what_would_do(tiny, changes, said):
    given = {"items": ITEMS, "components": ["attn_out"], "methods": ["zero"], **changes}
    with pytest.raises(RequestError, match=said):
        ablate(tiny, **given)


def test_answers_are_told_apart_at_the_first_differing_token(tiny):
    one = Reading.of(tiny, TOWER)
    assert [tiny.decode_token(i) for i in one.ids[one.last + 1 :]] == [" the"]
    assert one.pair and [tiny.decode_token(i) for i in one.pair] == [" dog", " fox"]
    assert (one.at, one.last) == (8, 7)


def test_the_summary_is_over_items(tiny):
    """Each mean of changes, and its interval, comes from its own items; few items have none."""
    words = ["fox", "dog", "tower", "rain", "mountain", "fruits", "lazy", "sad", "happy", "three"]
    items = [Item(f"I love the {word}", " dog", " fox") for word in words]
    items += [HILL, Item("I hate the rain", " dog", " fox")]
    found = ablate(tiny, items, ["mlp_out", "z"], layers=[1, 4])
    summary = found.summary(level=0.9, seed=3)
    assert len(summary) == (2 + 8) * 4 and (summary["missing"] == 0).all()
    row = summary[(summary["component"] == "z") & (summary["score"] == "logit_difference")].iloc[5]
    some = found.table[(found.table["head"] == row["head"]) & (found.table["layer"] == 4)]
    some = some[some["score"] == "logit_difference"]
    assert (row["layer"], row["head"], row["n"]) == (4, 1, 11)
    interval = intervals.mean(some["change"].to_numpy(), level=0.9, seed=3)
    assert (row["estimate"], row["low"], row["high"]) == (
        interval.estimate, interval.low, interval.high,
    )  # fmt: skip
    few = ablate(tiny, ITEMS, ["mlp_out"], layers=[1]).summary()
    assert few["low"].isna().all() and few["estimate"].notna().all()


def test_items_given_twice_and_missing_values_are_no_evidence():
    table = pd.DataFrame(
        {
            "layer": [0] * 5 + [1],
            "item": ["a", "a", "b", "c", "d", "a"],
            "x": [1, 3, 5, np.nan, np.inf, np.nan],
        }
    )
    found = summarised(table, ["layer"], "x")
    assert found["estimate"][0] == 3.5 and np.isnan(found["estimate"][1])
    assert list(found["n"]) == [2, 0] and list(found["missing"]) == [2, 1]


def test_the_benchmark_runs(tiny_folder, monkeypatch, capsys):
    script = str(Path(__file__).parents[2] / "scripts" / "benchmarks" / "ablation.py")
    options = ["--model", str(tiny_folder), "--prompts", "2", "--repeats", "2", "--json"]
    monkeypatch.setattr(sys, "argv", [script, *options])
    with pytest.raises(SystemExit):
        runpy.run_path(script, run_name="__main__")
    found = json.loads(capsys.readouterr().out)
    assert found["layers"] == 6 and len(found["found"]) == 2
    for one in found["found"]:
        (_, least, most), (_, fastest, slowest) = one["resumed_s"], one["full_s"]
        assert 0 < least / slowest <= one["share"][1] <= one["share"][2] <= most / fastest


def test_every_component_has_a_name_that_is_tested():
    assert set(COMPONENTS) == {*HOOKS, "feature"}


def test_a_prompt_of_one_token_leaves_nothing_to_ablate(tiny):
    """Its first position is kept; the others of the run are ablated as ever."""
    way = Direction.of(torch.ones(tiny.d_model), "blocks.2.hook_resid_post", "way")
    items = [Item.of("The quick brown fox"), Item.of("<|begin|>")]
    found = ablate(tiny, items, ["direction"], ["directional"], vector=way, layers=[2], batch=1)
    short = found.table[found.table["item"] == items[1].id]
    assert len(short) and (short["value"] - short["clean"]).abs().max() < 1e-6
