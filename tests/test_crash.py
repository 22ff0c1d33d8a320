"""Nothing is lost: runs that are killed, disks that are full, hosts that go away. What is left goes on, bitwise as if nothing had been."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, command
from test_train import arguments, metrics, weights

HEAD = f"""
import os, random, resource, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train
from eval import leave
"""

# Lives after lives of one run, forked from a process that has torch loaded. Each dies by SIGKILL, at a random moment or at
# a chosen event: as an update begins or ends, before or after any fsync or rename of the saves.
LIVES = """
rng, lives, deaths, args, out = random.Random(int(sys.argv[1])), int(sys.argv[2]), [], sys.argv[3:], sys.argv[sys.argv.index("--out") + 1]

def counted(f, name):
    def g(*a, **k):
        event("before " + name)
        result = f(*a, **k)
        event("after " + name)
        return result
    return g

def event(name):
    global left
    left -= 1
    if left == 0:
        print("died", name, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

while True:
    by_event, left, delay = len(deaths) % 2 == 0 and len(deaths) < lives, rng.randrange(1, 70), rng.uniform(0, 0.6)
    pid = os.fork()
    if pid == 0:
        if by_event:
            train.update, os.fsync, os.replace = counted(train.update, "update"), counted(os.fsync, "fsync"), counted(os.replace, "replace")
        train.main(args + (["--resume", "latest"] if os.path.exists(out + "/checkpoints/latest") else []))
        leave()
    if len(deaths) < lives and not by_event:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status):
        sys.exit(f"{len(deaths)} deaths" if os.waitstatus_to_exitcode(status) or len(deaths) < lives else 0)
    deaths.append(status)
    if not os.path.exists(out + "/checkpoints/latest"):
        import shutil
        shutil.rmtree(out, ignore_errors=True)
"""


def script(tmp_path, text):
    (tmp_path / "script.py").write_text(HEAD + text)
    return tmp_path / "script.py"


def same(a, b, tolerance=0):
    """The runs in a and b ended with the same weights and logged the same losses."""
    for name, w in weights(a).items():
        torch.testing.assert_close(weights(b)[name], w, rtol=0, atol=tolerance)
    assert [row["loss"] for row in metrics(b)] == pytest.approx([row["loss"] for row in metrics(a)], rel=tolerance, abs=0)


def test_a_run_that_is_killed_twenty_times_ends_as_the_undisturbed_one(tmp_path):
    args = lambda out: arguments(tmp_path, out, "--max_steps", 40, "--save_steps", 1, "--gradient_accumulation_steps", 2, "--lora_dropout", 0.3)
    command("train.py", *args("whole"))
    stdout, _ = command(script(tmp_path, LIVES), 0, 20, *args("killed"))
    assert len({line for line in stdout.splitlines() if line.startswith("died")}) > 3  # at different events
    same(tmp_path / "whole", tmp_path / "killed")


FULL = """
update, calls = train.update, []
def filling(*args):
    calls.append(1)
    if len(calls) == 3:  # after the checkpoint of update 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
    return update(*args)
train.update = filling
try:
    train.main(sys.argv[2:])
except (ValueError, OSError) as error:
    sys.exit(f"train.py: {error}")
"""


@pytest.mark.parametrize("room", [0, 600, 8000])  # bytes: for nothing, for the small files, for a part of the weights
def test_a_full_disk_is_one_sentence_and_leaves_the_last_checkpoint(tmp_path, room):
    command("train.py", *arguments(tmp_path, "whole"))
    _, stderr = command(script(tmp_path, FULL), room, *arguments(tmp_path, "full"), code=1)
    assert stderr.startswith("train.py: ") and stderr.count("\n") == 1, stderr
    checkpoints = tmp_path / "full/checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_000002"]
    command("train.py", *arguments(tmp_path, "full", "--resume", "latest"))
    same(tmp_path / "whole", tmp_path / "full")


DYING = """
update, calls, died = train.update, [], sys.argv[1]
def dying(*args):
    calls.append(1)
    if len(calls) == 4 and os.environ["RANK"] == "2" and not os.path.exists(died):
        open(died, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return update(*args)
train.update = dying
leave(train.main(sys.argv[2:]))
"""


def wait_for(condition):
    """Until it holds, for at most five minutes."""
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.1)
    raise TimeoutError


@pytest.fixture
def hosts():
    """Two hosts, as (start of a command line, address): network namespaces joined by a cable where we may make them, else both are this one."""
    a, b = (f"revela{os.getpid()}{x}" for x in "ab")
    join = [f"ip netns add {a}", f"ip netns add {b}", f"ip link add eth0 netns {a} type veth peer name eth0 netns {b}"]
    for name, address in ((a, "10.9.8.1"), (b, "10.9.8.2")):
        join += [f"ip -n {name} addr add {address}/24 dev eth0", f"ip -n {name} link set eth0 up", f"ip -n {name} link set lo up"]
    joined = shutil.which("ip") and all(subprocess.run(line.split(), stderr=subprocess.DEVNULL).returncode == 0 for line in join)
    yield [(["ip", "netns", "exec", a], "10.9.8.1"), (["ip", "netns", "exec", b], "10.9.8.2")] if joined else [([], "localhost")] * 2
    for name in (a, b) if shutil.which("ip") else ():
        subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)


def test_two_hosts_go_on_after_the_death_of_a_process_and_of_a_host(tmp_path, hosts):
    """Two launchers, each on a host of its own with two processes. One process dies, and all are started again; then a whole host
    dies, and is started again by hand. The others wait for it and all go on from the last checkpoint. Not bitwise: DDP lays gradients
    out anew after its first update, and with that changes the order in which those of four processes are summed."""
    args = lambda out: arguments(tmp_path, out, "--gradient_accumulation_steps", 1, "--max_steps", 30, "--save_steps", 2, "--lora_dropout", 0.3,
                                 "--learning_rate", 1e-3)  # fmt: skip
    command("train.py", *args("whole"), processes=4)
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} | ({"GLOO_SOCKET_IFNAME": "eth0"} if hosts[0][0] else {})

    def start(n):
        enter, address = hosts[n]
        (tmp_path / f"host{n}.py").write_text(HEAD + DYING)
        torchrun = [*enter, sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2", "--max-restarts=9", "--rdzv_backend=c10d",
                    "--rdzv_id=1", f"--rdzv_endpoint={hosts[0][1]}:{port}", f"--local_addr={address}", f"--rdzv_conf=is_host={1 - n}"]  # fmt: skip
        words = [*torchrun, tmp_path / f"host{n}.py", tmp_path / "died", *args("hosts")]
        with open(tmp_path / f"log{n}", "a") as log:
            return subprocess.Popen([str(word) for word in words], env=env, stdout=log, stderr=log)

    runs = [start(0), start(1)]
    file = tmp_path / "hosts/metrics.jsonl"
    reached = lambda step: file.exists() and f'"step": {step},' in file.read_text()
    try:
        wait_for(lambda: (tmp_path / "died").exists() and reached(9))
        subprocess.run(["pkill", "-9", "-f", str(tmp_path / "host1.py")])
        assert runs[1].wait() == -signal.SIGKILL
        assert not reached(30)
        runs[1] = start(1)
        assert [run.wait(timeout=300) for run in runs] == [0, 0], (tmp_path / "log0").read_text()
    finally:
        subprocess.run(["pkill", "-9", "-f", str(tmp_path / "host")])
    same(tmp_path / "whole", tmp_path / "hosts", 1e-5)
