"""How the ranks of a start find one another in an old store, and how a silent one is named; threads stand for ranks."""

from __future__ import annotations

import json
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from torch.distributed import HashStore

from phd_megatron.errors import UserError
from phd_megatron.runtime import launcher
from phd_megatron.runtime import watch as watch_module
from phd_megatron.runtime.environment import Environment, without_launcher
from phd_megatron.runtime.meeting import meet
from phd_megatron.runtime.watch import Pace, Watch, died_together


def everybody(store: HashStore, ranks: list[int], world_size: int, seconds: float = 200.0) -> dict[int, str]:
    """What each rank got; an error by its text."""
    found: dict[int, str] = {}

    def rank(number: int) -> None:
        try:
            found[number] = meet(store, number, world_size, seconds)
        except UserError as error:
            found[number] = f"refused: {error}"

    threads = [threading.Thread(target=rank, args=(number,)) for number in ranks]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]], ids=["rank-0-first", "rank-0-last"])
def test_each_start_in_one_store_gets_a_name_of_its_own(order: list[int]) -> None:
    store, names = HashStore(), set()
    for _ in range(3):
        found = everybody(store, order, 3)
        assert len(set(found.values())) == 1 and "refused" not in found[0]
        names.add(found[0])
    assert len(names) == 3


def test_a_start_that_never_met_does_not_disturb_the_next() -> None:
    store = HashStore()
    assert "rank 2 of 3 did not answer" in everybody(store, [0, 1], 3, seconds=2.0)[0]
    assert "rank 0 of 3 did not answer" in everybody(store, [1, 2], 3, seconds=2.0)[1]
    assert len(set(everybody(store, [1, 2, 0], 3).values())) == 1


def test_a_smaller_world_meets_in_the_store_of_a_larger_one() -> None:
    store = HashStore()
    everybody(store, [0, 1, 2], 3)
    assert len(set(everybody(store, [1, 0], 2).values())) == 1


def test_a_short_timeout_shortens_everything() -> None:
    usual, short = Pace.of(600, 0), Pace.of(12, 0)
    assert usual.silence + usual.beat < 60 and usual.stuck + usual.beat < 60 and usual.end == 600
    assert short.silence + short.beat < short.end and short.stuck < short.end == 12


def test_a_silent_rank_is_named_once_and_again_when_it_answers(capfd: pytest.CaptureFixture[str]) -> None:
    store = HashStore()
    watches = [Watch(store, rank, 2, timeout=3.0) for rank in range(2)]
    said = ""

    def wait_for(words: str) -> None:
        nonlocal said
        deadline = time.monotonic() + 300
        while words not in said:
            assert time.monotonic() < deadline, said
            time.sleep(0.02)
            said += capfd.readouterr().err

    for watch in watches:
        watch.pace = Pace(beat=0.05, silence=2.0, stuck=3600.0, end=3600.0)  # the end is no matter of this test
    watches[1].at("a step", 7)
    watches[1]._publish()
    watches[0].start()
    wait_for("warning: rank 1")
    watches[1].start()
    wait_for("answers again")
    for watch in watches:
        watch.stop()
    said += capfd.readouterr().err
    assert said.count("warning: rank 1 (host") == 1
    assert "at iteration 7 in 'a step'" in said and "after 0.05 minutes" in said
    assert said.count("note: rank 1") == 1 and "answers again" in said


def test_ranks_that_end_in_order_are_not_missed(capfd: pytest.CaptureFixture[str]) -> None:
    """An hour later, as rank 0 sees it; of a rank that did not end in order it would have said so long ago."""
    store = HashStore()
    watches = [Watch(store, rank, 3, timeout=600.0) for rank in range(3)]
    for watch in watches[1:]:
        watch.start()
        watch.stop()
    for number in (1, 2):
        assert watches[0]._read(number)["ended"]
        watches[0]._seen[number].since -= 3600.0
    watches[0]._look_ahead()
    assert capfd.readouterr().err == "" and not watches[0].has_ended
    watches[1]._publish()
    watches[0]._read(1)
    watches[0]._seen[1].since -= 3600.0
    watches[0]._look_ahead()
    assert "warning: rank 1 (host" in capfd.readouterr().err and watches[0].has_ended


