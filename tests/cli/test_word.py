"""`interp-steer direction word`: directions by the Jacobian lens from the command line."""

import json

import pytest

from interp_steer.features.contexts import windows
from interp_steer.steering.direction import DirectionSet
from interp_steer.steering.jacobian import word_directions
from interp_steer.steering.lens import JacobianLens
from tests.conftest import command, error

TEXT = "The quick brown fox jumps over the lazy dog, and the rain falls on the old tower. "


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERP_STEER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "texts.txt").write_text("\n".join([TEXT * 2, TEXT, TEXT * 3]))
    return tmp_path


def test_words_are_stored_and_equal_pythons(folder, tiny, tiny_folder):
    words = ["direction", "word", "fox", "dog", "--model", tiny_folder]
    told = json.loads(command(*words, "--texts", folder / "texts.txt", "--json")[0])
    assert [(r["word"], r["layer"]) for r in told] == [
        (word, layer) for word in ("fox", "dog") for layer in range(5)
    ]
    texts = windows(tiny, ["\n".join([TEXT * 2, TEXT, TEXT * 3])], 128)
    found = word_directions(tiny, ["fox", "dog"], texts)
    for word in ("fox", "dog"):
        stored = DirectionSet.load(folder / "cache" / "directions" / f"{word}.safetensors")
        assert [one.cosine(two) for one, two in zip(stored, found[word].directions, strict=True)
                ] == pytest.approx([1] * 5, abs=1e-5)  # fmt: skip
    out, _ = command(*words, "--texts", folder / "texts.txt", "--layers", "2-4/2")
    assert len([line for line in out.splitlines() if line.startswith("fox\t")]) == 2
    assert "halves" in out and "add(fox, 0.5 dose) at 4 on prompt" in out


def test_a_lens_file(folder, tiny, tiny_folder):
    texts = windows(tiny, [TEXT * 4], 128)
    lens = JacobianLens.fit(tiny, texts, layers=[1, 3])
    path = lens.save(folder / "lens.pt")
    words = ["direction", "word", "fox", "--model", tiny_folder, "--lens", path]
    told = json.loads(command(*words, "--json")[0])
    assert [r["layer"] for r in told] == [1, 3]
    stored = DirectionSet.load(folder / "cache" / "directions" / "fox.safetensors")
    assert stored[3].cosine(lens.word(tiny, "fox", 3)) == pytest.approx(1, abs=1e-4)
    assert "the lens has no layer 2" in error(2, *words, "--layers", "2")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--lens", "gone.pt"], "no lens file"),
        (["--texts", "gone.txt"], "no prompt file"),
        (["--layers", "5"], "it is the identity"),
        (["--out", "x.safetensors", "another"], "--out is one file"),
        (["extraordinarily"], "is no single token"),
    ],
)
def test_mistakes(folder, tiny_folder, more, expected, monkeypatch):
    monkeypatch.chdir(folder)
    assert expected in error(2, "direction", "word", "fox", *more, "--model", tiny_folder)
