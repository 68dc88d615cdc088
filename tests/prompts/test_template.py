"""Chat templates of many kinds: tokens as transformers', and contents where they stand."""

import datetime
import io
import json
import sys

import pytest
import torch

from interp_steer.cli.steering import chat as conversation
from interp_steer.engine.engine import Engine
from interp_steer.engine.hooks import fwd_hooks
from interp_steer.engine.row import Row, Sampling
from interp_steer.errors import RequestError
from interp_steer.prompts.prompt import chat
from interp_steer.prompts.template import DATE, Template
from interp_steer.steering.contrast import Contrast
from interp_steer.steering.direction import Direction
from interp_steer.steering.grammar import parse
from tests.conftest import TEMPLATE
from tests.prompts.tokenizers_at_hand import byte_level, small

LLAMA_31 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}"
    "{%- endif %}{%- if messages[0]['role'] == 'system' %}"
    "{%- set system = messages[0]['content']|trim %}{%- set messages = messages[1:] %}"
    "{%- else %}{%- set system = '' %}{%- endif %}{{- '<|head|>system\n\n' }}"
    "{{- 'Today Date: ' + date_string + '\n\n' }}{{- system }}{{- '<|eot|>' }}"
    "{%- for m in messages %}{{- '<|head|>' + m['role'] + '\n\n' }}"
    "{{- m['content'] | trim + '<|eot|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|head|>assistant\n\n' }}{%- endif %}"
)
LLAMA_32 = LLAMA_31.replace(
    "{%- set date_string = '26 Jul 2024' %}",
    "{%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}",
)
SYSTEM_FIRST = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system = false %}{% endif %}{% for m in loop_messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
)
TEMPLATES = {
    "llama 2": SYSTEM_FIRST
    + "{% if loop.index0 == 0 and system is not false %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}{% else %}"
    "{{ ' ' + content | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
    "mistral": "{{ bos_token }}"
    + SYSTEM_FIRST
    + "{% if m['role'] == 'user' %}{% if loop.last and system %}"
    "{{ '[INST] ' + system + '\n\n' + m['content'] + ' [/INST]' }}{% else %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% else %}"
    "{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
    "llama 3": LLAMA_31,
    "a default system prompt": "{% for m in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|head|>system\nBe kind<|eot|>\n' }}{% endif %}"
    "{{ '<|head|>' + m['role'] + '\n' + m['content'] + '<|eot|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant\n' }}{% endif %}",
    "deepseek r1": "{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set ns.system = m['content'] %}{% endif %}{% endfor %}"
    "{{ bos_token }}{{ ns.system }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<|user|>' + m['content'] }}{% endif %}{% if m['role'] == 'assistant' %}"
    "{% set content = m['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|head|>' + content + '<|eot|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|><think>\n' }}{% endif %}",
    "qwen 3": "{%- if tools %}{{- 'tools: ' + tools | tojson }}{%- endif %}"
    "{%- set ns = namespace(multi_step_tool=true, last=messages|length - 1) %}"
    "{%- for m in messages[::-1] %}{%- set i = messages|length - 1 - loop.index0 %}"
    "{%- if ns.multi_step_tool and m.role == 'user' and not "
    "(m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}"
    "{%- set ns.multi_step_tool = false %}"
    "{%- set ns.last = i %}{%- endif %}{%- endfor %}{%- for m in messages %}"
    "{%- set content = m.content %}{%- if m.role == 'assistant' %}{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}"
    "{%- if loop.index0 > ns.last %}{%- set content = '<think>\n' + thought + '\n</think>\n\n' + "
    "content %}{%- endif %}{%- endif %}{%- endif %}"
    "{{- '<|head|>' + m.role + '\n' + content }}"
    "{%- if m.tool_calls %}{{- m.tool_calls | tojson }}{%- endif %}{{- '<|eot|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|head|>assistant\n' }}{%- endif %}",
    "upper case": "{% for m in messages %}{{ '<|head|>' + m.role | upper + ': ' + "
    "m.content | upper + '\n' }}{% endfor %}",
    "escaped": "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + {'from': m.role, 'value': "
    "m.content} | tojson + '<|eot|>' }}{% endfor %}",
    "by length": "{% for m in messages %}{{ '<|head|>' + m.role + (' says: ' if m.content | length "
    "< 19 else ' explains: ') + m.content + '\n' }}{% endfor %}",
    "system again and again": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '(' + messages[0].content + ') ' + m.content }}{% elif m.role == 'assistant' %}"
    "{{ '<|head|>' + m.content + eos_token }}{% endif %}{% endfor %}",
    "a trailing space": "{% for m in messages %}{{ m.role + ' ' + m.content.rstrip() + ' \n' }}"
    "{% endfor %}",
}  # fmt: skip
UNKNOWN = "{% for m in messages %}{{ '<|head|>' + m.content | urlencode + '\n' }}{% endfor %}"
SAID = [
    ("system", "You are helpful. "),
    ("user", "Name <b>three</b> \"fruits\".\n"),
    ("assistant", "<think>\nthe fox, the dog\n</think>\n\nThe quick, the lazy, the dog."),
    ("user", " What is the tallest mountain? "),
    ("assistant", "I love the rain."),
    ("user", "Yes, no, maybe?"),
]  # fmt: skip
THOUGHTLESS = ("deepseek r1", "qwen 3")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level(llama3=True, additional_special_tokens=["<|head|>", "<|user|>"])


