"""A server of small limits, of a model without a chat template, with a key; and what it will not start with."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request

import openai
import pytest

from .conftest import GO_ON, start

KEY = "a-key-of-ours"


@pytest.fixture(scope="module")
def small(exports):
    """One row at a time, none waits, at most 900 tokens, half a second to finish; of transformers' own Llama."""
    words = ("--max-batch-size", 1, "--max-queue", 0, "--max-model-len", 900, "--shutdown-seconds", 0.5)
    found = start(exports["llama"], "--model-name", "mine", *words, PHD_API_KEY=KEY)
    yield found
    if found.process.poll() is None:
        assert found.end() == 0


def test_it_asks_for_the_key_and_shows_it_nowhere(small):
    for key in ("wrong", ""):
        request = urllib.request.Request(f"{small.url}/v1/models", headers={"Authorization": f"Bearer {key}"})
        with pytest.raises(urllib.error.HTTPError, match="401") as refused:
            urllib.request.urlopen(request, timeout=20)
        assert json.loads(refused.value.read())["error"]["code"] == "invalid_api_key"
    assert small.client(KEY).models.list().data[0].id == "mine"
    assert "ok" in small.get("/health") and "running_rows" in small.get("/metrics")
    with open(f"/proc/{small.process.pid}/cmdline", "rb") as words:
        assert KEY.encode() not in words.read()
    assert KEY not in "\n".join(small.said)


def test_a_model_without_a_template_answers_completions_only(small):
    assert any("no chat template" in line for line in small.said)
    with pytest.raises(openai.BadRequestError, match=r"no chat template.*--chat-template"):
        small.client(KEY).chat.completions.create(model="mine", messages=[{"role": "user", "content": "x"}])
    made = small.client(KEY).completions.create(model="mine", prompt="x", max_tokens=3, logit_bias=GO_ON)
    assert made.usage.completion_tokens == 3


def test_what_does_not_fit_is_told_to_come_again(small):
    client = small.client(KEY)
    stream = client.completions.create(model="mine", prompt="x", max_tokens=899, stream=True, logit_bias=GO_ON)
    next(iter(stream))
    with pytest.raises(openai.RateLimitError, match="queue is full") as refused:
        client.completions.create(model="mine", prompt="y", max_tokens=1)
    assert refused.value.response.headers["Retry-After"] == "1" and refused.value.code == "queue_full"
    stream.close()
    small.until(lambda: small.metric("running_rows") == 0)
    client.completions.create(model="mine", prompt="y", max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="at most 900"):
        client.completions.create(model="mine", prompt="y" * 890, max_tokens=11)
    with pytest.raises(openai.BadRequestError, match="2 answers, more than the 1"):
        client.completions.create(model="mine", prompt="y", n=2)


def test_what_does_not_finish_in_time_is_told_so(small):
    """Last of this module: half a second is not enough for it, or it ends by itself."""
    client, ends = small.client(KEY), []

    def read():
        try:
            stream = client.completions.create(model="mine", prompt="x", max_tokens=899, stream=True, logit_bias=GO_ON)
            ends.extend(chunk.choices[0].finish_reason for chunk in stream)
        except openai.APIError as error:
            ends.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    small.until(lambda: small.metric("running_rows") == 1)
    assert small.end() == 0, "\n".join(small.said)
    reader.join(timeout=20)
    assert "stopping" in str(ends[-1]) or ends[-1] == "length"
    assert small.said[-1] == "stopped"
