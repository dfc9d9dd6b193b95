"""What the runtime reads from its environment, and the doctor's report."""

import importlib.metadata
import json
import sys
import threading
from types import SimpleNamespace

import pytest

from phd_megatron.cli import doctor
from phd_megatron.errors import RunLost, UserError
from phd_megatron.runtime import rendezvous
from phd_megatron.runtime.context import Runtime, choose_device, choose_threads
from phd_megatron.runtime.environment import Environment
from phd_megatron.runtime.preflight import compare_ranks

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
ADDRESS = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def test_world_of_one_without_torchrun():
    assert Environment.read({}) == Environment(0, 1, 0, 1, launched=False)


def test_place_from_torchrun():
    assert Environment.read({**TORCHRUN, **ADDRESS}) == Environment(3, 4, 1, 2, launched=True)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (TORCHRUN, "MASTER_ADDR, MASTER_PORT is not"),
        ({**TORCHRUN, **ADDRESS, "RANK": "4"}, "RANK=4 is not below WORLD_SIZE=4"),
        ({**TORCHRUN, **ADDRESS, "RANK": "first"}, "must be numbers"),
    ],
)
def test_broken_environment_is_refused(variables, message):
    with pytest.raises(UserError, match=message):
        Environment.read(variables)


def test_an_error_that_a_lost_rank_caused_is_told_in_its_words():
    place = SimpleNamespace(
        _lost_others=lambda error: isinstance(error, RuntimeError),
        watch=SimpleNamespace(explain=lambda error: f"rank 1 has died: {error}"),
    )
    with pytest.raises(RunLost, match="rank 1 has died: gloo"), Runtime.naming_lost_ranks(place):
        raise RuntimeError("gloo")
    with pytest.raises(KeyError), Runtime.naming_lost_ranks(place):
        raise KeyError("mine")


def test_threads(monkeypatch):
    monkeypatch.setattr("phd_megatron.runtime.context.usable_cores", lambda: 8)
    two = Environment(0, 2, 0, 2, launched=True)
    assert choose_threads(Environment(), {})[0] == 8
    assert choose_threads(two, {})[0] == 4
    assert choose_threads(two, {"OMP_NUM_THREADS": "1"})[0] == 4  # torchrun's default, not a choice
    assert choose_threads(two, {"OMP_NUM_THREADS": "3"})[0] is None
    assert choose_threads(Environment(), {"OMP_NUM_THREADS": "1"})[0] is None
    assert choose_threads(two, {"OMP_NUM_THREADS": "3", "PHD_MEGATRON_THREADS": "2"})[0] == 2
    with pytest.raises(UserError, match="PHD_MEGATRON_THREADS='many'"):
        choose_threads(two, {"PHD_MEGATRON_THREADS": "many"})


def test_cpu_can_be_asked_for():
    assert choose_device("cpu") == ("cpu", "--device cpu")


def test_cuda_without_a_device_is_refused(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto")[0] == "cpu"
    with pytest.raises(UserError, match="sees no CUDA device"):
        choose_device("cuda")


def test_more_ranks_than_devices_are_refused(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1)[0] == "cuda"
    with pytest.raises(UserError, match="local rank 2 has no CUDA device"):
        choose_device("auto", 2)


def preflight(configs, world_size=None, seconds=20.0):
    """Errors of ranks that run the preflight side by side in threads."""
    from torch.distributed import HashStore

    store, errors = HashStore(), {}

    def rank(number):
        try:
            compare_ranks(store, number, world_size or len(configs), configs[number], {"torch": "1"}, seconds)
        except UserError as error:
            errors[number] = str(error)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(configs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_equal_ranks_pass():
    assert preflight([{"model": {"num_layers": 2}}] * 3) == {}


def test_a_rank_that_differs_is_named_with_the_field():
    errors = preflight([{"model": {"num_layers": 2}}, {"model": {"num_layers": 2}}, {"model": {"num_layers": 3}}])
    assert set(errors) == {0, 1, 2}
    assert all("rank 2 (" in error and "model.num_layers: 3 here, 2 on rank 0" in error for error in errors.values())


def test_a_rank_that_is_missing_is_named():
    errors = preflight([{}, {}], world_size=3, seconds=1.0)
    assert set(errors) == {0, 1}
    assert all("rank 2 of 3 did not answer" in error for error in errors.values())


def test_ranks_compare_what_they_run_on(monkeypatch):
    def version(name):
        if name == "phd-megatron":
            return "1.2"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    expected = {"torch": "2.13", "python": here, "megatron-core": "not installed", "phd-megatron": "1.2"}
    assert rendezvous._versions("2.13") == expected


def test_doctor_reports_every_operation(capsys):
    assert doctor.run(["--json", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = {operation["name"] for operation in report["operations"]}
    assert {"PHD attention", "linear layers", "norms", "optimizer", "cross entropy", "q/k/v norm and RoPE"} <= names
    assert all(operation["implementation"] and operation["reason"] for operation in report["operations"])
    assert {package["name"] for package in report["packages"]} >= {"torch", "megatron-core", "flash-attn", "apex"}
    assert len(report["tested"]) >= 3 and report["standing"]["megatron-core"] == "tested"


def test_doctor_says_what_was_tested_and_where_this_machine_stands(capsys, monkeypatch):
    from phd_megatron.runtime import doctor as report

    found = {"python": "3.11.7", "torch": "2.99.0", "megatron-core": None}
    monkeypatch.setattr(report, "installed_versions", lambda: found)
    assert doctor.run(["--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = lines[lines.index("versions that were tested together:") :]
    assert rows[1].split()[:3] == ["Python", "torch", "megatron-core"] and rows[2].split()[2] == "0.16.1"
    here = rows[rows.index("here:") + 1 :]
    assert [line.split(maxsplit=1) for line in here[:3]] == [
        ["python", "tested"],
        ["torch", "newer than 2.13.0, the newest that was tested"],
        ["megatron-core", "not installed"],
    ]


def test_doctor_says_how_to_get_what_is_missing(capsys, monkeypatch):
    from phd_megatron.runtime import doctor as report

    installed = report._installed
    monkeypatch.setattr(report, "_installed", lambda module: not module.startswith("flash_attn") and installed(module))
    assert doctor.run(["--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "pip install --no-build-isolation flash-attn" in said and "pip install --pre flash-attn-4" in said


def test_doctor_takes_another_package_of_the_name_for_none(monkeypatch, tmp_path):
    """What pip knows as apex is no part of NVIDIA's, and its code is not run."""
    from phd_megatron.runtime import doctor as report

    assert "apex.optimizers" in [module for _, module, *_ in report._PACKAGES]
    (tmp_path / "like_apex").mkdir()
    (tmp_path / "like_apex" / "__init__.py").write_text("print 'a program of Python 2'")
    monkeypatch.syspath_prepend(tmp_path)
    assert report._installed("like_apex") and not report._installed("like_apex.optimizers")
    (tmp_path / "like_apex" / "optimizers").mkdir()
    assert report._installed("like_apex.optimizers")
    assert report._installed("megatron.core")