def with_template(tokenizer, source):
    tokenizer.chat_template = source
    return small(tokenizer)


def theirs(tokenizer, messages, **more):
    opened = messages[-1][0] == "assistant"
    return tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages],
        tokenize=True,
        return_dict=False,
        add_generation_prompt=not opened,
        continue_final_message=opened,
        **more,
    )


def content_of(model, one):
    pairs = zip(one.ids, one.content, strict=True)
    return model.tokenizer.decode([token for token, own in pairs if own])


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("system", [True, False])
def test_three_turns_equal_transformers(tokenizer, kind, system):
    model = with_template(tokenizer, TEMPLATES[kind])
    said = SAID if system else SAID[1:]
    for turns in (2, 4, 6):
        messages = tuple(said[: turns - (not system)])
        assert list(model.encode(messages).ids) == theirs(tokenizer, messages)
    opened = (*said[: 2 - (not system)], ("assistant", "I love"))
    if kind == "upper case" or (kind == "mistral" and system):
        # transformers refuses the one too; the other shows a system prompt before a question alone
        why = "refuses these messages" if kind == "upper case" else "leaves out what the system"
        with pytest.raises(RequestError, match=why):
            model.encode(opened)
    else:
        one = model.encode(opened)
        assert list(one.ids) == theirs(tokenizer, opened)
        assert tokenizer.decode(one.ids[one.answer :]).lstrip() == "I love"
    with pytest.raises(RequestError, match="empty"):
        model.encode((("user", "  "),))


@pytest.mark.parametrize("kind", TEMPLATES)
def test_contents_are_found_in_every_template(tokenizer, kind):
    model = with_template(tokenizer, TEMPLATES[kind])
    one = model.encode(tuple(SAID))
    assert one.located
    mine = [content.strip() for _, content in SAID]
    if kind in THOUGHTLESS:
        mine[2] = "The quick, the lazy, the dog."
    if kind == "upper case":
        mine = [content.upper() for content in mine]
    if kind == "escaped":
        mine = [content.replace('"', '\\"').replace("\n", "\\n") for content in mine]
    if kind == "mistral":  # the system prompt stands in the last message
        mine = [*mine[1:5], mine[0], mine[5]]
    if kind == "system again and again":
        mine = [mine[0], mine[1], mine[2], mine[0], mine[3], mine[4], mine[0], mine[5]]
    squeezed = "".join("".join(mine).split())
    found = "".join(content_of(model, one).split())
    # a token may hold the template's neighbouring character too
    assert len(found) - len(squeezed) <= 6
    position = 0
    for part in mine:
        part = "".join(part.split())
        position = found.find(part, position)
        assert position >= 0, (part, found)
        position += len(part)


def test_what_cannot_be_found_is_refused_only_where_it_is_asked_for(tokenizer):
    model = with_template(tokenizer, UNKNOWN)
    messages = tuple(SAID)
    one = model.encode(messages)
    assert list(one.ids) == theirs(tokenizer, messages)
    assert not one.located and not any(one.content)
    known = {"d": Direction.of(torch.ones(model.d_model), "blocks.0.hook_resid_post")}
    engine, sampling = Engine(model), Sampling(max_new_tokens=2)
    for scope in ("all", "prompt", "last", "generated", "positions 1-3"):
        steer = parse(f"add(d, 3) at 0 on {scope}", known)
        assert engine.generate([Row(messages, steer, sampling)])[0].finish
        assert engine.score([Row(messages, steer)], [" Yes"])[0].logprobs.isfinite().all()
    steer = parse("add(d, 3) at 0 on content", known)
    for run in (
        lambda: engine.generate([Row(messages, steer, sampling)]),
        lambda: engine.score([Row(messages, steer)], [" Yes"]),
        lambda: fwd_hooks(model, steer, messages),
    ):
        with pytest.raises(RequestError, match="content cannot be told"):
            run()
    Contrast.measure(model, [messages], [chat("I love")], "mean")
    with pytest.raises(RequestError, match="refuses these messages"):
        Contrast.measure(model, [chat("a", answer="I <love>")], [chat("a")], "mean")


