"""A talk in a terminal: a pseudo-terminal types, and reads what a person would see."""

import io
import os
import pty
import re
import select
import sys
import time

import pytest

from tests.conftest import command, make_llama
from tests.study.samples import direction

PROMPT = "you>"
CODES = re.compile(r"\x1b(?:\[[0-9;?]*[A-Za-z]|[=>]|\][^\x07]*\x07)")
FORGETFUL = (  # of earlier answers it shows the first three characters
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{{ m['content'][:3] if m['role'] == 'assistant' else m['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, *words: object, cache: object) -> None:
        self.pid, self.handle = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="xterm", COLUMNS="100", PROMPT_TOOLKIT_NO_CPR="1")
            os.environ["INTERP_STEER_CACHE"] = str(cache)
            os.execv(sys.executable, [sys.executable, "-m", "interp_steer", *map(str, words)])
        self.seen = ""

    def until(self, text: str, seconds: float = 90) -> str:
        """What came up to a text, without codes; fails if it does not come."""
        deadline = time.monotonic() + seconds
        while text not in (shown := CODES.sub("", self.seen)):
            assert time.monotonic() < deadline, f"no {text!r} in {shown!r}"
            if select.select([self.handle], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.handle, 65536).decode(errors="replace")
                except OSError:
                    raise AssertionError(f"it has ended: {shown!r}") from None
        before, _, self.seen = shown.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self.handle, text.encode())

    def end(self) -> int:
        """Its exit code."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if select.select([self.handle], [], [], 0.1)[0]:
                try:
                    os.read(self.handle, 65536)
                except OSError:
                    break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    direction().save(folder / "d.safetensors")
    return folder


def test_a_talk(place, tiny_folder):
    """Lines of earlier talks, /help, /steer, a mistake, a pasted text, Ctrl-C, how it ends."""
    history = place / "cache" / "chat" / "history"
    history.parent.mkdir(parents=True)
    history.write_text("\n# 2026-01-01 12:00:00\n+/steer of an earlier talk\n")
    talk = Terminal(
        "chat", "--model", tiny_folder, "--direction", f"d={place}/d.safetensors",
        "--temperature", "0", "--max-new-tokens", "400", cache=place / "cache",
    )  # fmt: skip
    begun = talk.until(PROMPT)
    assert "Nothing is steered" in begun and "/help" in begun
    talk.type("\x1b[A")  # arrow up
    talk.until("/steer of an earlier talk")
    talk.type("\x15/help\r")
    told = talk.until("Ctrl-C ends an answer")
    assert "/steer LINE" in told and "/quit" in told
    talk.type("/ster\r")
    talk.until("unknown /ster; nearest: /steer")
    talk.type("/steer add(d, 3) at 2\r/steer\r")
    talk.until("Steered by add(d@")
    # a pasted text of several lines is one question, and Ctrl-C ends its answer alone
    talk.type("\x1b[200~I love\nthe rain\x1b[201~")
    talk.until("the rain")
    talk.type("\r")
    talk.until("unsteered")
    talk.type("\x03")  # the terminal makes a signal of it
    talk.until("(stopped")
    talk.type("/steer off\r/steer\r")
    talk.until("Nothing is steered")
    talk.until(PROMPT)
    talk.type("\x03")
    talk.until("Ctrl-C again")
    talk.until(PROMPT)
    talk.type("\x03")
    assert talk.end() == 0
    kept = [line for line in history.read_text().splitlines() if line.startswith("+")]
    assert kept[:2] == ["+/steer of an earlier talk", "+/help"]
    assert kept[-4:] == ["+I love", "+the rain", "+/steer off", "+/steer"]


def test_a_template_that_shortens_answers_is_told(tmp_path, monkeypatch):
    """The second question is answered by a model that does not read its whole first answer."""
    import json

    model = make_llama(tmp_path / "m")
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": FORGETFUL}))
    for file in model.glob("chat_template*"):
        file.write_text(FORGETFUL)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Name three fruits.\nAnd now?\n"))
    out, err = command("chat", "--model", model, "--max-new-tokens", "12", "--temperature", "0")
    assert out.count("[unsteered]") == 2
    assert err.count("leaves out parts of earlier answers") == 1


def test_a_context_that_fills_up_is_told(changed_config, monkeypatch):
    """Of 96 tokens a long question leaves few, a second one beside the first none."""
    model = changed_config(max_position_embeddings=96)
    long = "Name three fruits, and the tallest mountain, and who climbed it first?"
    lines = f"{long}\n{long} {long}\n/reset\n{long} {long}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    out, err = command("chat", "--model", model, "--max-new-tokens", "60", "--temperature", "0")
    told = [line for line in out.splitlines() if line.startswith("(")]
    assert told == ["(cut: the context is full; /reset begins a new conversation)"]
    assert out.count("[unsteered]") == 2 and out.endswith(f"{told[0]}\n")
    (told,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "the context of" in told and told.endswith("; /reset begins a new conversation")
