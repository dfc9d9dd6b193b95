"""Rows in a cache, texts in pieces, stop strings, samples: one part at a time, in this process."""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections import Counter

import pytest
import torch

from phd_megatron.errors import UserError
from phd_megatron.huggingface.chat_template import add_template, check_template, read_template
from phd_megatron.huggingface.generation import load
from phd_megatron.serving.conversation import Conversation
from phd_megatron.serving.engine import Engine
from phd_megatron.serving.limits import Limits, check_amounts, model_length
from phd_megatron.serving.loaded import engine_of, load_served
from phd_megatron.serving.refusals import Refusal
from phd_megatron.serving.row import Row
from phd_megatron.serving.sampling import Choice, Sampler, told
from phd_megatron.serving.stop_strings import StopStrings
from phd_megatron.serving.token_text import TokenText

GREEDY = Choice(temperature=0)


@pytest.fixture(scope="module", params=["hybrid", "phd", "llama"])
def loaded(request, exports):
    return load_served(str(exports[request.param]), Limits(0, 4, 100), device="cpu")


@torch.no_grad()
def recomputed(model, tokens):
    return model(torch.tensor([tokens]), use_cache=False).logits[0, -1]


def test_logits_of_rows_that_come_and_go(loaded):
    """Against the whole text computed again, while rows of other lengths join and leave."""
    drawn, decoder, model = random.Random(3), loaded.decoder, loaded.model
    texts = []
    for turn in range(14):
        if turn % 3 == 0:
            prompt, copies = [drawn.randrange(257) for _ in range(drawn.choice((1, 2, 9, 30)))], 1 + turn % 2
            every = decoder.prefill(prompt, copies, every=turn % 2 == 0)
            assert len(every) == (len(prompt) if turn % 2 == 0 else 1)
            assert (every[-1] - recomputed(model, prompt)).abs().max() < 2e-5
            texts += [list(prompt) for _ in range(copies)]
        for text in texts:
            text.append(drawn.randrange(257))
        logits = decoder.step([text[-1] for text in texts])
        for row, text in zip(logits, texts, strict=True):
            assert (row - recomputed(model, text)).abs().max() < 2e-5
        if turn % 4 == 3:
            staying = [number for number in range(len(texts)) if number % 2]
            decoder.keep(staying)
            texts = [texts[number] for number in staying]
            assert decoder._cache.get_seq_length() == max(map(len, texts)), "no slot is padding in all rows"
    decoder.keep([])
    assert decoder.rows == 0


def row(prompt, pieces, choice=GREEDY, max_tokens=5, **words):
    """Of letters: each token is a character."""
    options = {"stops": (), "ends": (), "decode": lambda tokens: "".join(map(chr, tokens)), **words}
    return Row(tuple(prompt), choice, max_tokens=max_tokens, deliver=pieces.append, **options)


class Script:
    """A decoder of rows that say what they are told to; NaN where a text ends."""

    joins = True

    def __init__(self, fails=()):
        self.rows, self.fails, self.entered, self.most, self.go = 0, set(fails), [], 0, threading.Event()
        self.go.set()

    def prefill(self, prompt, copies, every):
        if prompt[0] in self.fails:
            raise RuntimeError("no room for it")
        self.entered.append(prompt)
        self.rows += copies
        return self._logits([prompt[-1]])

    def step(self, tokens):
        assert self.go.wait(20)
        self.most = max(self.most, len(tokens))
        return self._logits(tokens)

    def keep(self, rows):
        self.rows = len(rows)

    def _logits(self, tokens):
        logits = torch.zeros(len(tokens), 200)
        for number, token in enumerate(tokens):
            logits[number, token + 1 if token < 120 else 0] = 9.0 if token < 120 else float("nan")
        return logits


def finished(engine):
    for _ in range(2000):
        if not engine.running and not engine.waiting and not engine._entering:
            return
        threading.Event().wait(0.005)
    raise AssertionError("it never ended")


def test_a_full_queue_a_cancelled_row_and_a_stopped_engine():
    script = Script()
    script.go.clear()
    engine = Engine(script, Limits(100, 2, 1))
    pieces = [[], [], [], []]
    first, second, third, fourth = (row([60 + number], pieces[number], max_tokens=30) for number in range(4))
    engine.submit([first, second])
    for _ in range(2000):
        if engine.running == 2:
            break
        threading.Event().wait(0.005)
    engine.submit([third])
    with pytest.raises(Refusal, match="queue is full") as refused:
        engine.submit([fourth])
    assert refused.value.status == 429 and refused.value.headers() == {"Retry-After": "1"}
    engine.cancel([first])
    script.go.set()
    finished(engine)
    assert [bool(got and got[-1].is_last) for got in pieces] == [False, True, True, False]
    assert pieces[2][-1].finish == "length" and sum(len(piece.text) for piece in pieces[2]) == 30
    assert script.most == 2 and script.rows == 0
    engine.drain()
    with pytest.raises(Refusal) as refused:
        engine.submit([fourth])
    assert refused.value.status == 503 and not engine.is_well
    engine.stop()


