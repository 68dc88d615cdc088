"""Researcher scripts, at a size that shows that they run."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from interp_steer.model.site import Site
from tests.conftest import command

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated"])
def test_the_smoke_script_tells_folded_activations_from_others(kind):
    """On SAEs of SAELens's own, with rows of 0.25, of 1, and numbers of something else."""
    from sae_lens import SAE

    which_fits = runpy.run_path(str(SCRIPTS / "benchmarks" / "smoke_neuronpedia.py"))["which_fits"]
    torch.manual_seed(0)
    x = torch.randn(40, 16) * 2
    for length in (0.25, 1.0):
        sae = SAE.from_dict({"architecture": kind, "d_in": 16, "d_sae": 32, "dtype": "float32"})
        with torch.no_grad():
            sae.W_enc.normal_()
            sae.W_dec.normal_()
            sae.W_dec *= length / sae.W_dec.norm(dim=-1, keepdim=True)
        before = sae.encode(x)[:, 3].detach()
        noisy = before * (1 + 0.01 * torch.randn(40))
        assert before.max() > 1
        words = ("contribution", "activation") if length < 1 else ("either", "either")
        assert which_fits(sae, x, 3, noisy * length)[0] == words[0]
        word, after, unfolded = which_fits(sae, x, 3, noisy)
        assert (word, unfolded < 0.02) == (words[1], True)
        assert after == pytest.approx(1 - length, abs=0.02)
        assert which_fits(sae, x, 3, noisy * 3)[0] == "neither"


def test_the_smoke_script_reads_a_dashboard(tiny, tiny_folder, tmp_path, monkeypatch):
    """A feature as the server gives it, its values by SAELens after folding, or before."""
    from sae_lens import SAE

    from interp_steer.labels import Client, registry
    from interp_steer.labels.label import Source
    from tests.labels.server import Neuronpedia, neuron

    settings = {"architecture": "jumprelu", "d_in": 64, "d_sae": 32, "dtype": "float32"}
    sae = SAE.from_dict({**settings, "metadata": {"hook_name": "blocks.3.hook_resid_post"}})
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in sae.parameters():
            weight.normal_()
        sae.W_dec *= 0.25 / sae.W_dec.norm(dim=-1, keepdim=True)
    sae.save_model(tmp_path)
    monkeypatch.setattr(registry, "STARTER_DATA", tmp_path)
    encoded = tiny.encode("The tower stands in Paris, and it is made of iron.")
    x, _ = tiny.read(Site("resid_post", 3), [encoded])
    values = sae.encode(x[0].float())[:, 5].detach()
    assert values[1:].max() > 0
    source = Source.parse(str(registry.entry("starter").neuronpedia))
    folding = runpy.run_path(str(SCRIPTS / "benchmarks" / "smoke_neuronpedia.py"))["folding"]
    server = Neuronpedia()
    for length in (0.25, 1):
        text = {"tokens": [tiny.decode_token(i) for i in encoded.ids],
                "values": (values * length).tolist(), "maxValue": values.max().item()}  # fmt: skip
        dull = {"tokens": ["a"], "values": [0.0], "maxValue": 0.0}
        server.neurons[source.model, source.name, "5"] = neuron(
            source.model, source.name, 5, activations=[dull, text]
        )
        ask = (Client(server.url), source, 5, str(tiny_folder))
        if length == 0.25:
            assert folding(*ask).startswith("contribution: row of length 0.250")
        else:
            with pytest.raises(AssertionError, match=r"^activation: .* takes it for contribution"):
                folding(*ask)
    server.close()


@pytest.mark.parametrize("name", ["layer_sweep", "layer_ablation", "steerability"])
def test_studies_run_at_small_size(name, tiny_folder, tmp_path, monkeypatch, capsys):
    texts = {"INTERP_STEER_DATA": "/nonexistent", "RUN": str(tmp_path), "MODEL": str(tiny_folder)}
    for key, value in texts.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(sys, "argv", [name, "--small"])
    runpy.run_path(str(SCRIPTS / "studies" / f"{name}.py"))
    wrote = tmp_path / ("profile.png" if name == "layer_ablation" else "report.html")
    assert wrote.stat().st_size > 5000 and str(wrote) in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peaks as Linux does")
def test_memory_is_as_planned():
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "benchmarks" / "memory.py"), "--rows", "64", "--json"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for one in json.loads(done.stdout):
        assert one["load"] <= 1.10
        assert 0.8 <= one["planned"] / one["peak"] <= 1.2


@pytest.fixture
def labelled(tmp_path, monkeypatch):
    """A cache with the starter's labels, and a folder for the run."""
    from interp_steer.util.files import cache_dir

    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "models").symlink_to(cache_dir("models"))
    monkeypatch.setenv("INTERP_STEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RUN", str(tmp_path / "RUN"))
    command("labels", "import", "starter")


SAID = {
    "equal_damage": ("12 of 12 meet 0.5 nats within 10 %", "prompt   - means"),
    "eiffel_tower": ("8 features: ", "prompting, improved", "clamp            - add"),
    "dose_choice": ("3 concepts, means", "means, one KL   - means, one dose"),
    "cards": ("random directions declared to steer", "longest card"),
}
ASKED = {"cards": ["--features", "1", "--random", "1"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAID)
def test_studies_of_the_starter_run_at_small_size(name, starter, labelled, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, *ASKED.get(name, ["--small"])])
    monkeypatch.syspath_prepend(SCRIPTS / "studies")
    runpy.run_path(str(SCRIPTS / "studies" / f"{name}.py"))
    told = capsys.readouterr().out
    assert all(text in told for text in SAID[name]), told
