"""Runs that are killed, disks that are full, hosts that go away: all go on, bitwise."""

import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from test_train import arguments, run, same, together

import train
from data import leave

EVENTS = [
    f"{when} {what}" for when in ("before", "after") for what in ("update", "fsync", "replace")
]


def lives(deaths, args):
    """Run `args` again and again, until SIGKILL has met it so often; then leave it alone.

    Every second time at an event: before or after an update, or any fsync or rename of the saves.
    Else at a random moment.
    """
    rng, left = random.Random(0), {}

    def event(name):
        if left.get(name) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        left[name] = left.get(name, 0) - 1

    def counted(f):
        def g(*args):
            event(f"before {f.__name__}")
            result = f(*args)
            event(f"after {f.__name__}")
            return result

        return g

    for death in range(deaths + 1):
        name = EVENTS[death // 2 % len(EVENTS)]
        times, delay = rng.randrange(1, 4 if "update" in name else 12), rng.uniform(0, 0.25)
        left = {name: times} if death % 2 == 0 and death < deaths else {}
        if (pid := os.fork()) == 0:
            train.update, os.fsync = counted(train.update), counted(os.fsync)
            os.replace = counted(os.replace)
            leave(train.main(args))
        if death % 2:
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code == (0 if death == deaths else -signal.SIGKILL), f"{code} after {death} deaths"


def test_a_run_that_is_killed_twenty_times_ends_as_the_undisturbed_one(tmp_path):
    more = "--max_steps 60 --gradient_accumulation_steps 1"
    train.main(arguments(tmp_path, "whole", more, "--save_steps 0"))
    together(1, lives, 20, arguments(tmp_path, "killed", more, "--save_steps 1 --resume"))
    same(tmp_path / "whole", tmp_path / "killed")


def test_a_failure_ends_the_process_though_workers_ignore_its_signals(tmp_path):
    code = "import train, data; train.update = None; data.command(train.main)"
    words = [sys.executable, "-c", code, *arguments(tmp_path, "run", "--num_workers 2")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "'NoneType' object is not callable" in done.stderr


def filling(room, args):
    """Train, and after update 2 let files have `room` bytes: the failure is one sentence."""
    update, calls = train.update, []

    def fill(*args):
        calls.append(1)
        if len(calls) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        return update(*args)

    train.update = fill
    with pytest.raises((ValueError, OSError), match=r"\A.+\Z"):
        train.main(args)


def test_a_full_disk_is_one_sentence_and_leaves_the_last_checkpoint(tmp_path):
    train.main(arguments(tmp_path, "whole"))
    for room in (0, 8000):  # for nothing, for the log and a part of the weights
        args = arguments(tmp_path, f"full{room}", "--resume")
        together(1, filling, room, args)
        checkpoints = tmp_path / f"full{room}/checkpoints"
        assert {path.name for path in checkpoints.iterdir()} == {"latest", "step_000002"}
        train.main(args)
        same(tmp_path / "whole", tmp_path / f"full{room}")


DYING = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train
from data import leave

update, calls, died = train.update, [], sys.argv[1] + ".died"
print(os.getpid(), file=open(sys.argv[2], "w"), flush=True)

def dying(*args):
    calls.append(1)
    if len(calls) == 4 and os.environ["RANK"] == "1" and not os.path.exists(died):
        open(died, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return update(*args)

train.update = dying
leave(train.main(sys.argv[3:]))
"""


def wait_for(condition):
    """Until it holds, for at most two minutes."""
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.1)
    raise TimeoutError


def test_two_hosts_go_on_after_the_death_of_a_process_and_of_a_host(tmp_path):
    """A process dies, and its launcher starts all again. Then a host dies, and is started again by
    hand; the other waits for it. Each time all go on from the last checkpoint, and bitwise: a sum
    of two gradients has one order."""
    more = "--gradient_accumulation_steps 1 --max_steps 30"
    together(2, run, arguments(tmp_path, "whole", more, "--save_steps 0"))
    (tmp_path / "dying.py").write_text(DYING)
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

    def start(n):
        launch = f"""-m torch.distributed.run --nnodes=2 --nproc_per_node=1 --max-restarts=9
            --rdzv_backend=c10d --rdzv_id=1 --rdzv_endpoint=localhost:{port} --local_addr=localhost
            --rdzv_conf=is_host={1 - n},keep_alive_interval=1
            {tmp_path}/dying.py {tmp_path}/rank {tmp_path}/pid{n}"""
        words = [sys.executable, *launch.split(), *arguments(tmp_path, "hosts", more, "--resume")]
        with open(tmp_path / f"log{n}", "a") as log:
            return subprocess.Popen(words, env=env, stdout=log, stderr=log)

    def kill(n):
        if runs[n].poll() is None:
            os.kill(int((tmp_path / f"pid{n}").read_text()), signal.SIGKILL)
            runs[n].kill()
        return runs[n].wait()

    def reached(step):
        file = tmp_path / "hosts/metrics.jsonl"
        return file.exists() and f'"step": {step},' in file.read_text()

    runs = [start(0), start(1)]
    try:
        wait_for(lambda: (tmp_path / "rank.died").exists() and reached(9))
        assert kill(1) == -signal.SIGKILL and not reached(30)
        runs[1] = start(1)
        codes = [process.wait(timeout=300) for process in runs]
        assert codes == [0, 0], (tmp_path / "log0").read_text()
    finally:
        for n in (0, 1):
            kill(n)
    same(tmp_path / "whole", tmp_path / "hosts")
