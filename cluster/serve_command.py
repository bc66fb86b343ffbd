"""`videoseg serve segmentation` and `videoseg serve reward`: the replicas in Ray, the HTTP server in this process."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from cluster.config_check import build
from cluster.config_file import config_error, read_settings
from cluster.errors import ConfigError, UserError
from reward_service import serve_config as reward_settings
from reward_service.serve_config import RewardServeConfig
from segmentation_service import serve_config as segmentation_settings
from segmentation_service.serve_config import ServeConfig

OBJECT_STORE_GB = 0.25
"""Of a cluster started here: requests and answers are small."""


def load_settings(file: str | None, overrides: Sequence[str], paths: bool = True) -> ServeConfig:
    """Of the segmentation service. Raises ConfigError with every problem at once, as for the recipes of training; with `paths`, also
    where a folder is missing."""
    config = _load(ServeConfig, "segmentation", segmentation_settings.check if paths else None, file, overrides)
    if paths:
        _make_absolute(config)
    return config


def load_reward_settings(file: str | None, overrides: Sequence[str]) -> RewardServeConfig:
    """Of the reward service. Raises ConfigError with every problem at once."""
    return _load(RewardServeConfig, "reward", reward_settings.check, file, overrides)


def _load(kind: type, name: str, check: Callable[[Any], None] | None, file: str | None, overrides: Sequence[str]) -> Any:
    show = f"videoseg serve {name} --show"
    values, sources = read_settings(file, overrides)
    config, problems = build(kind, values, sources)
    if problems:
        raise config_error(problems, show)
    try:
        if check is not None:
            check(config)
    except ValueError as error:
        raise ConfigError(str(error), f"`{show}` prints every key with its meaning") from error
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
    each = {"CPU": ("segmentation.cpus_per_replica", config.segmentation.cpus_per_replica), "GPU": ("gpus_per_replica", config.gpus_per_replica)}

    def start(serve: ModuleType) -> Any:
        from segmentation_service.client import HandleClient
        from segmentation_service.http_api import make_app

        return make_app(HandleClient(serve.start(config), config.wait_seconds), config)

    _serve("segmentation", config, start, lambda there: check_resources("segmentation.replicas", config.segmentation.replicas, each, there))


def serve_reward(config: RewardServeConfig) -> None:
    """The same for the reward service."""
    each = {"CPU": ("cpus_per_replica", config.cpus_per_replica)}

    def start(serve: ModuleType) -> Any:
        from reward_service.client import HandleClient
        from reward_service.http_api import make_app

        return make_app(HandleClient(serve.start(config), config.wait_seconds), config)

    _serve("reward", config, start, lambda there: check_resources("replicas", config.replicas, each, there))


def _serve(name: str, config: Any, start: Callable[[ModuleType], Any], check: Callable[[Mapping[str, float]], None]) -> None:
    """start: makes the HTTP application, given the module that runs the replicas. check: raises UserError where the cluster has too little."""
    from segmentation_service.http_guard import bearer_token
    from segmentation_service.http_server import address, listen, server

    bearer_token(config)
    listening = listen(config.host, config.port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from importlib import import_module

    import ray
    from ray import serve as ray_serve

    from cluster.ray_cluster import join_cluster
    from cluster.sections import ClusterConfig

    serve = import_module(f"{name}_service.serve")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # else it reports every request that finds the queue full
    serve.application(config)  # before Ray: it checks the checkpoint
    print("starting the replicas ...", flush=True)
    shared = False
    try:
        started_here = join_cluster(ClusterConfig(object_store_gb=OBJECT_STORE_GB))
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has brought its own, which aborts
        check(ray.cluster_resources())
        if serve.APPLICATION in ray_serve.status().applications:
            raise UserError(f"this Ray cluster serves {name} already", "stop that command first, or start a Ray of its own with RAY_ADDRESS=local")
        shared = not started_here
        app = start(serve)
        print(f"{name} service at {address(listening)} (its interface: {address(listening)}/docs); Ctrl-C stops it", flush=True)
        server(app).run(sockets=[listening])
    finally:
        listening.close()
        try:
            if shared:
                serve.stop()
        finally:
            ray.shutdown()


def check_resources(setting: str, replicas: int, each: Mapping[str, tuple[str, float]], there: Mapping[str, float]) -> None:
    """Replicas that do not fit would be waited for without end. each: by resource, the setting and how much of it a replica reserves."""
    for kind, (name, amount) in each.items():
        if replicas * amount > there.get(kind, 0.0):
            raise UserError(
                f"{replicas} replicas of {amount:g} {kind}s need {replicas * amount:g}, the Ray cluster has {there.get(kind, 0.0):g}",
                f"lower {setting} or {name}, or add machines to the cluster",
            )
