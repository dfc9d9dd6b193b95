"""The server as a program, asked by OpenAI's own client; what it says is compared with the model alone."""

from __future__ import annotations

import json
import math
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch

from .conftest import GO_ON, LENGTH

NAME = "hybrid"
PROMPT = "def main("


def ids(text):
    return list(text.encode())


@torch.no_grad()
def alone(model, prompt, steps, **options):
    """Tokens of ``model.generate`` for one prompt and nothing beside it."""
    tokens = torch.tensor([prompt])
    options = {"do_sample": False, **options}
    found = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=steps, **options)
    return found[0, len(prompt) :].tolist()


def text_of(tokenizer, tokens):
    return tokenizer.decode(tokens, skip_special_tokens=True)


def post(server, path, body, **headers):
    """Status, headers and JSON of any body, without a client in between."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.headers, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, error.headers, json.loads(error.read())


def test_models_and_health(server):
    (found,) = server.client().models.list().data
    assert found.id == NAME and found.max_model_len == LENGTH
    assert server.client().models.retrieve(NAME).id == NAME
    assert json.loads(server.get("/health"))["status"] == "ok"


def test_a_greedy_completion_is_what_generate_gives(server, model, tokenizer):
    made = server.client().completions.create(model=NAME, prompt=PROMPT, max_tokens=24, temperature=0)
    tokens = alone(model, ids(PROMPT), 24)
    assert made.choices[0].text == text_of(tokenizer, tokens)
    assert made.choices[0].finish_reason == ("length" if 256 not in tokens else "stop")
    usage = made.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(PROMPT), len(tokens))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_prompts_of_every_kind(server, model, tokenizer):
    """A list of texts, tokens, lists of tokens; the default of 16 tokens; two answers to each."""
    client = server.client()
    expected = {text: text_of(tokenizer, alone(model, ids(text), 16)) for text in ("a", "bcd")}
    asked = {"model": NAME, "temperature": 0}
    assert [c.text for c in client.completions.create(prompt=["a", "bcd"], **asked).choices] == [*expected.values()]
    assert client.completions.create(prompt=ids("bcd"), **asked).choices[0].text == expected["bcd"]
    made = client.completions.create(prompt=[ids("a"), ids("bcd")], n=2, **asked)
    assert [c.text for c in made.choices] == [expected["a"]] * 2 + [expected["bcd"]] * 2
    assert [c.index for c in made.choices] == [0, 1, 2, 3]
    assert made.usage.prompt_tokens == 4 and made.usage.completion_tokens == 64


def test_32_clients_at_once_get_what_each_gets_alone(server, model, tokenizer):
    """Greedy and seeded ones, of unequal lengths, mixed; more than there is room for at once."""
    prompts = [("x" * (1 + 7 * number % 40)) + str(number) for number in range(32)]
    lengths = [1 + 5 * number % 33 for number in range(32)]

    def ask(number):
        sampled = {"temperature": 1.3, "top_p": 0.95, "seed": number} if number % 2 else {"temperature": 0}
        made = server.client().completions.create(
            model=NAME, prompt=prompts[number], max_tokens=lengths[number], logit_bias=GO_ON, **sampled
        )
        assert made.usage.completion_tokens == lengths[number]
        return made.choices[0].text

    passes, written = server.metric("forward_passes_total"), server.metric("generated_tokens_total")
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(ask, range(32)))
    passes = server.metric("forward_passes_total") - passes
    assert server.metric("generated_tokens_total") - written == sum(lengths)
    assert passes < sum(lengths) / 2, "several rows are in one pass"
    never_ends = {"sequence_bias": {(256,): -100.0}}
    for number in range(0, 32, 2):
        tokens = alone(model, ids(prompts[number]), lengths[number], **never_ends)
        assert together[number] == text_of(tokenizer, tokens), number
    for number in range(1, 32, 6):
        assert together[number] == ask(number), number
    assert len({*together[1::2]}) == 16
    assert server.metric("running_rows") == server.metric("queue_length") == 0


def test_logprobs_are_those_of_a_forward(server, model, tokenizer):
    """Whatever the temperature; of the prompt too, where it is echoed."""
    asked = {"model": NAME, "prompt": PROMPT, "max_tokens": 6, "logit_bias": GO_ON, "seed": 3, "top_p": 0.3}
    made = server.client().completions.create(**asked, logprobs=3, echo=True, temperature=0.7).choices[0]
    told = made.logprobs
    assert made.text.startswith(PROMPT) and len(told.tokens) == len(PROMPT) + 6
    tokens = [*ids(PROMPT), *(token for name in told.tokens[len(PROMPT) :] for token in name.encode())]
    assert len(tokens) == len(told.tokens), "this seed draws characters of one byte"
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    for place in range(1, len(tokens)):
        expected = logprobs[place - 1]
        assert math.isclose(told.token_logprobs[place], expected[tokens[place]].item(), abs_tol=2e-5)
        best = expected.topk(3)
        names = [tokenizer.decode([token]) for token in best.indices.tolist()]
        for name, value in zip(names, best.values.tolist(), strict=True):
            if "\N{REPLACEMENT CHARACTER}" not in name:
                assert math.isclose(told.top_logprobs[place][name], value, abs_tol=2e-5)
        assert 3 <= len(told.top_logprobs[place]) <= 4
    assert told.text_offset == list(range(len(tokens)))
    only = server.client().completions.create(**{**asked, "max_tokens": 0}, logprobs=0, echo=True).choices[0]
    assert only.text == PROMPT and only.logprobs.token_logprobs == pytest.approx(told.token_logprobs[: len(PROMPT)])


def test_a_chat_goes_by_its_template(server, model, tokenizer):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    made = server.client().chat.completions.create(
        model=NAME, messages=messages, max_completion_tokens=8, temperature=0, logprobs=True, top_logprobs=2
    )
    prompt = ids("system: s\nuser: hi\nassistant: ")
    tokens = alone(model, prompt, 8)
    choice = made.choices[0]
    assert choice.message.role == "assistant" and choice.message.content == text_of(tokenizer, tokens)
    assert made.usage.prompt_tokens == len(prompt)
    with torch.no_grad():
        logprobs = model(torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0].log_softmax(-1)
    for number, told in enumerate(choice.logprobs.content):
        assert math.isclose(told.logprob, logprobs[len(prompt) + number - 1, tokens[number]].item(), abs_tol=2e-5)
        assert told.top_logprobs[0].logprob == told.logprob and len(told.top_logprobs) == 2
        assert bytes(told.bytes).decode() == told.token == tokenizer.decode([tokens[number]])


@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
def test_a_stream_is_the_whole_answer_in_pieces(server, chat):
    """Also of bytes that are no characters, and with two answers at once."""
    client = server.client()
    asked = {"model": NAME, "temperature": 2.0, "seed": 11, "n": 2, "max_tokens": 60, "logit_bias": GO_ON}
    asked |= {"messages": [{"role": "user", "content": "é"}]} if chat else {"prompt": "é"}
    create = client.chat.completions.create if chat else client.completions.create
    whole = create(**asked, **({"logprobs": True} if chat else {"logprobs": 0}))
    texts, ends, told = ["", ""], [None, None], [0, 0]
    stream = create(
        **asked,
        **({"logprobs": True} if chat else {"logprobs": 0}),
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = stream
    for chunk in chunks:
        assert chunk.usage is None
        for choice in chunk.choices:
            assert ends[choice.index] is None
            texts[choice.index] += (choice.delta.content or "") if chat else choice.text
            ends[choice.index] = choice.finish_reason
            if choice.logprobs is not None:
                told[choice.index] += len(choice.logprobs.content if chat else choice.logprobs.tokens)
    assert texts == [choice.message.content if chat else choice.text for choice in whole.choices]
    assert "\N{REPLACEMENT CHARACTER}" in texts[0], "some bytes are no characters at this temperature"
    assert ends == ["length", "length"] and told == [60, 60]
    assert last.choices == [] and last.usage == whole.usage
    if chat:
        assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", "assistant"]


def test_nothing_of_a_stop_string_is_sent(server):
    client = server.client()
    asked = {"model": NAME, "prompt": PROMPT, "max_tokens": 40, "temperature": 0, "logit_bias": GO_ON}
    text = client.completions.create(**asked).choices[0].text
    stop = text[20:25]
    before = text[: text.index(stop)]
    for stops in (stop, ["never there", stop]):
        made = client.completions.create(**asked, stop=stops, logprobs=0)
        assert made.choices[0].text == before and made.choices[0].finish_reason == "stop"
        assert "".join(made.choices[0].logprobs.tokens) == before
        assert made.usage.completion_tokens == len(before) + len(stop)
        pieces = [chunk.choices[0].text for chunk in client.completions.create(**asked, stop=stops, stream=True)]
        assert "".join(pieces) == before
    half = [text[30:34] + "\0"]  # begins in the text and never ends
    assert client.completions.create(**asked, stop=half).choices[0].text == text


def test_penalties_and_biases_change_the_choice(server):
    client = server.client()
    asked = {"model": NAME, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    assert client.completions.create(**asked, logit_bias={"65": 100}).choices[0].text == "A" * 12
    spread = client.completions.create(**asked, logit_bias={"65": 3, "256": -100}, presence_penalty=2.0)
    bias = {str(ord(letter)): 50.0 for letter in "ABC"}
    cycled = client.completions.create(**asked, logit_bias=bias, frequency_penalty=2.0).choices[0].text
    assert set(cycled) == set("ABC") and max(map(cycled.count, "ABC")) < 12
    assert spread.usage.completion_tokens == 12


def test_a_client_that_hangs_up_leaves_the_batch(server):
    """In mid-stream, and while it waits for a whole answer."""
    gone = 'rows_total{how="cancelled"}'
    for number, stream in enumerate((True, False), 1):
        place = urllib.parse.urlparse(server.url)
        body = json.dumps({"model": NAME, "prompt": "x", "max_tokens": 4000, "logit_bias": GO_ON, "stream": stream})
        with socket.create_connection((place.hostname, place.port)) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body.encode())
            server.until(lambda: server.metric("running_rows") == 1)
            if stream:
                got = b""
                while b"data: " not in got:  # the head may come alone
                    got += (part := connection.recv(4096))
                    assert part
        server.until(lambda: server.metric("running_rows") == 0, 3)
        assert server.metric(gone) == number


BAD = [
    ({"prompt": "x", "best_of": 2}, "best_of=2", "best_of"),
    ({"prompt": "x", "suffix": "y"}, "suffix='y'", "suffix"),
    ({"prompt": "x", "top_k": 2}, "unknown field 'top_k'", "top_k"),
    ({"prompt": "x", "user": "me"}, "unknown field 'user'", "user"),
    ({"prompt": "x", "temperature": 2.5}, "temperature=2.5", "temperature"),
    ({"prompt": "x", "temperature": 1e-9}, "temperature=1e-09", "temperature"),
    ({"prompt": "x", "temperature": "1"}, "temperature='1'", "temperature"),
    ({"prompt": "x", "top_p": 0}, "top_p=0", "top_p"),
    ({"prompt": "x", "n": 0}, "n=0", "n"),
    ({"prompt": "x", "n": 500}, "500 answers", "n"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens=0", "max_tokens"),
    ({"prompt": "x", "max_tokens": True}, "max_tokens=True", "max_tokens"),
    ({"prompt": "x", "stop": ["a"] * 5}, "stop=", "stop"),
    ({"prompt": "x", "stop": ""}, "an empty text", "stop"),
    ({"prompt": "x", "logprobs": 21}, "logprobs=21", "logprobs"),
    ({"prompt": "x", "logit_bias": {"257": 1}}, "'257'", "logit_bias"),
    ({"prompt": "x", "logit_bias": {"a": 1}}, "'a'", "logit_bias"),
    ({"prompt": "x", "stream_options": {}}, "without stream", "stream_options"),
    ({"prompt": "x", "seed": 2**63}, "seed=", "seed"),
    ({"prompt": ""}, "has no tokens", "prompt"),
    ({"prompt": []}, "no tokens", "prompt"),
    ({"prompt": [[]]}, "no tokens", "prompt"),
    ({"prompt": [257]}, "token 257", "prompt"),
    ({"prompt": [-1]}, "token -1", "prompt"),
    ({"prompt": [1, "a"]}, "prompt=", "prompt"),
    ({"prompt": "\ud800"}, "UTF-8", "prompt"),
    ({}, "prompt is not given", "prompt"),
    ({"prompt": "x" * 4090, "max_tokens": 7}, "4,097, and this server computes at most 4,096", "max_tokens"),
    ({"prompt": "x" * 4096}, "4,097, and", "prompt"),
]
HELLO = [{"role": "user", "content": "x"}]
BAD_CHATS = [
    ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools=", "tools"),
    ({"messages": HELLO, "response_format": {"type": "json_object"}}, "response_format=", "response_format"),
    ({"messages": HELLO, "top_logprobs": 2}, "without logprobs", "top_logprobs"),
    ({"messages": HELLO, "max_tokens": 2, "max_completion_tokens": 2}, "say the same", "max_tokens"),
    ({"messages": []}, "messages=[]", "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role='tool'", "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "parts of type text", "messages"),
    ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages.0.name='y'", "messages"),
    ({"messages": HELLO, "prompt": "x"}, "unknown field 'prompt'", "prompt"),
]


@pytest.mark.parametrize(("fields", "said", "param"), [*BAD, *BAD_CHATS], ids=lambda value: str(value)[:40])
def test_what_cannot_be_is_refused_by_name(server, fields, said, param):
    path = "/v1/chat/completions" if (fields, said, param) in BAD_CHATS else "/v1/completions"
    status, _, answer = post(server, path, {"model": NAME, **fields})
    error = answer["error"]
    assert status == 400 and said in error["message"] and error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_bodies_and_paths_that_are_none(server):
    for body, said in (
        (b"{", "no JSON"),
        (b"[]", "send a JSON object"),
        (b"[" * 100_000, "no JSON"),
        (b"\xff", "no JSON"),
    ):
        status, _, answer = post(server, "/v1/completions", body)
        assert status == 400 and said in answer["error"]["message"]
    assert post(server, "/v1/completions", {"model": "other", "prompt": "x"})[0] == 404
    status, _, answer = post(server, "/v1/embeddings", {})
    assert status == 404 and "/v1/embeddings" in answer["error"]["message"]
    neutral = {"best_of": 1, "tools": [], "response_format": {"type": "text"}, "suffix": None}
    assert post(server, "/v1/completions", {"model": NAME, "prompt": "x", "max_tokens": 1, **neutral})[0] == 200
    status, _, answer = post(server, "/v1/completions", b'{"model": "hybrid", "prompt": "x", "temperature": NaN}')
    assert status == 400 and "temperature=nan" in answer["error"]["message"]


def test_a_body_is_as_long_as_it_may_be(server):
    """Refused by its length before it comes; one that does not say its length is counted."""
    place = urllib.parse.urlparse(server.url)
    with socket.create_connection((place.hostname, place.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 4194305\r\n\r\n")
        said = connection.recv(4096)
        assert said.startswith(b"HTTP/1.1 413") and b"4,194,304" in said + connection.recv(4096)
    with socket.create_connection((place.hostname, place.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
        with suppress(OSError):  # the server hangs up before it has read all of it
            for _ in range(5):
                connection.sendall(chunk)
        assert connection.recv(64).startswith(b"HTTP/1.1 413")


def test_metrics_count_requests_and_times(server):
    text = server.get("/metrics")
    assert 'phd_megatron_requests_total{path="/v1/completions",status="200"}' in text
    assert 'path="other",status="404"' in text and "/v1/embeddings" not in text
    assert server.metric("time_to_first_token_seconds_count") > 0
    assert server.metric("seconds_per_token_sum") > 0 and server.metric("prompt_tokens_total") > 0


def test_a_signal_lets_running_requests_finish(server):
    """Last of this module: new ones are refused meanwhile, and the program ends well."""
    client = server.client()
    stream = client.completions.create(
        model=NAME, prompt="x", max_tokens=300, stream=True, temperature=0, logit_bias=GO_ON
    )
    next(iter(stream))
    server.process.terminate()
    server.until(lambda: post(server, "/v1/completions", {"model": NAME, "prompt": "x"})[0] == 503, 3)
    status, headers, answer = post(server, "/v1/completions", {"model": NAME, "prompt": "x"})
    assert status == 503 and headers["Retry-After"] == "5" and "stopping" in answer["error"]["message"]
    with pytest.raises(urllib.error.HTTPError, match="503"):
        server.get("/health")
    length, end = 1, None
    for chunk in stream:
        length, end = length + len(chunk.choices[0].text), chunk.choices[0].finish_reason or end
    assert end == "length"
    began = time.monotonic()
    assert server.process.wait(timeout=30) == 0 and time.monotonic() - began < 10
    assert "stopped" in server.process.communicate()[0]
