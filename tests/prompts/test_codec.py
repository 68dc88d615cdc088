"""Text as token ids and back, for tokenizers of all kinds; transformers' ids are the reference."""

import numpy as np
import pytest
import torch

from interp_steer.causal.scores import Reading, first_tokens
from interp_steer.engine.engine import Engine
from interp_steer.engine.row import Row, Sampling
from interp_steer.errors import RequestError
from interp_steer.prompts.item import Item
from interp_steer.prompts.prompt import chat
from interp_steer.steering.direction import Direction
from interp_steer.study.metrics import METRICS, Measured
from tests.prompts.tokenizers_at_hand import (
    KINDS,
    USER_TURNS,
    sentencepiece,
    small,
    unigram,
    wordpiece,
)

PAIRS = [
    ("The capital of France is", " Paris"),
    ("Yes or no?\n", "Yes"),
    ("I love the", " tower, not the rain."),
    ("Answer:", " (A)"),
    ("Choose (", "A)"),
    ("Name three", "\nfruits"),
    ("The answer is ", "Paris"),
]


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    tokenizer = KINDS[request.param]()
    tokenizer.chat_template = USER_TURNS
    return small(tokenizer)


def joint(tokenizer, prompt, answer):
    """transformers' ids of a prompt, and of both; None where the one does not begin the other."""
    if isinstance(prompt, str):
        before, both = (tokenizer(text)["input_ids"] for text in (prompt, prompt + answer))
        if tokenizer.eos_token_id in before[-1:]:  # of the tokenizer, behind every text
            before, both = before[:-1], both[:-1]
    else:
        messages = [{"role": role, "content": content} for role, content in prompt]
        opened = prompt[-1][0] == "assistant"
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not opened,
            continue_final_message=opened,
        )  # fmt: skip
        before, both = (
            tokenizer(one, add_special_tokens=False)["input_ids"] for one in (text, text + answer)
        )
    return before, both[len(before) :] if both[: len(before)] == before else None


@pytest.mark.parametrize("form", ["plain", "chat", "open answer"])
def test_continuations_equal_those_of_the_joint_text(model, form):
    followed = alone = 0
    for said, answer in PAIRS:
        prompt = {"plain": said, "chat": chat(said), "open answer": chat("Well?", answer=said)}[
            form
        ]
        before, after = joint(model.tokenizer, prompt, answer)
        assert list(model.encode(prompt).ids) == before
        if after is None:
            with pytest.raises(RequestError, match="does not begin where the prompt ends"):
                model.encode_after(prompt, answer)
            continue
        followed += 1
        alone += model.tokenizer(answer, add_special_tokens=False)["input_ids"] != after
        assert list(model.encode_after(prompt, answer)) == after
        assert list(Engine(model).ids(prompt, answer)) == after
    assert followed >= 3
    if form == "plain" and type(model.tokenizer).__name__ == "LlamaTokenizer":
        assert alone >= 1  # read alone, an answer has other tokens


def test_what_cannot_follow_is_said_with_what_to_do(model):
    _, after = joint(model.tokenizer, "The answer is ", "Paris")
    if after is None:
        with pytest.raises(RequestError, match="end the prompt before ' '"):
            model.encode_after("The answer is ", "Paris")


