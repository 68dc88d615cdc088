"""Prompts as messages, and that reading them needs no model."""

import json
import subprocess
import sys

import pytest

from interp_steer.errors import RequestError
from interp_steer.prompts.prompt import Encoded, chat, is_chat, readable

SCRIPT = """
import json, sys
from interp_steer import Item, chat, read_prompts
item = Item(chat("Name a tower."), positive=" Eiffel", negative=" Pisa")
assert read_prompts(sys.argv[1]) == ["Name a tower.", "Name a river."]
heavy = ("torch", "transformers", "transformer_lens", "sae_lens", "tokenizers", "safetensors")
print(json.dumps([name for name in heavy if name in sys.modules]))
"""


def test_an_item_and_a_prompt_file_need_no_model_library(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("Name a tower.\nName a river.\n")
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(file)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == []


def test_a_chat_holds_what_was_given():
    assert chat("Hi") == (("user", "Hi"),)
    whole = chat("Hi", "Be brief.", "Hello")
    assert whole == (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"))
    assert chat("Hi", "", "") == (("system", ""), ("user", "Hi"), ("assistant", ""))


@pytest.mark.parametrize(
    "prompt, expected",
    [
        (chat("Hi"), True),
        ((), True),
        ("Hi", False),
        ([("user", "Hi")], False),
        ((("user", "Hi", "again"),), False),
        ((("user", 1),), False),
        ((["user", "Hi"],), False),
    ],
)
def test_messages_are_a_tuple_of_pairs_of_texts(prompt, expected):
    assert is_chat(prompt) is expected


def test_text_of_broken_bytes_is_refused_with_its_place():
    assert readable("naïve ☃") == "naïve ☃"
    broken = b"ab\xff".decode("utf-8", "surrogateescape")
    with pytest.raises(RequestError, match="character 3 of the text"):
        readable(broken)


def test_the_text_is_no_part_of_a_prompts_identity():
    one, other = (Encoded((1, 2), (False, True), text=text) for text in ("a", "b"))
    assert one == other and hash(one) == hash(other)
    assert one != Encoded((1, 2), (True, True), text="a")
