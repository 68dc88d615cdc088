"""The command line as a person meets it, in this process where nothing asks for another."""

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from interp_steer.cli import main as cli
from tests.conftest import command, error

DATA = Path(__file__).parents[2] / "interp_steer" / "data" / "demo_texts"


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "interp_steer", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )


def test_a_direction_is_shown_by_its_name_or_its_path(tmp_path, monkeypatch, capsys):
    from interp_steer.steering.direction import Direction

    monkeypatch.setenv("INTERP_STEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    stored = Direction.of(torch.eye(4)[0], "blocks.1.hook_resid_post", "joy")
    other = Direction.of(torch.eye(4)[1], "blocks.2.hook_resid_post", "joy")
    stored.save(tmp_path / "cache" / "directions" / "joy.safetensors")

    def shown(name: str) -> str:
        monkeypatch.setattr(sys, "argv", ["interp-steer", "direction", "show", name])
        with contextlib.suppress(SystemExit):
            cli.main()
        return capsys.readouterr().out

    assert shown("joy").startswith(stored.label)
    other.save(tmp_path / "joy.safetensors")
    assert shown("./joy.safetensors").startswith(other.label)
    assert "stored direction" in error(2, "direction", "show", "joy")
    assert "nearest: joy" in error(2, "direction", "show", "joyy")
    (tmp_path / "joy.safetensors").write_bytes(b"x")
    assert "joy.safetensors is damaged" in error(1, "direction", "show", "joy.safetensors")


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory) -> tuple[str, str]:
    """A direction made by the command line: (model folder, file)."""
    file = tmp_path_factory.mktemp("made") / "tower.safetensors"
    done = run(
        "direction", "make", "--model", str(tiny_folder), "--name", "tower", "--out", str(file),
        "--positive", str(DATA / "positive.txt"), "--negative", str(DATA / "negative.txt"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tower@" in done.stdout and str(file) in done.stdout
    return str(tiny_folder), str(file)


def test_help_is_quick():
    run("--help")
    begun = time.monotonic()
    done = run("--help")
    # the bar is 0.5 s on an idle machine; a heavy import would cost 5
    assert time.monotonic() - begun < 2
    assert "demo" in done.stdout and "verify" in done.stdout


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom interp_steer.cli import main\nsys.argv = ['interp-steer', '--help']\n"
        "try:\n    main.main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'transformer_lens', 'sae_lens', 'pandas', 'requests'}\n"
        "print('LOADED', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_generate_prints_records(made):
    model, file = made
    out, _ = command(
        "generate", "--model", model, "--direction", f"tower={file}", "--json",
        "--prompt", "Name three fruits.", "--prompt", "The quick brown fox",
        "--steer", "add(tower, 0.5 dose) at 2-3; ablate(tower) at 5",
        "--steer", "clamp(tower, 2) at 1", "--max-new-tokens", "6",
    )  # fmt: skip
    records = json.loads(out)
    assert len(records) == 6
    for i in (0, 3):  # each prompt's unsteered row comes first
        assert records[i]["steer"] is records[i]["coefficient"] is records[i]["dose"] is None
    for record in records:
        assert set(record) == {
            "prompt", "steer", "text", "tokens", "token_ids", "coefficient", "dose",
        }  # fmt: skip
        assert record["tokens"] == len(record["token_ids"]) <= 6
    steered = records[1]
    assert steered["dose"] == pytest.approx([0.5, 0.5, 0.0], rel=1e-5)  # lengths have six digits
    assert steered["coefficient"][0] != steered["coefficient"][1]  # each layer has its own scale
    assert steered["steer"].count("tower@") == 3
    assert records[2]["coefficient"] == [2.0] and records[2]["dose"][0] > 0
    assert [r["prompt"] for r in records[::3]] == ["Name three fruits.", "The quick brown fox"]


def test_a_record_runs_again_from_its_own_line(made, tmp_path):
    model, file = made
    words = ["generate", "--model", model, "--direction", f"tower={file}", "--json"]
    words += ["--prompt", "The fox", "--max-new-tokens", "5", "--temperature", "0.9", "--seed", "4"]
    first = json.loads(command(*words, "--steer", "add(tower, 0.7 dose) at 1")[0])
    again = json.loads(command(*words, "--steer", first[1]["steer"])[0])
    assert again == first


def test_generate_writes_a_file(made, tmp_path):
    model, file = made
    out = tmp_path / "out.json"
    command(
        "generate", "--model", model, "--prompts", str(DATA / "choose.txt"),
        "--steer", f"add({file}, 1) at 1", "--max-new-tokens", "3", "--out", str(out),
    )  # fmt: skip
    assert len(json.loads(out.read_text())) == 16
    assert os.listdir(tmp_path) == ["out.json"]


def test_direction_show(made):
    _, file = made
    assert "mean-difference" in command("direction", "show", file)[0]
    shown = json.loads(command("direction", "show", file, "--json")[0])
    assert [m["hook_point"] for m in shown] == [f"blocks.{n}.hook_resid_post" for n in range(6)]


def test_verify_passes_on_a_llama_31_shape(tiny_folder):
    # a process of its own: the tests' type checks make it three times as long
    done = run("verify", "--model", str(tiny_folder), "--json")
    assert done.returncode == 0, done.stdout
    found = json.loads(done.stdout)
    assert found["passed"] and found["model"] == str(tiny_folder)
    assert len(found["checks"]) >= 15
    for check in found["checks"]:
        assert set(check) == {"name", "passed", "difference", "tolerance"}


def test_chat_answers_and_goes_on_after_a_mistake(made, monkeypatch):
    model, file = made
    lines = "Name three fruits.\n/steer add(tower, 2) at 77\n/nonsense\nAnd now?\n/quit\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    out, err = command(
        "chat", "--model", model, "--max-new-tokens", "4",
        "--direction", f"tower={file}", "--steer", "add(tower, 2) at 2",
    )  # fmt: skip
    assert out.count("[unsteered]") == 2 and out.count("[add(tower, 2.0) at 2]") == 2
    assert "layers 0-5" in err and "/nonsense" in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--steer", "add(tower, 1) at 6"], "layers 0-5"),
        (["--steer", "add(tower, 0.5 dose) at 99"], "layers 0-5"),
        (["--steer", "add(tower, 2 raw) at 99"], "layers 0-5"),
        (["--steer", "add(narrow, 1) at 2"], "is 63 wide"),
        (["--steer", "add(tower, nan) at 2"], "nan, not a number"),
        (["--steer", "add(tower, 1) a 2"], "at column 15: expected 'at'"),
        (["--steer", "add(towr, 1) at 2"], "nearest: tower"),
        (["--steer", "add(tower, 1 dose) at z 1h1"], "is 64 wide"),
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "fox " * 600], "tokens long and the context"),
        (["--prompts", "/none.txt"], "no prompt file"),
        (["--model", "startr"], "nearest: starter"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--temperature", "warm"], "Invalid value for '--temperature'"),
        (["--nonsense", "1"], "No such option: --nonsense"),
        (["--max-new-tokens", "4000"], "exceed the context"),
        (["--direction", "tower"], "expected NAME=FILE"),
        (["--device", "cuda:9"], "not available"),
        (["--out", "/none/x.json"], "no folder"),
        (["--out", "/tmp"], "is a folder"),
        (["--batch", "-1"], "batch is -1"),
        (["--top-k", "99999999999999999999"], "top_k is"),
        (["--steer", f"add({'x' * 300}, 1) at 1"], "unknown direction"),
        (["--steer", "add(~nobody-of-that-name/a, 1) at 1"], "unknown direction"),
        (["--steer", f"add(tower, 1) at {'9' * 5000}"], ": expected the end, found"),
        (["--prompt", "bad \udcff byte"], "no Unicode character"),
    ],
)
def test_wrong_requests_are_one_line_and_exit_2(made, tmp_path, words, expected):
    import torch

    from interp_steer.steering.direction import Direction

    model, file = made
    Direction.of(torch.ones(63), "blocks.0.hook_resid_post", "narrow").save(
        tmp_path / "n.safetensors"
    )
    fixed = ["--prompt", "Hello"] if not words[0].startswith("--prompt") else []
    fixed += [] if "--model" in words else ["--model", model]
    if "--direction" not in words:
        fixed += ["--direction", f"tower={file}", "--direction", f"narrow={tmp_path}/n.safetensors"]
    assert expected in error(2, "generate", *fixed, *words)