def test_a_message_that_a_template_leaves_out_is_said(tokenizer):
    source = (
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}\n{% endif %}{% endfor %}"
    )
    model = with_template(tokenizer, source)
    assert list(model.encode(tuple(SAID[1:])).ids) == theirs(tokenizer, SAID[1:])
    with pytest.raises(RequestError, match="leaves out what the system says"):
        model.encode(tuple(SAID))


@pytest.mark.parametrize("kind", ["deepseek r1", "qwen 3", "llama 2"])
def test_a_talk_goes_on_after_a_shortened_answer(tokenizer, kind, monkeypatch, capsys):
    """The model's own answers hold `</think>`, and the template drops what is before it."""
    model = with_template(tokenizer, TEMPLATES[kind])
    seen = []
    text = "<think>so</think> Yes, no."

    def stream(self, rows):
        seen.append([row.prompt for row in rows])
        yield 0, text, "stop"

    monkeypatch.setattr(Engine, "stream", stream)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nAnd then?\nAnd now?\n/quit\n"))
    conversation.hold(model, (), {}, "", Sampling(max_new_tokens=3), 0)
    assert "error" not in capsys.readouterr().err
    assert len(seen) == 3 and len(seen[2][0]) == 6
    assert seen[2][0][:3] == (("system", ""), ("user", "Hello"), ("assistant", text))


def test_an_empty_system_prompt_is_one_everywhere(tokenizer):
    model = with_template(tokenizer, TEMPLATES["a default system prompt"])
    empty, none = model.encode(chat("I love", "")), model.encode(chat("I love"))
    assert list(empty.ids) == theirs(tokenizer, [("system", ""), ("user", "I love")])
    assert list(none.ids) == theirs(tokenizer, [("user", "I love")])
    assert empty.ids != none.ids


# --- the date ---------------------------------------------------------------------------------


class Clock(datetime.datetime):
    """A clock that says another day."""

    @classmethod
    def now(cls, tz=None):
        return cls(2031, 5, 6, 7, 8, 9)


def test_prompts_and_keys_are_the_same_on_any_day(tokenizer, monkeypatch):
    from transformers.utils import chat_template_utils

    model, said = with_template(tokenizer, LLAMA_32), chat("I love")
    assert model.date == DATE == datetime.date(2024, 7, 26)
    today, key = model.encode(said), Row(said).key(model)
    assert "Today Date: 26 Jul 2024\n" in today.text
    assert list(today.ids) == theirs(tokenizer, said, date_string="26 Jul 2024")
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    assert "06 May 2031" in tokenizer.decode(theirs(tokenizer, said))  # the clock has changed
    tomorrow = with_template(tokenizer, LLAMA_32)
    assert tomorrow.encode(said).ids == today.ids and Row(said).key(tomorrow) == key
    tomorrow.date = "2031-05-06"
    assert tomorrow.date == datetime.date(2031, 5, 6)
    assert list(tomorrow.encode(said).ids) == theirs(tokenizer, said)
    assert Row(said).key(tomorrow) != key
    with pytest.raises(RequestError, match="date is 'monday', expected such as 2024-07-26"):
        tomorrow.date = "monday"


def test_templates_that_do_not_ask_the_clock_stay_as_they_are(tokenizer):
    for source in (TEMPLATE, TEMPLATES["a default system prompt"]):
        model = with_template(tokenizer, source)
        before = model.encode(chat("I love")).ids
        assert model.date is None and list(before) == theirs(tokenizer, chat("I love"))
        model.date = datetime.date(2031, 5, 6)
        assert model.encode(chat("I love")).ids == before
    model = with_template(tokenizer, LLAMA_31)  # brings its own date
    assert model.date is None
    assert list(model.encode(chat("I love")).ids) == theirs(tokenizer, chat("I love"))
    model.date = "2031-05-06"
    expected = theirs(tokenizer, chat("I love"), date_string="06 May 2031")
    assert list(model.encode(chat("I love")).ids) == expected


