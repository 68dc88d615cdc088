"""`interp-steer features` and `interp-steer sae`, on a tiny model and an SAE that SAELens saved."""

import json
from pathlib import Path

import pytest
import torch

from interp_steer.features.sae import Sae
from interp_steer.steering.direction import Direction
from tests.conftest import command, error
from tests.features.test_sae import LAYER, saved

TEXTS = [
    "I love the tower; I hate the rain.",
    "Name three fruits.",
    "Yes, no, maybe: happy and sad.",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("sae"), "topk")


@pytest.fixture
def texts(tmp_path) -> str:
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS))
    return str(file)


def said(*words: str) -> str:
    """What a command that succeeds prints."""
    return command(*words)[0]


def test_get_saves_a_direction_that_lines_can_name(folder, tiny_folder, tmp_path):
    file = tmp_path / "row.safetensors"
    words = ["features", "get", str(folder), "5", "--name", "five", "--out", str(file)]
    assert f"saved {file}" in said(*words)
    facts = json.loads(said(*words, "--json"))
    row = Direction.load(file)
    assert (facts["sha"], facts["hook_point"]) == (row.sha, f"blocks.{LAYER}.hook_resid_post")
    steer = f"latent_clamp(five, 4) at {LAYER}"
    records = json.loads(
        said(
            "generate", "--model", str(tiny_folder), "--prompt", "Name three fruits.", "--json",
            "--direction", f"five={file}", "--steer", steer, "--max-new-tokens", "4",
        )
    )  # fmt: skip
    assert records[1]["steer"] == f"latent_clamp(five@{row.sha}, 4.0) at resid_post {LAYER}"
    assert records[1]["coefficient"] == [4.0] and records[1]["dose"] == [None]
    assert records[1]["token_ids"] != records[0]["token_ids"]


def test_top_contexts_and_find(folder, tiny_folder, texts, tmp_path):
    model = ["--model", str(tiny_folder)]
    found = json.loads(
        said("features", "top", str(folder), "--prompt", TEXTS[0], *model, "--limit", "3", "--json")
    )
    assert len(found) == 3 and found[0]["activation"] >= found[1]["activation"] > 0
    index = str(found[0]["index"])
    words = ["features", "contexts", str(folder), index, "--texts", texts, *model]
    contexts = json.loads(said(*words, "--json"))
    assert contexts[0]["activation"] > 0 and f"[[{contexts[0]['token']}]]" in said(*words)
    other = tmp_path / "other.txt"
    other.write_text("The quick brown fox jumps over the lazy dog.\nWhy?")
    words = ["features", "find", str(folder), "--positive", texts, "--negative", str(other), *model]
    ranked = json.loads(said(*words, "--json", "--limit", "5"))
    assert len(ranked) == 5 and ranked[0]["auroc"] >= ranked[4]["auroc"]
    assert said(*words).splitlines()[0].split()[:3] == ["index", "auroc", "difference"]


def test_the_best_are_shown_of_all_that_a_search_finds():
    from interp_steer.labels import import_files, search

    import_files(["starter"])
    words = ["features", "rank", "starter", "--search", "paris", "--json"]
    ranked = json.loads(said(*words))
    assert json.loads(said(*words, "--limit", "1")) == ranked[:1]
    # reciprocal rank fusion by hand, of the order by label and the order by output score
    labels = [hit.index for hit in search("paris", ["starter"], limit=50)]
    outputs = sorted((one["output_score"] for one in ranked), reverse=True)
    sums = [
        1 / (61 + labels.index(one["index"])) + 1 / (61 + outputs.index(one["output_score"]))
        for one in ranked
    ]
    assert len(ranked) > 5 and sums == sorted(sums, reverse=True)
    assert ranked[0]["index"] == 2652


def test_rank(folder, tiny_folder, texts):
    words = ["features", "rank", str(folder), "--features", "3,9,200", "--model", str(tiny_folder)]
    ranked = json.loads(said(*words, "--texts", texts, "--json"))
    assert sorted(one["index"] for one in ranked) == [3, 9, 200]
    scores = [one["output_score"] for one in ranked]
    assert scores == sorted(scores, reverse=True) and ranked[0]["input_score"] is not None
    assert "promoted" in said(*words).splitlines()[0]


def test_check(folder, tiny_folder, texts):
    words = ["sae", "check", str(folder), "--texts", texts, "--model", str(tiny_folder)]
    fit = json.loads(said(*words, "--json"))
    assert fit["texts"] == 3 and fit["l0"] <= 16
    shown = said(*words)
    assert f"{fit['explained_variance']:.3f}" in shown
    assert all(f"warning: {warning}" in shown for warning in fit["warnings"]) and fit["warnings"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["features", "get", "{sae}", "256"], "has features 0-255"),
        (["features", "get", "{sae}", "first"], "'first' is not the index of a feature"),
        (
            ["features", "get", "llama-3.1-8b-instruct-andyrdr", "x", "1"],
            "llama-3.1-8b-instruct-andyrdt",
        ),
        (["features", "get", "llama_scope_lxr_8x", "l15r_16x", "1"], "l15r_8x"),
        (["features", "get", "llama3.1-8b/15-llamascope-res-33k/1"], "15-llamascope-res-32k"),
        (["features", "get", "nonsense"], "nonsense"),
        (["sae", "check", "nonsense"], "nonsense"),
        (["sae", "check", "{sae}", "--model", "starter"], "64 wide; starter is 576 wide"),
        (["sae", "check", "{sae}", "--texts", "nowhere.txt"], "no prompt file nowhere.txt"),
        (
            ["features", "find", "{sae}", "--positive", "nowhere.txt", "--negative", "n"],
            "nowhere.txt",
        ),
        (
            ["features", "find", "{sae}", "--positive", "n", "--negative", "n", "--by", "size"],
            "'size'",
        ),
        (["features", "rank", "{sae}", "--model", "{model}"], "--features 12,4711 or --search"),
        (
            ["features", "rank", "{sae}", "--model", "{model}", "--features", "a"],
            "--features is 'a', expected such as 3,7",
        ),
        (
            ["features", "rank", "{sae}", "--model", "{model}", "--search", "x"],
            "no Neuronpedia source",
        ),
    ],
)
def test_bad_requests_are_one_line(folder, tiny_folder, words, expected):
    given = [word.format(sae=folder, model=tiny_folder) for word in words]
    assert expected in error(2, *given)


def test_a_truncated_file_is_one_line(tmp_path):
    broken = saved(tmp_path / "broken", "topk")
    weights = broken / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "damaged" in error(1, "features", "get", str(broken), "255")


def test_the_starters_feature_by_its_label():
    """What ships: labels are found, and lead to the decoder row of the SAE that ships."""
    from interp_steer.features.feature import feature
    from interp_steer.labels import import_files, search

    import_files(["starter"])
    hit = search("paris", ["starter"], limit=1)[0]
    row = feature(hit)
    sae = Sae.load("starter")
    assert "paris" in hit.label.lower() and row.site == sae.site
    torch.testing.assert_close(row.vector, sae.inner.W_dec[hit.index].detach())
    assert row.max_activation == pytest.approx(hit.max_activation * row.norm)
    assert row.source["label_max_activation_is"] == "activation"  # its TopK cannot be folded