def test_a_prompt_or_a_row_that_fails_leaves_the_others_alone():
    engine = Engine(Script(fails=(65,)), Limits(1000, 3, 9))
    bad, good, lost = [], [], []
    engine.submit([row([65], bad), row([66], good), row([118], lost, max_tokens=9)])
    finished(engine)
    assert bad[-1].error.status == 500 and "no room for it" in str(bad[-1].error)
    assert "".join(piece.text for piece in good) == "CDEFG" and good[-1].finish == "length"
    assert "not finite" in str(lost[-1].error) and "".join(piece.text for piece in lost) == "wx"
    engine.stop()


def test_rows_of_one_prompt_are_read_once():
    script, prompt, pieces = Script(), (65, 66), []
    engine = Engine(script, Limits(100, 2, 9))
    script.go.clear()
    same = [Row(prompt, GREEDY, max_tokens=2, stops=(), ends=(), decode=str, deliver=pieces.append) for _ in range(3)]
    engine.submit([*same, row((67,), pieces)])
    script.go.set()
    finished(engine)
    assert script.entered[0] is prompt and len(script.entered) == 3, "the third of them found no room with the others"
    engine.stop()


def test_ends_and_stops_of_a_row():
    pieces = []
    one = row([65], pieces, max_tokens=9, ends={70}, stops=("CD",))
    assert [one.take(token, None) for token in (66, 67, 68)] == [False, False, True]
    assert pieces[-1].finish is None, "its place is free before it is told"
    one.close()
    assert "".join(piece.text for piece in pieces) == "B" and pieces[-1].finish == "stop" and pieces[-1].tokens == 3
    pieces.clear()
    one = row([65], pieces, max_tokens=9, ends={70}, stops=("CD",))
    assert [one.take(token, None) for token in (66, 67, 70)] == [False, False, True]
    one.close()
    assert "".join(piece.text for piece in pieces) == "BC", "what was held back comes at the end"


def test_probabilities_come_with_their_text():
    from phd_megatron.serving.sampling import Told

    pieces = []
    one = row([65], pieces, max_tokens=4, stops=("DX",))
    for token in (66, 68, 68, 69):
        one.take(token, Told(token, -1.0))
    one.close()
    found = [(piece.text, [told.token for told in piece.told]) for piece in pieces]
    assert found == [("B", [66]), ("D", [68]), ("DE", [68, 69])], "the second D may have begun a stop string"
    assert [told.offset for piece in pieces for told in piece.told] == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_stop_strings_in_pieces_of_any_size(size):
    for text, stops, left in (
        ("abcabd", ["abd"], "abc"),
        ("aaab", ["aab"], "a"),
        ("abcd", ["bcd", "c"], "ab"),
        ("xy", ["yz"], "xy"),
        ("say <|end", ["<|end|>", "\n"], "say <|end"),
    ):
        found, got = StopStrings(stops), ""
        for place in range(0, len(text), size):
            got += found.take(text[place : place + size])
            assert not any(got.endswith(stop[:1]) for stop in stops if len(stop) > 1) or found.found or left in got
        assert (got if found.found else got + found.rest()) == left
        assert found.found == (left != text)


def test_text_of_bytes_has_no_half_characters():
    def decode(tokens):
        return bytes(tokens).decode("utf-8", "replace")

    for text in ("aé€😀z".encode(), b"\xf0\x9f\x98", b"a\xff\xfeb\xc3", b"\x80" * 150 + b"x", "é".encode() * 90):
        made, pieces = TokenText(decode, b"prompt\xc3"), []
        for byte in text:
            pieces.append(made.take(byte))
            assert decode(text).startswith("".join(pieces)) or b"\x80\x80" in text
        assert "".join([*pieces, made.rest()]) == decode(text)
    made = TokenText(decode, b"x")
    assert [made.take(byte) for byte in "a€b".encode()] == ["a", "", "", "€", "b"]


def test_a_words_space_is_told_by_the_prompt_before_it():
    def decode(tokens):  # as SentencePiece: the first space of a text is not said
        return "".join(f" w{token}" for token in tokens).lstrip()

    made = TokenText(decode, [1])
    assert made.take(2) + made.take(3) == " w2 w3"
    assert TokenText(decode, []).take(2) == "w2"