def test_every_way_to_ask_the_clock(tokenizer, monkeypatch):
    from transformers.utils import chat_template_utils

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    monkeypatch.setattr(Clock, "now", classmethod(lambda cls, tz=None: cls(2031, 5, 6)))
    asked = "%Y-%m-%d|%B %d, %Y|%A %-d %b %y|%H:%M:%S %p|%j %U|%F|%x"
    source = (
        "\n  {% set form = '" + asked + "' %}"
        "{% macro said() %}{{ strftime_now(form) }}{% endmacro %}"
        "{% if true %}{% set today = strftime_now('%d %b %Y') %}{% endif %}"
        "{% for m in messages %}{{ said() + today + m.content }}\n  {% endfor %}"
    )  # fmt: skip
    tokenizer.chat_template = source
    messages = [("user", "I love")]
    told = Template(tokenizer, "", datetime.date(2031, 5, 6)).apply(messages)
    assert told == tokenizer.apply_chat_template(
        [{"role": "user", "content": "I love"}], tokenize=False, add_generation_prompt=True
    )


STUDY = """
directions: {{d: d.safetensors}}
prompts: {{choose: [I love the fox], prove: [I hate the rain, Name three]}}
sites: 0
coefficients: [2.0]
metrics: [length]
sampling: {{max_new_tokens: 2}}
controls: {{random: 1, features: 0, shuffled: 0}}
{date}
"""


def test_a_run_goes_on_the_next_day_and_says_if_its_date_is_another(
    tokenizer, monkeypatch, tmp_path
):
    from transformers.utils import chat_template_utils

    from interp_steer.study.file import StudyFile

    model = with_template(tokenizer, LLAMA_32)
    Direction.of(torch.ones(model.d_model), "blocks.0.hook_resid_post").save(
        tmp_path / "d.safetensors"
    )
    (tmp_path / "s.yaml").write_text(STUDY.format(date=""))
    file, folder = StudyFile.read(tmp_path / "s.yaml"), tmp_path / "run"
    done = file.study(model).run(model, folder)
    before = (folder / "rows.jsonl").read_text()
    assert done.manifest["date"] == "2024-07-26"
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    model = with_template(tokenizer, LLAMA_32)
    file.study(model).run(model, folder)
    StudyFile.read(folder / "study.yaml").study(model).run(model, folder)
    assert (folder / "rows.jsonl").read_text() == before

    (tmp_path / "s.yaml").write_text(STUDY.format(date="date: 2031-05-06"))
    dated = StudyFile.read(tmp_path / "s.yaml")
    study = dated.study(model)
    assert str(model.date) == "2031-05-06"
    with pytest.raises(RequestError, match="say 2024-07-26, and these say 2031-05-06"):
        study.run(model, folder)
    assert (folder / "rows.jsonl").read_text() == before
    other = study.run(model, tmp_path / "other")
    assert not set(other.rows) & set(done.rows)
    assert str(dated.dated("2024-07-26").study(model) and model.date) == "2024-07-26"

    # a run from before dates were fixed, begun on a day of its own
    manifest = json.loads((tmp_path / "other" / "manifest.json").read_text())
    del manifest["date"]
    manifest["written_at"] = "2031-05-06T07:08:09+00:00"
    (tmp_path / "other" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RequestError, match="go on with --date 2031-05-06"):
        file.study(model).run(model, tmp_path / "other")
    again = dated.study(model).run(model, tmp_path / "other")
    assert set(again.rows) == set(other.rows)
    (tmp_path / "s.yaml").write_text(STUDY.format(date="date: today"))
    with pytest.raises(RequestError, match="date is 'today', expected such as 2024-07-26"):
        StudyFile.read(tmp_path / "s.yaml")


@pytest.mark.parametrize("kind", ["llama 3", "a default system prompt", "mistral"])
def test_an_answer_that_says_nothing_is_no_answer_that_was_begun(tokenizer, kind):
    """transformers cuts the line's end behind the answer's head off, where templates trim."""
    model = with_template(tokenizer, TEMPLATES[kind])
    with pytest.raises(RequestError, match="the assistant's answer is empty; leave it out"):
        model.encode(chat("I love", answer=""))
    try:
        one = model.encode(chat("I love", answer=" \n"))
    except RequestError as error:
        assert "rewrites the assistant's answer" in str(error)
    else:
        assert one.text.endswith(" \n")
