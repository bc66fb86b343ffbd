"""A Ray cluster of several nodes on one machine: each in a network namespace with its own address, its own /dev/shm and its own /tmp/ray.

Needs root and `ip`. Elsewhere `ray.cluster_utils.Cluster` gives nodes that share the machine's address and memory.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

SUBNET, FIRST = "10.213.77", 10  # of addresses: the head has the first
BRIDGE = "vsgbr"
NAMES = tuple(f"vsg{i}" for i in range(3))  # namespaces; the first is the head
STORE_BYTES = 100_000_000


@dataclass(frozen=True)
class Nodes:
    """A running cluster: how it was made, its job server's URL, the environment that may talk to it."""

    how: str
    url: str
    environment: dict[str, str]

    def get(self, path: str) -> Any:
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            return json.load(answer)

    @contextmanager
    def cut(self, address: str) -> Iterator[None]:
        """Inside, the node with this address reaches no other, and none reaches it."""
        outside = f"{NAMES[int(address.rpartition('.')[2]) - FIRST]}o"
        _ip(f"link set {outside} down")
        try:
            yield
        finally:
            _ip(f"link set {outside} up")

    def listed(self, what: str) -> list[dict[str, Any]]:
        """`nodes`, or `actors` (dead ones too), as `ray list` has them."""
        return self.get(f"/api/v0/{what}?limit=1000")["data"]["result"]["result"]


@contextmanager
def nodes_of(*cpus: int) -> Iterator[Nodes]:
    """Up to three nodes with so many CPUs each, as Ray counts them; gone at the end, with all their processes."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    made = namespaces_can_be_made()
    with (_in_namespaces if made else _of_cluster_utils)(cpus, environment) as nodes:
        _wait_for(lambda: sum(node["state"] == "ALIVE" for node in nodes.listed("nodes")) == len(cpus))
        yield nodes


def namespaces_can_be_made() -> bool:
    if os.geteuid() != 0 or not shutil.which("ip"):
        return False
    _remove_namespaces()  # of a test that was killed
    tried = subprocess.run(["ip", "netns", "add", NAMES[0]], capture_output=True)
    _remove_namespaces()
    return tried.returncode == 0


@contextmanager
def _in_namespaces(cpus: tuple[int, ...], environment: dict[str, str]) -> Iterator[Nodes]:
    folder = Path(tempfile.mkdtemp(prefix="videoseg-nodes-", dir="/tmp"))
    addresses = [f"{SUBNET}.{FIRST + i}" for i in range(len(cpus))]
    processes = []
    try:
        _ip(f"link add {BRIDGE} type bridge", f"addr add {SUBNET}.1/24 dev {BRIDGE}", f"link set {BRIDGE} up")
        for i, (name, address) in enumerate(zip(NAMES, addresses)):
            _ip(f"netns add {name}", f"link add {name}o type veth peer name eth0 netns {name}", f"link set {name}o master {BRIDGE} up")
            _ip(*(f"-n {name} {c}" for c in ("link set lo up", f"addr add {address}/24 dev eth0", "link set eth0 up", f"route add default via {SUBNET}.1")))
            role = ["head", address, f"--dashboard-host={address}"] if i == 0 else ["worker", addresses[0], address]
            start = ["bash", str(ROOT / "examples/cluster/node.sh"), *role, f"--num-cpus={cpus[i]}", f"--object-store-memory={STORE_BYTES}"]
            # `ip netns exec` gives the node its own view of mounts too: memory files and Ray's folder are not shared, as between machines.
            own = folder / name
            own.mkdir()
            private = 'mkdir -p /tmp/ray && mount --bind "$0" /tmp/ray && mount -t tmpfs -o size=2g tmpfs /dev/shm && exec "$@"'
            with open(folder / f"{name}.log", "w") as log:
                processes.append(subprocess.Popen(["ip", "netns", "exec", name, "sh", "-c", private, str(own), *start], env=environment, stdout=log, stderr=subprocess.STDOUT))
        nodes = Nodes("network namespaces", f"http://{addresses[0]}:8265", environment)
        _wait_for(lambda: _alive(processes, folder) and nodes.get("/api/version"))
        yield nodes
    finally:
        _remove_namespaces()
        for process in processes:
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _of_cluster_utils(cpus: tuple[int, ...], environment: dict[str, str]) -> Iterator[Nodes]:
    """In a process of its own, as a process can have one Ray only."""
    code = (
        "import json, sys; from ray.cluster_utils import Cluster\n"
        "cpus = json.loads(sys.argv[1]); store = int(sys.argv[2])\n"
        "head = dict(num_cpus=cpus[0], object_store_memory=store, include_dashboard=True, dashboard_host='127.0.0.1', dashboard_port=0)\n"
        "cluster = Cluster(initialize_head=True, head_node_args=head)\n"
        "[cluster.add_node(num_cpus=n, object_store_memory=store) for n in cpus[1:]]\n"
        "print(cluster.webui_url, flush=True); sys.stdin.read(); cluster.shutdown()"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(list(cpus)), str(STORE_BYTES)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Nodes("ray.cluster_utils.Cluster", f"http://{process.stdout.readline().strip()}", environment)
    finally:
        process.communicate()


def _alive(processes: list[subprocess.Popen], folder: Path) -> bool:
    for process, name in zip(processes, NAMES):
        if process.poll() is not None:
            raise RuntimeError(f"the node in {name} ended with status {process.returncode}:\n" + (folder / f"{name}.log").read_text()[-3000:])
    return True


def _wait_for(condition: Any, seconds: float = 1200.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except OSError as error:  # nothing listens yet
            if time.monotonic() > deadline:
                raise TimeoutError(f"no cluster within {seconds:.0f} s: {error}") from error
        if time.monotonic() > deadline:
            raise TimeoutError(f"no cluster within {seconds:.0f} s")
        time.sleep(0.5)


def _ip(*commands: str) -> None:
    for command in commands:
        subprocess.run(["ip", *command.split()], check=True)


def _remove_namespaces() -> None:
    """And every process in them, and the bridge."""
    for name in NAMES:
        while inside := subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
            subprocess.run(["kill", "-KILL", *inside], capture_output=True)
            time.sleep(0.1)
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        subprocess.run(["ip", "link", "delete", f"{name}o"], capture_output=True)
    subprocess.run(["ip", "link", "delete", BRIDGE], capture_output=True)