def logprobs(model, ids, n):
    with torch.no_grad():
        logits = model.hf(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return [logits[i - 1, ids[i]].item() for i in range(n, len(ids))]


@pytest.mark.parametrize("legacy", [True, False])
def test_metrics_and_readings_read_the_tokens_of_the_joint_text(legacy):
    model = small(sentencepiece(legacy))
    items = [
        Item("Yes or no?\n", positive="Yes", negative="No"),
        Item("The capital of France is", positive=" Paris", negative=" Rome"),
    ]
    measured = Measured(Engine(model), [Row(i.prompt) for i in items], items)
    names = ("propensity", "propensity_per_token", "logit_difference")
    found = {name: METRICS[name](measured) for name in names}
    for n, item in enumerate(items):
        sides = [joint(model.tokenizer, item.prompt, a) for a in (item.positive, item.negative)]
        assert all(after for _, after in sides)
        read = [logprobs(model, [*before, *after], len(before)) for before, after in sides]
        (yes, no), (up, down) = read, (after for _, after in sides)
        assert found["propensity"][n] == pytest.approx(sum(yes) - sum(no), abs=1e-4)
        each = sum(yes) / len(yes) - sum(no) / len(no)
        assert found["propensity_per_token"][n] == pytest.approx(each, abs=1e-4)
        if up[0] != down[0]:
            assert found["logit_difference"][n] == pytest.approx(yes[0] - no[0], abs=1e-4)
            assert Reading.of(model, item).pair == (up[0], down[0])
    choices = ("No", "Yes", "Maybe")
    asked = [Item("Yes or no?\n", choices=choices, correct=0)]
    right = METRICS["accuracy"](Measured(Engine(model), [Row(asked[0].prompt)], asked))
    sums = []
    for choice in choices:
        before, after = joint(model.tokenizer, asked[0].prompt, choice)
        sums.append(sum(logprobs(model, [*before, *after], len(before))))
    assert right == [float(sums[0] == max(sums))]
    text = [Item("Yes or no?\n", continuation="Yes, no, maybe")]
    before, after = joint(model.tokenizer, text[0].prompt, text[0].continuation)
    own = logprobs(model, [*before, *after], len(before))
    found = METRICS["loss"](Measured(Engine(model), [Row(text[0].prompt)], text))
    assert found == [pytest.approx(-sum(own) / len(own), abs=1e-4)]


def test_a_word_begins_with_its_own_token(model):
    names = [model.tokenizer.convert_ids_to_tokens(token) for token in first_tokens(model, ["Yes"])]
    assert names and not {"▁", "Ġ", "<0x0A>", "Ċ"} & set(names)
    for prompt, form in (("I said", " Yes"), ("He said\n", "Yes")):
        _, after = joint(model.tokenizer, prompt, form)
        assert model.tokenizer.convert_ids_to_tokens(after[0]) in [*names, "▁", "Ġ"]
    with pytest.raises(RequestError, match="empty"):
        first_tokens(model, [" "])


def test_texts_of_completions_are_what_follows_the_prompt(model):
    """With the prompt before them, as pipelines cut it off; streamed pieces are the same text."""
    engine, tokenizer = Engine(model), model.tokenizer
    prompts = ("The capital of France is", chat("Yes or", answer="I love the"))
    sampling = Sampling(1.0, max_new_tokens=9)
    rows = [Row(prompt, (), sampling, seed) for seed in range(4) for prompt in prompts]
    results = engine.generate(rows)
    for row, result in zip(rows, results, strict=True):
        before = model.encode(row.prompt).ids
        texts = [
            tokenizer.decode([*before, *ids], skip_special_tokens=True)
            for ids in ((), result.token_ids)
        ]
        if "\ufffd" not in texts[1] and texts[1].startswith(texts[0]):
            assert result.text == texts[1][len(texts[0]) :]
    pieces = [""] * len(rows)
    for number, piece, _ in engine.stream(rows):
        pieces[number] += piece
    assert pieces == [result.text for result in results]
    word = tokenizer(" Paris", add_special_tokens=False)["input_ids"]
    word = [i for i in word if tokenizer.convert_ids_to_tokens(i) not in ("▁", "Ġ")]
    names = tokenizer.convert_ids_to_tokens(word)
    if names[0][0] in "▁Ġ":
        assert model.decode(word, "The capital of France is") == " Paris"
        assert model.decode_token(word[0])[0] == " "


def test_streamed_bytes_wait_until_they_are_sure():
    """A decoder with byte fallback gives up every byte of a run that is cut in a character."""
    model = small(sentencepiece(legacy=False))
    ids = [model.tokenizer.convert_tokens_to_ids(f"<0x{b:02X}>") for b in "日本".encode()]
    ids.append(model.tokenizer.convert_tokens_to_ids("▁love"))
    texts = [model.decode(ids[: n + 1], "a") for n in range(len(ids))]
    assert texts[2] == "日" and texts[-1] == "日本 love"
    assert not texts[3].startswith(texts[2])  # transformers' own text; so "日" may not be shown yet
    assert [model.pending(ids[: n + 1]) for n in range(len(ids))] == [True] * 6 + [False]


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_runs_is_the_text_of_all_its_tokens(kind):
    """At every token that is sure, over texts and over tokens drawn at random; bytes too."""
    model = small(KINDS[kind]())
    draw = np.random.default_rng(3)
    texts = "I love the tower. \u65e5\u672c na\u00efve \N{FOX FACE} the fox, the fox " * 6
    written = list(model.token_ids(texts))
    for after in ("The quick", chat("Hello")):
        for ids in (written, draw.integers(0, model.d_vocab, 200).tolist()):
            running, sure = model.running_text(after), 0
            for n, id in enumerate(ids):
                running.add(id)
                assert running.pending == model.pending(ids[: n + 1])
                if not running.pending:
                    assert running.text == model.decode(ids[: n + 1], after)
                    sure += 1
            assert running.text == model.decode(ids, after) and sure > 50
            assert len(running._tail) < 100  # what is decoded at a token does not grow


def test_what_a_tokenizer_puts_behind_a_text_is_left_out():
    for tokenizer in (unigram(), wordpiece()):
        model = small(tokenizer)
        end = tokenizer.eos_token_id
        assert tokenizer("The capital")["input_ids"][-1] == end
        ids = model.encode("The capital").ids
        assert list(ids) == tokenizer("The capital")["input_ids"][:-1]
        own = model.encode(f"The capital{tokenizer.eos_token}").ids  # the text's own stays
        assert own == (*ids, end)


@pytest.mark.parametrize("kind", ["llama3", "llama", "llama-legacy", "llama2-file", "wordpiece"])
def test_there_is_one_bos(kind):
    tokenizer = KINDS[kind]()
    model, bos = small(tokenizer), tokenizer.bos_token_id
    for text in ("I love the tower", f"{tokenizer.bos_token}I love the tower"):
        one = model.encode(text)
        assert one.ids[0] == bos and one.ids.count(bos) == 1
        assert one.content == (False, *[True] * (len(one.ids) - 1))
    given = tokenizer(f"{tokenizer.bos_token}I love", add_special_tokens=False)["input_ids"]
    assert list(model.encode(f"{tokenizer.bos_token}I love").ids) == given
    before = model.encode(f"{tokenizer.bos_token}I love").ids
    both = tokenizer(f"{tokenizer.bos_token}I love the", add_special_tokens=False)["input_ids"]
    after = model.encode_after(f"{tokenizer.bos_token}I love", " the")
    assert [*before, *after] == both
    for template in ("{{ bos_token }}{{ messages[0].content }}", "{{ messages[0].content }}"):
        tokenizer.chat_template = template
        said = small(tokenizer).encode(chat(f"{tokenizer.bos_token}I love"))
        assert said.ids.count(bos) == 1 and said.ids[0] == bos
    tokenizer.chat_template = "{{ messages[0].content }}"
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "I love"}], return_dict=False
    )
    assert list(small(tokenizer).encode(chat("I love")).ids) == expected  # a template without one