def test_other_wrong_requests(made, tmp_path):
    model, _ = made
    sides = ["--positive", str(DATA / "positive.txt"), "--negative", str(DATA / "negative.txt")]
    make = ["direction", "make", "--model", model]
    assert "nearest: mean-difference" in error(2, *make, *sides, "--method", "mean-diff")
    assert "layers 0-5" in error(2, *make, *sides, "--layer", "9")
    assert "unknown position" in error(2, *make, *sides, "--position", "first")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    assert "no prompts" in error(2, *make, "--positive", str(empty), *sides[2:])
    assert "not a direction" in error(2, "direction", "show", f"{model}/model.safetensors")
    assert "unknown model" in error(2, "verify", "--model", str(tmp_path / "none"))
    assert "No such command 'steer'" in error(2, "steer")


def test_an_error_is_one_line_in_a_process_of_its_own(tiny_folder):
    # of this kind because the tests' type checks would read the file too early
    given = ["--direction", "tower=/none.safetensors", "--steer", "add(tower, 1) at 1"]
    done = run("generate", "--model", str(tiny_folder), "--prompt", "x", *given)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "error: no direction file /none.safetensors"


def test_failures_exit_1(made, tmp_path):
    _, file = made
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(Path(file).read_bytes()[:200])
    assert "damaged" in error(1, "direction", "show", str(damaged))
    assert "no network" in error(1, "verify", "--model", "someone/model")


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    """On a file system of 64 kB, where the system lets us make one."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(small)]).returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        import torch

        from interp_steer.errors import RunError
        from interp_steer.steering.direction import Direction, DirectionSet

        many = DirectionSet(
            Direction.of(torch.randn(4096), f"blocks.{n}.hook_resid_post") for n in range(32)
        )
        with pytest.raises(RunError, match="the disk is full"):
            many.save(small / "big.safetensors")
        assert os.listdir(small) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_one_line(made):
    code = f"{sys.executable} -m interp_steer direction show {made[1]} > /dev/full"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "cannot write the output" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_leaves_early_is_no_error(made):
    # nobody reads any more when the first line is written
    show = f"{sys.executable} -m interp_steer direction show {made[1]}"
    code = f"{show} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize(
    "words",
    [
        ["labels", "show", "--fetch", "gpt2-small/6-res-jb/650"],
        ["labels", "sync", "gpt2-small/6-res-jb"],  # other threads wait for the server
    ],
)
def test_an_interrupt_is_said_in_one_line(tmp_path, words):
    """SIGINT to a process in the midst of its work: waiting for a server that says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        told = {"NEURONPEDIA_URL": address, "NEURONPEDIA_EXPORTS_URL": address}
        process = subprocess.Popen(
            [sys.executable, "-m", "interp_steer", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **told, "INTERP_STEER_CACHE": str(tmp_path)},
            # a shell's background jobs ignore it, and so would their children
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        try:
            connection, _ = server.accept()  # it has begun
            with connection:
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=5)
        finally:
            process.kill()
    assert process.returncode == 130
    assert out == "" and err.splitlines()[-1] == "error: stopped" and "Traceback" not in err