def test_samples_follow_the_probabilities():
    """20,000 of each kind, against softmax and the nucleus by hand; the same for the same seed."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (2.0, 0.8)):
        sampler = Sampler(Choice(temperature=temperature, top_p=top_p, seed=5))
        count = Counter(int(sampler.pick(logits)) for _ in range(20_000))
        mass = (logits.double() / temperature).softmax(-1)
        if top_p < 1:
            mass[3:] = 0.0  # 0.455, 0.276, 0.167: the third goes over 0.8
            mass /= mass.sum()
        for token, share in enumerate(mass.tolist()):
            assert abs(count[token] / 20_000 - share) < 0.012, (temperature, top_p, token)
    again = [Sampler(Choice(seed=7)) for _ in range(2)]
    assert [int(again[0].pick(logits)) for _ in range(50)] == [int(again[1].pick(logits)) for _ in range(50)]
    assert len({int(Sampler(Choice(temperature=2.0)).pick(torch.zeros(1000))) for _ in range(20)}) > 10
    assert int(Sampler(Choice(top_p=1e-9, seed=1)).pick(logits)) == 0


def test_penalties_and_biases_by_hand():
    logits = torch.tensor([1.0, 0.9, 0.0])
    sampler = Sampler(Choice(temperature=0, presence_penalty=0.05, frequency_penalty=0.04))
    picked = []
    for _ in range(4):
        picked.append(int(sampler.pick(logits)))
        sampler.took(picked[-1])
    # 1.0 and 0.9; then 0.91; then 0.87 and 0.9; then 0.87 and 0.81
    assert picked == [0, 0, 1, 0]
    assert int(Sampler(Choice(temperature=0, logit_bias={2: 5.0})).pick(logits)) == 2
    assert Sampler(GREEDY).is_plain and not Sampler(Choice(temperature=0, logit_bias={2: 5.0})).is_plain
    best = told(logits[None], torch.tensor([1]), 2)[0]
    expected = logits.log_softmax(-1)
    assert best.logprob == pytest.approx(expected[1].item())
    assert best.likeliest == ((0, pytest.approx(expected[0].item())), (1, pytest.approx(expected[1].item())))


def test_a_conversation_keeps_what_was_said(exports):
    loaded = load_served(str(exports["hybrid"]), Limits(0, 1, 9), device="cpu", max_model_len=120)
    asked = []
    conversation = loaded.served.conversation
    loaded.served.conversation = lambda messages: asked.append([m["role"] for m in messages]) or conversation(messages)
    with engine_of(loaded) as engine:
        talk, said = Conversation(loaded.served, engine, GREEDY, system="s", max_tokens=4), []
        talk.say("one", said.append)
        talk.say("two", said.append)
        with pytest.raises(Refusal, match="at most 120; begin again with /reset"):
            talk.say("x" * 100, said.append)
        talk.reset()
        talk.say("three", said.append)
    first = ["system", "user"]
    assert asked == [first, [*first, "assistant", "user"], [*first, "assistant", "user", "assistant", "user"], first]


def test_lengths_and_amounts(loaded):
    assert model_length(loaded.model, None) == 4096 == model_length(loaded.model, 4096)
    assert model_length(loaded.model, 2) == 2
    for length, said in ((1, "at least 2"), (4097, "4096 positions")):
        with pytest.raises(UserError, match=said):
            model_length(loaded.model, length)
    check_amounts(1, 0, 1024, 0)
    for amounts, flag in (
        ((0, 0, 1024, 0), "--max-batch-size 0"),
        ((1, -1, 1024, 0), "--max-queue -1"),
        ((1, 0, 1023, 0), "--max-body-bytes 1023"),
        ((1, 0, 1024, -1), "--shutdown-seconds -1"),
    ):
        with pytest.raises(UserError, match=flag):
            check_amounts(*amounts)


def test_templates_that_are_none(exports, tmp_path):
    tokenizer = load(exports["hybrid"], "cpu")[1]
    for text, said in (
        ("{% for message in messages %}", "makes no text"),
        ("{{ raise_exception('never') }}", "never"),
        ("hello", "leaves out question-one"),
        ("{{ messages[0].content }}", "leaves out answer-one, question-two"),
        ("{{ ''.__class__.__mro__ }}{% for m in messages %}{{ m.content }}{% endfor %}", "makes no text"),
    ):
        with pytest.raises(UserError, match=f"it.jinja: .*{said}"):
            check_template(tokenizer, text, "it.jinja")
    path = tmp_path / "t.jinja"
    for content, said in ((b"", "is empty"), (b"\xff", "UTF-8"), (b" " * (1 << 21), "at most")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=said):
            read_template(path)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "user: x\n"


def test_what_is_missing_and_what_is_no_key(monkeypatch):
    from phd_megatron.cli import serve

    monkeypatch.setenv(serve.KEY, "two\nlines")
    with pytest.raises(UserError, match="PHD_API_KEY is empty or has other characters"):
        serve.run(["nowhere"])
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'fastapi, uvicorn, prometheus_client not installed.*"phd-megatron\[serve\]"'):
        serve.run(["nowhere"])


def test_a_new_template_takes_the_place_of_an_old_one(exports, tmp_path):
    """Also of one within tokenizer_config.json, where tokenizers of others have it."""
    directory = tmp_path / "copy"
    shutil.copytree(exports["phd"], directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "old"}))
    add_template(directory, "{% for m in messages %}<{{ m.content }}>{% endfor %}", "new.jinja")
    tokenizer = load(directory, "cpu")[1]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<x>"