def test_every_id_that_ends_an_answer():
    tokenizer = sentencepiece(legacy=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|user|>"]})
    end, turn = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|turn|>")
    model = small(tokenizer)
    assert model.stop_ids == (end,)
    model = small(tokenizer)
    model.hf.generation_config.eos_token_id = 7
    assert model.stop_ids == (7, end)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}\n"
        "{% else %}{{ m.content }} <|turn|>\n{% endif %}{% endfor %}"
    )
    model = small(tokenizer)
    model.hf.generation_config.eos_token_id = [7, end]
    assert model.stop_ids == (7, end, turn)
    with torch.no_grad():  # of all tokens, it is now the turn's end that follows the prompt
        states = model.hf.model(torch.tensor([model.encode("I love").ids])).last_hidden_state
        model.hf.lm_head.weight.zero_()
        model.hf.lm_head.weight[turn] = states[0, -1]
    (said,) = Engine(model).generate([Row("I love")])
    assert (said.finish, said.token_ids) == ("stop", ())


def test_a_token_beyond_the_embedding_is_refused_by_name():
    tokenizer = sentencepiece(legacy=False)
    rows = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    tokenizer.chat_template = USER_TURNS
    model = small(tokenizer, vocab_size=rows)
    wanted = rf"'<new>', token {rows}, .* has tokens 0-{rows - 1}"
    for prompt in ("I love <new>", chat("I love <new>")):
        with pytest.raises(RequestError, match=wanted):
            model.encode(prompt)
        with pytest.raises(RequestError, match=wanted):
            Engine(model).generate([Row(prompt)])
    with pytest.raises(RequestError, match=wanted):
        Engine(model).score([Row("I love")], [" <new>"])
    with pytest.raises(RequestError, match="no token id"):
        Engine(model).score([Row("I love")], [(rows,)])