@pytest.mark.parametrize("closed", [">&-", "2>&- >&-"])
def test_a_closed_output_is_one_line(closed):
    code = f"{sys.executable} -m interp_steer --help {closed}"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    said = "error: cannot write the output: stdout is closed\n" if closed == ">&-" else ""
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)


def test_errors_do_not_go_to_the_output_where_theirs_is_closed():
    code = f"{sys.executable} -m interp_steer nonsense 2>&-"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")


def test_a_reader_that_leaves_in_the_midst_is_no_error(capfd, monkeypatch):
    """The pipe breaks while a command prints, not only when all is flushed at the end."""
    reader, writer = os.pipe()
    os.close(reader)

    def print_much() -> None:
        for _ in range(10_000):
            print("a line that nobody reads")

    monkeypatch.setattr("interp_steer.cli.verify.verify", print_much)
    kept = os.dup(1)
    try:
        os.dup2(writer, 1)
        with os.fdopen(os.dup(1), "w") as stream, pytest.raises(SystemExit) as ended:
            monkeypatch.setattr(sys, "stdout", stream)
            monkeypatch.setattr(sys, "argv", ["interp-steer", "verify"])
            cli.main()
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    assert ended.value.code == 0


def test_an_error_of_a_file_is_not_called_one_of_the_output(monkeypatch, tmp_path):
    def read_nothing() -> None:
        (tmp_path / "none").read_text()

    monkeypatch.setattr("interp_steer.cli.verify.verify", read_nothing)
    assert error(1, "verify") == f"error: {tmp_path}/none: No such file or directory"


def test_sides_that_hardly_differ_and_files_that_were_there_are_told(tiny_folder, tmp_path):
    for side, letter in (("up", "A"), ("down", "B")):
        (tmp_path / f"{side}.txt").write_text(f"{'The quick brown fox. ' * 40}({letter})\n")
    files = ["--positive", tmp_path / "up.txt", "--negative", tmp_path / "down.txt"]
    out = tmp_path / "d.safetensors"
    words = ["direction", "make", *files, "--model", tiny_folder, "--out", out]

    def told(*more) -> str:
        said, err = command(*words, *more)
        assert f"add({out}, 0.5 dose)" in said
        return err

    first = told()
    assert "hardly differ" in first and "--position answer" in first and "was there" not in first
    again = told("--position", "answer")
    assert "d.safetensors was there; it holds the new direction now" in again
    assert "hardly differ" not in again


@pytest.mark.parametrize("words", [[], ["labels"], ["study"], ["features"], ["direction"], ["sae"]])
def test_a_group_without_a_command_shows_its_help(words):
    out, err = command(*words)
    assert err == "" and out.startswith("Usage: ") and len(out.splitlines()) > 8


def test_an_error_with_a_long_text_of_its_users_is_cut():
    assert error(2, "verify", "--model", "x" * 10**6).count("x") <= 2000


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_begins_its_help_with_what_the_list_says(name):
    first = command(name, "--help")[0].split("\n\n")[1]  # behind the usage
    assert " ".join(first.split()) == cli.COMMANDS[name][1]
    assert cli.COMMANDS[name][1] in command("--help")[0]


def test_version():
    import interp_steer

    assert command("--version") == (f"interp-steer {interp_steer.__version__}\n", "")
    assert command("-V") == command("--version")
    assert "nearest: --version" in error(2, "--verion")
