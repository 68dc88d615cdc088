"""A talk in a terminal: a pseudo-terminal types, and reads what a person would see."""

import io
import os
import pty
import re
import select
import signal
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
    """/help, /steer, a mistake, Ctrl-C in an answer and at the prompt, history of earlier talks."""
    words = ("chat", "--model", tiny_folder, "--direction", f"d={place}/d.safetensors",
             "--temperature", "0", "--max-new-tokens", "480")  # fmt: skip
    talk = Terminal(*words, cache=place / "cache")
    begun = talk.until(PROMPT)
    assert "Nothing is steered" in begun and "/help" in begun
    talk.type("/help\r")
    told = talk.until("Ctrl-C ends an answer")
    assert "/steer LINE" in told and "/quit" in told
    talk.type("/ster\r")
    talk.until("unknown /ster; nearest: /steer")
    talk.type("/steer add(d, 3) at 2\r/steer\r")
    talk.until("Steered by add(d@")
    talk.type("Name three fruits\r")
    talk.until("unsteered")
    os.kill(talk.pid, signal.SIGINT)  # as a terminal does at Ctrl-C
    talk.until("(stopped")
    talk.type("/steer off\r/steer\r")
    talk.until("Nothing is steered")
    talk.until(PROMPT)
    talk.type("\x03")
    talk.until("Ctrl-C again")
    talk.until(PROMPT)
    talk.type("\x03")
    assert talk.end() == 0
    # another talk: arrow up brings the lines of the one before
    again = Terminal(*words, cache=place / "cache")
    again.until(PROMPT)
    again.type("\x1b[A")
    again.until("/steer")
    again.type("\x1b[A")
    again.until("off")
    again.type("\x15/quit\r")
    assert again.end() == 0


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
