"""`videoseg serve segmentation`: the replicas in Ray, the HTTP server in this process."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from pathlib import Path

from cluster.config_check import build
from cluster.config_file import config_error, read_settings
from cluster.errors import ConfigError, UserError
from segmentation_service.serve_config import ServeConfig, check

SHOW = "videoseg serve segmentation --show"
OBJECT_STORE_GB = 0.25
"""Of a cluster started here: requests and answers are small."""


def load_settings(file: str | None, overrides: Sequence[str], paths: bool = True) -> ServeConfig:
    """Raises ConfigError with every problem at once, as for the recipes of training; with `paths`, also where a folder is missing."""
    values, sources = read_settings(file, overrides)
    config, problems = build(ServeConfig, values, sources)
    if problems:
        raise config_error(problems, SHOW)
    if paths:
        try:
            check(config)
        except ValueError as error:
            raise ConfigError(str(error), f"`{SHOW}` prints every key with its meaning") from error
        _make_absolute(config)
    return config


def _make_absolute(config: ServeConfig) -> None:
    """Paths that mean the same in the replicas' processes."""
    config.roots = [str(Path(root).expanduser().absolute()) for root in config.roots]
    config.uploads = config.uploads and str(Path(config.uploads).expanduser().absolute())
    for network in (config.segmentation, config.segmentation.propagation):
        if network.checkpoint is not None and Path(network.checkpoint).expanduser().exists():  # else it is a hub id
            network.checkpoint = str(Path(network.checkpoint).expanduser().absolute())


def serve_segmentation(config: ServeConfig) -> None:
    """Serve until Ctrl-C or SIGTERM (KeyboardInterrupt), then stop whatever was started here."""
    from segmentation_service.http_guard import bearer_token
    from segmentation_service.http_server import address, listen, server

    bearer_token(config)
    listening = listen(config.host, config.port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    import ray
    from ray import serve as ray_serve

    from cluster.ray_cluster import join_cluster
    from cluster.sections import ClusterConfig
    from segmentation_service import serve
    from segmentation_service.client import HandleClient
    from segmentation_service.http_api import make_app

    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # else it reports every request that finds the queue full
    serve.application(config)  # before Ray: it checks the checkpoint
    print("loading the networks ...", flush=True)
    shared = False
    try:
        started_here = join_cluster(ClusterConfig(object_store_gb=OBJECT_STORE_GB))
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has brought its own, which aborts
        _check_resources(config, ray.cluster_resources())
        if serve.APPLICATION in ray_serve.status().applications:
            raise UserError("this Ray cluster serves segmentation already", "stop that command first, or start a Ray of its own with RAY_ADDRESS=local")
        shared = not started_here
        app = make_app(HandleClient(serve.start(config), config.wait_seconds), config)
        print(f"segmentation service at {address(listening)} (its interface: {address(listening)}/docs); Ctrl-C stops it", flush=True)
        server(app).run(sockets=[listening])
    finally:
        listening.close()
        try:
            if shared:
                serve.stop()
        finally:
            ray.shutdown()


def _check_resources(config: ServeConfig, there: dict[str, float]) -> None:
    """Replicas that do not fit would be waited for without end."""
    replicas = config.segmentation.replicas
    for kind, each in (("CPU", config.segmentation.cpus_per_replica), ("GPU", config.gpus_per_replica)):
        if replicas * each > there.get(kind, 0.0):
            raise UserError(
                f"{replicas} replicas of {each:g} {kind}s need {replicas * each:g}, the Ray cluster has {there.get(kind, 0.0):g}",
                f"lower segmentation.replicas or {'segmentation.cpus_per_replica' if kind == 'CPU' else 'gpus_per_replica'}, or add machines to the cluster",
            )