def test_survivors_say_the_same_of_a_process_that_is_gone() -> None:
    store = HashStore()
    watches = [Watch(store, rank, 3, timeout=600.0) for rank in range(3)]
    for watch in watches:
        watch._publish()
    entry = json.loads(store.get("watch/1"))
    store.set("watch/1", json.dumps(entry | {"pid": 2**22 - 1, "iteration": 12, "phase": "a step"}))
    error = RuntimeError("[x/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")
    assert died_together(error) and not died_together(RuntimeError("shapes do not fit"))
    said: set[str] = set()  # in threads: on the main one it would ignore SIGTERM from now on, as the way out does
    threads = [
        threading.Thread(target=lambda w=watch: said.add(w.explain(error))) for watch in (watches[0], watches[2])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == 1
    assert "rank 1 (host" in said.pop()


@pytest.mark.parametrize(
    "said",
    [
        "[a/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1",
        "Application timeout caused pair closure",
        "Timed out waiting 18000ms for recv operation to complete",
        "Socket closed [127.0.0.1]:1",
        "Wait timeout",
    ],
)
def test_what_gloo_says_of_a_lost_rank_is_known(said: str) -> None:
    assert died_together(RuntimeError(said))
    assert not died_together(ValueError(said)), "gloo raises nothing else"


def test_whatever_fails_after_the_end_has_been_said_is_its_consequence() -> None:
    store = HashStore()
    watches = [Watch(store, rank, 2, timeout=600.0) for rank in range(2)]
    assert not any(watch.has_ended for watch in watches)
    watches[0]._post_end("rank 1 has given no sign of life", [])
    assert all(watch.has_ended for watch in watches)
    assert not Watch(None, 0, 1, timeout=600.0).has_ended


def test_of_processes_above_a_launcher_is_looked_for() -> None:
    above = {
        10: (b"/usr/bin/python3\0-m\0torch.distributed.run\0", 1),
        20: (b"/bin/bash\0wrapper.sh\0", 10),
        30: (b"/lib/systemd/systemd\0--user\0", 1),
        1: (b"/sbin/init\0", 0),
    }
    assert not launcher.is_orphan(10, above.get)
    assert not launcher.is_orphan(20, above.get)
    assert launcher.is_orphan(30, above.get) and launcher.is_orphan(1, above.get)
    assert not launcher.is_orphan(0, above.get), "a parent outside of the container cannot be seen"
    assert not launcher.is_orphan(40, above.get), "what cannot be seen may be one"
    assert not launcher.is_orphan(1, {1: (b"python\0/usr/bin/torchrun\0", 0)}.get), "torchrun as process 1"


ADDRESS = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (
            {"SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"},
            Environment(5, 8, 1, 4, launched=True),
        ),
        (
            {
                **{"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
                **{"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"},
            },
            Environment(3, 4, 1, 2, launched=True),
        ),
        (
            {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
            Environment(1, 2, 1, 2, launched=True),
        ),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Environment()),
        ({"SLURM_NTASKS": "1"}, Environment()),
        ({"SLURM_NTASKS": "4", "RANK": "0", "WORLD_SIZE": "1"}, Environment(launched=True)),
    ],
)
def test_place_from_other_launchers(variables: dict[str, str], expected: Environment) -> None:
    assert Environment.read({**variables, **ADDRESS}) == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLURM_NTASKS": "4"}, "SLURM_NTASKS=4 is set, as srun does for 4 processes, but SLURM_PROCID"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, "MASTER_ADDR, MASTER_PORT is not"),
        ({"PMI_SIZE": "many"}, "PMI_SIZE='many' is not a number"),
        ({**ADDRESS, "SLURM_NTASKS": "2", "SLURM_PROCID": "2", "SLURM_LOCALID": "0"}, "SLURM_PROCID=2 is not below"),
    ],
)
def test_other_launchers_without_a_meeting_place_are_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Environment.read(variables)


def test_a_process_started_by_this_one_is_alone() -> None:
    assert (
        Environment.read(without_launcher({"SLURM_NTASKS": "4", "OMPI_COMM_WORLD_SIZE": "4", "RANK": "1"}))
        == Environment()
    )


def test_the_flight_recorder_is_on_and_own_settings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from phd_megatron.runtime.flight_recorder import record_flights

    for name in [name for name in os.environ if name.startswith(("TORCH_NCCL_", "TORCH_FR_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    record_flights("runs/mine")
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0"
    assert int(os.environ["TORCH_NCCL_TRACE_BUFFER_SIZE"]) > 0 and int(os.environ["TORCH_FR_BUFFER_SIZE"]) > 0
    assert os.environ["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == os.environ["TORCH_FR_DUMP_TEMP_FILE"]
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == "runs/mine/nccl_trace_rank_"


def test_a_process_that_stood_still_blames_nobody(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 1000 s in which it was stopped itself, a rank has heard nothing of the others for so long."""
    store, late = HashStore(), [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + late[0], time=time.time)
    monkeypatch.setattr(watch_module, "time", clock)
    mine, other = (Watch(store, rank, 2, timeout=6000.0) for rank in range(2))
    mine.pace = Pace(beat=0.05, silence=300.0, stuck=3600.0, end=3600.0)
    other._publish()
    mine._read(1)
    mine.start()
    try:
        before, said, deadline = mine._seen[1].since, "", time.monotonic() + 120
        late[0] = 1000.0
        while mine._seen[1].since == before and "warning" not in said:
            assert time.monotonic() < deadline
            time.sleep(0.02)
            said += capfd.readouterr().err
    finally:
        mine.stop()
    assert "warning" not in said


def test_whether_torchrun_is_gone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
        agent = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        assert not launcher.launcher_is_gone({**agent, **address}, 0.3)
    assert launcher.launcher_is_gone({**agent, **address}, 0.3)
    assert not launcher.launcher_is_gone(address, 0.3), "the store is this rank's own"
    assert not launcher.launcher_is_gone({**agent, **address, "MASTER_PORT": "words"}, 0.3)
    assert not launcher.launcher_is_gone(agent, 0.3)


def test_a_world_of_one_watches_nobody_and_ends_all_the_same() -> None:
    watch = Watch(None, 0, 1, timeout=3.0)
    watch.start()
    watch.stop()
    watch.stop()


def test_a_rank_says_once_that_it_ends() -> None:
    store = HashStore()
    watch = Watch(store, 0, 2, timeout=3.0)
    watch.stop()  # before it has begun
    watch.start()
    watch.stop()
    published: list[dict[str, object]] = []
    watch._publish = lambda **entry: published.append(entry)  # type: ignore[method-assign]
    watch.stop()
    assert published == []
