"""Tiny real exports, and servers of them as programs of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..huggingface.conftest import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 4096
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
#: never the end of a text, so that an answer is as long as it was asked for
GO_ON = {"256": -100}


def in_letters(tensors) -> None:
    """The likeliest token is a printable character nearly always."""
    head = tensors["output_layer.weight"]
    head[:32] = head[127:] = 0.0


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``hybrid``: HybridNorm* with K = 2, a chat template; ``phd``: K = 1; ``llama``: it in transformers' class."""
    from phd_megatron.huggingface.export import export_checkpoint

    root = tmp_path_factory.mktemp("exports")
    (root / "template.jinja").write_text(TEMPLATE)
    model = {"seq_length": LENGTH, "untie_embeddings_and_output_weights": True, "edit": in_letters}
    phd = {"norm_scheme": "hybrid_star", "phd_repeat": 2, "phd_window": 4, "phd_chunk": 8}
    write_checkpoint(root / "hybrid-run", **model, **phd)
    write_checkpoint(root / "plain-run", **model, seed=1)
    common = {"verify": "none"}
    export_checkpoint(root / "hybrid-run", root / "hybrid", chat_template=root / "template.jinja", **common)
    export_checkpoint(root / "plain-run", root / "phd", native=False, **common)
    export_checkpoint(root / "plain-run", root / "llama", **common)
    return {path.name: path for path in root.iterdir()}


@dataclass
class Server:
    """A program that serves, and its address."""

    process: subprocess.Popen[str]
    url: str
    said: list[str]

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=20) as answer:
            return answer.read().decode()

    def metric(self, name: str) -> float:
        """Of one line of /metrics, labels and all."""
        (found,) = re.findall(rf"^phd_megatron_{re.escape(name)} (\S+)$", self.get("/metrics"), re.MULTILINE)
        return float(found)

    def until(self, holds: Callable[[], bool], seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "it never came to that"
            time.sleep(0.02)

    def client(self, key: str = "none"):
        import openai

        # Without certificates, which take longer to read than everything else here.
        plain = openai.DefaultHttpxClient(verify=False)
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, http_client=plain)

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        self.said += self.process.communicate(timeout=60)[0].splitlines()
        return self.process.returncode


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "PHD_API_KEY")}
    path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **more}


def start(*words: object, **variables: str) -> Server:
    """``phd-megatron serve``, once it says where it is."""
    process = subprocess.Popen(
        [sys.executable, "-m", "phd_megatron", "serve", *map(str, words), "--port", "0", "--device", "cpu"],
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line.rstrip())
        if found := re.match(r"serving \S+ at (http://\S+)/v1", line):
            return Server(process, found[1], said)
    process.wait()
    raise AssertionError("\n".join(said))


@pytest.fixture(scope="module")
def server(exports: dict[str, Path]) -> Iterator[Server]:
    """Of ``hybrid``, with room for 8 rows at once."""
    found = start(exports["hybrid"], "--max-batch-size", 8, "--max-queue", 64, "--shutdown-seconds", 60)
    yield found
    if found.process.poll() is None:
        assert found.end() == 0, "\n".join(found.said)


@pytest.fixture(scope="module")
def model(exports: dict[str, Path]):
    """The served model in this process."""
    from phd_megatron.huggingface.generation import load

    return load(exports["hybrid"], "cpu")[0]


@pytest.fixture(scope="module")
def tokenizer(exports: dict[str, Path]):
    from phd_megatron.huggingface.generation import load

    return load(exports["hybrid"], "cpu")[1]