def test_a_text_is_parted_where_a_token_ends():
    """A neutral text may be halved amid a token, which then continues the first half."""
    from interp_steer.study.study import Study

    model = small(sentencepiece(legacy=False))
    tokenizer = model.tokenizer
    assert "▁(A)" in tokenizer.convert_ids_to_tokens(tokenizer("He said (A) Yes")["input_ids"])
    halves = [("He said (", "A) Yes"), ("He said", " (A) Yes"), ("I love the to", "wer.")]
    for first, second in halves:
        before, after = model.parted(first, second)
        assert before + after == first + second and len(before) <= len(first)
        whole = tokenizer(first + second)["input_ids"]
        assert [*model.encode(before).ids, *model.encode_after(before, after)] == whole
    assert model.parted(*halves[0]) == halves[1] == model.parted(*halves[1])
    study = Study(
        choose=["a"],
        prove=[Item("She said (", positive=" x", negative=" y")],
        directions={"d": Direction.of(torch.ones(32), "blocks.0.hook_resid_post")},
        sites=0,
        coefficients=[1.0],
        metrics=["length", "loss"],
        neutral=[Item("He said (", continuation="A) Yes")],
    ).bound(model)
    (item,) = study.neutral
    assert (item.prompt, item.continuation) == halves[1]
    assert study.prove[0].prompt == "She said ("  # what is asked stays as it is


def test_pieces_of_texts_have_the_tokens_of_prompts():
    """One BOS, no EOS behind: as a prompt, where features are read from long texts."""
    from interp_steer.features.contexts import windows

    model = small(unigram())
    for text in ("I love the tower", "<s>I love the tower"):
        assert windows(model, [text], 100)[0].ids == model.encode(text).ids


def test_a_study_says_before_it_runs_that_an_answer_cannot_follow(tmp_path):
    from interp_steer.study.study import Study

    model = small(sentencepiece(legacy=False))
    study = Study(
        choose=[],
        prove=[Item("The capital is ", positive="Paris", negative="Rome")],
        directions={"d": Direction.of(torch.ones(32), "blocks.0.hook_resid_post")},
        sites=0,
        coefficients=[1.0],
        metrics=["propensity"],
    )
    with pytest.raises(RequestError, match="end the prompt before ' '"):
        study.run(model, tmp_path / "run")
    assert not (tmp_path / "run" / "rows.jsonl").exists()
