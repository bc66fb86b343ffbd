"""Joining a Ray cluster, or starting one on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config_resolve import Hardware, detect_hardware, together
from cluster.errors import UserError
from cluster.sections import ClusterConfig


@contextmanager
def joined_cluster(config: ClusterConfig) -> Iterator[None]:
    """Inside, a cluster is there; one that was started here ends with it."""
    started_here = join_cluster(config)
    try:
        yield
    finally:
        if started_here:
            ray.shutdown()


def hardware(config: ClusterConfig) -> Hardware:
    """What a run has to itself: the nodes of the cluster that `cluster.address`, or a job's environment, names; else this machine.

    A cluster is joined for it, and stays joined.
    """
    here = (config.address or os.environ.get("RAY_ADDRESS") or "local") == "local"
    if here and not (ray.is_initialized() and len(ray.nodes()) > 1):
        return detect_hardware()
    join_cluster(config)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    looked_at = ray.get([_look_at_node.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote() for node in nodes], timeout=config.start_seconds)
    return together([replace(found, cuda_devices=int(node["Resources"].get("GPU", 0))) for node, found in zip(nodes, looked_at)])


@ray.remote(num_cpus=0)
def _look_at_node() -> Hardware:
    return detect_hardware(all_gpus=True)  # Ray hides the GPUs from a task that asks for none


def join_cluster(config: ClusterConfig) -> bool:
    """Connects to a cluster, or starts a local one; True if it was started here."""
    if ray.is_initialized():
        return False
    options = dict(log_to_driver=False, logging_level="ERROR", namespace="videoseg")
    wanted = config.address or os.environ.get("RAY_ADDRESS")
    if wanted != "local":
        try:
            ray.init(address=wanted or "auto", **options)
            return False
        except ConnectionError as error:
            if wanted:
                raise UserError(
                    f"no Ray cluster answers at {wanted}: {error}",
                    "start one with `ray start --head`, correct cluster.address, or use cluster.address=local",
                ) from error
    store, cpus = int(config.object_store_gb * 2**30), max(2, os.cpu_count() or 1)
    ray.init(address="local", include_dashboard=False, object_store_memory=store, num_cpus=cpus, **options)
    return True
