"""The command `videoseg`: parses the command line, reads and checks the configuration, starts what was asked for.

Exit status: 0 done, 2 for an error that the person can mend (one message), 3 where `segment` left a query without a mask, 1 for
any other error (with its traceback), 130 after Ctrl-C; `submit` has its job's. Everything heavy is imported inside the commands, so
that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster import __version__, cli_data, cli_policy
from cluster.cli_parsing import add_command, file_and_overrides
from cluster.errors import UserError, user_error

DEFAULT_RECIPE = "debug"
PROFILED = 3  # step of `train --profile`: the first after those that warm things up
_SETTINGS_HELP = """\
CONFIG is a YAML file or the name of a recipe that comes with the project (debug, videoseg_r1_7b, ...).
key=value changes one setting, with dots between sections: learner.lr=1e-6. `videoseg config` lists all keys."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    try:
        options = _parse(arguments)
        status = options.command(options) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader (head, less) has left; Python would complain again while it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        known = user_error(error)
        if known is None:
            traceback.print_exc()
            return 1
        message, remedy = known
        print(f"error: {message}", file=sys.stderr)
        if remedy:
            print(f"remedy: {remedy}", file=sys.stderr)
        return getattr(error, "status", 2)


def train(options: argparse.Namespace) -> None:
    """Train a policy; with no arguments the debug recipe."""
    settings, folder = _planned(options, *([f"loop.profile_step={PROFILED}"] if options.profile else []))
    if options.replay:
        if options.profile:
            raise UserError("--profile is of a run with engines, and --replay has none", "leave out one of them")
        from cluster import replay

        return replay.replay(settings, folder, [Path(p) for p in options.replay], options.start and Path(options.start))
    if options.start:
        raise UserError("--start is for --replay, which is not given", "to go on with a run: videoseg resume RUN")
    _start(settings, folder)


def sft(options: argparse.Namespace) -> None:
    """Fine-tune a policy on answers, from the truth or from a file, so that reinforcement learning begins with one that knows how to answer."""
    _start(*_planned(options, "run.task=sft"))


def _planned(options: argparse.Namespace, *more: str) -> tuple[Any, Any]:
    """The settings of a new run, checked against this machine, and the folder that it will get."""
    from cluster import config, config_resolve, run_folder

    recipe, overrides = _recipe_and_overrides(options)
    settings = config.load(recipe, [*overrides, *more])
    hardware = _hardware(settings)
    settings = config_resolve.resolve(settings, hardware)
    config_resolve.check_hardware(settings, hardware)
    task = "-sft" if settings.run.task == "sft" else ""
    return settings, run_folder.plan(settings.run.dir, settings.run.name, settings.run.recipe + task)


def _hardware(settings: Any) -> Any:
    """Of the cluster that a run joins, or of this machine."""
    from cluster import ray_cluster

    return ray_cluster.hardware(settings.cluster)


def _start(settings: Any, folder: Any) -> None:
    from cluster import config_files

    config_files.make_missing_data(settings)
    config_files.locate(settings)
    from cluster import trainer

    trainer.train(settings, folder)


def resume(options: argparse.Namespace) -> None:
    """Go on with a run from its last checkpoint."""
    from cluster import checkpoints, config, config_files, config_resolve, run_folder

    folder = run_folder.find(options.run)
    settings, changed = config.load_for_resume(folder.config, options.overrides)
    hardware = _hardware(settings)
    settings = config_resolve.resolve(settings, hardware)
    config_resolve.check_hardware(settings, hardware)
    config_files.locate(settings)
    checkpoints.latest(folder.checkpoints, hashes=False)
    folder.update(settings, changed, hardware)
    from cluster import trainer

    trainer.train(settings, folder, resume=True)


def submit(options: argparse.Namespace) -> int:
    """Train as a job of a Ray cluster: checks the settings here, sends the job, streams its log until it ends."""
    from cluster import submit

    env = dict(given.partition("=")[::2] for given in options.env)
    if unnamed := [given for given in options.env if not given.partition("=")[1]]:
        raise UserError(f"--env {unnamed[0]} has no value", "write --env NAME=VALUE")
    around = (options.working_dir, options.name, env)
    file, overrides = file_and_overrides(options)
    if options.resume and file:
        raise UserError(f"'{file}' is a CONFIG, but a resumed run has its own", "give --resume RUN and key=value settings only")
    job = submit.resuming_job(options.resume, overrides, *around) if options.resume else submit.training_job(file or DEFAULT_RECIPE, overrides, *around)
    return submit.submit(job, options.address, wait=not options.no_wait)


def status(options: argparse.Namespace) -> None:
    """Tell how a run is doing: its step, last numbers, newest checkpoint, time left, and what looks wrong."""
    import json
    import time

    from cluster import run_folder, status

    found = status.look(run_folder.find(options.run), time.time())
    print(json.dumps(found, indent=1) if options.json else "\n".join(status.lines(found)))


def report(options: argparse.Namespace) -> None:
    """Write a run as one HTML page: curves, rollouts, timeline, settings; or two runs' curves."""
    from cluster import report as reporting
    from cluster import run_folder

    folder = run_folder.find(options.run)
    against = run_folder.find(options.against) if options.against else None
    note = lambda text: print(text, file=sys.stderr, flush=True)
    print(reporting.write_report(folder, Path(options.out or folder.path / reporting.FILE), against, options.megabytes, options.groups, note))


def export(options: argparse.Namespace) -> None:
    """Write a run's policy as a Hugging Face folder, which transformers and vLLM load."""
    from cluster import checkpoints, config, policies, run_folder

    folder = run_folder.find(options.run)
    settings = config.load(folder.config)
    if options.step is None:
        checkpoint = checkpoints.latest(folder.checkpoints)[0]
    else:
        checkpoint = checkpoints.load(folder.checkpoints / checkpoints.checkpoint_name(options.step))
    policies.export_checkpoint(checkpoint, settings, Path(options.out))
    print(f"{options.out}: the policy of {folder.path} after step {checkpoint.step}; use it as policy.path, or load it with transformers or vLLM")


def show_config(options: argparse.Namespace) -> None:
    """Print the configuration as it would run here, every key with its meaning."""
    from dataclasses import replace

    from cluster import config, config_dump, config_files, config_resolve, config_rules

    recipe, overrides = _recipe_and_overrides(options)
    settings = config.load(recipe, overrides)
    hardware = config_resolve.detect_hardware()
    if options.gpus is not None:
        hardware = replace(hardware, cuda_devices=options.gpus, cuda_memory_gib=80.0, cuda_capability=9.0)
    notes: list[object] = list(config_files.file_problems(settings))
    if not options.unresolved:
        settings = config_resolve.resolve(settings, hardware)
        notes += config_rules.hardware_problems(settings, hardware, None if options.gpus is not None else config_resolve.installed_build())
    print(config_dump.dump_yaml(settings, comments=not options.plain, title=f"{recipe}, fingerprint {config_dump.fingerprint(settings)}"), end="")
    for note in notes:
        print(f"note: `videoseg train` would refuse: {note}", file=sys.stderr)


def plan(options: argparse.Namespace) -> None:
    """Print which process would sit where, with its memory, and what does not fit; nothing is started."""
    from dataclasses import replace

    from cluster import config, config_resolve, paths
    from cluster.plan import plan as planned

    recipe, overrides = _recipe_and_overrides(options)
    node = config_resolve.detect_hardware()
    given = {"cuda_devices": options.gpus, "cuda_memory_gib": options.gpu_memory, "cores": options.cores, "ram_gib": options.memory}
    if options.gpus:
        given["cuda_memory_gib"], node = options.gpu_memory or node.cuda_memory_gib or 80.0, replace(node, cuda_capability=9.0)
    node = replace(node, **{name: value for name, value in given.items() if value is not None})
    settings = config_resolve.resolve(config.load(recipe, overrides), node)
    if (where := paths.local_path(settings.policy.path)) is not None:
        settings = replace(settings, policy=replace(settings.policy, path=str(where)))
    if options.simulate:
        return _simulate(settings, options.simulate)
    found = planned(settings, node, options.nodes)
    print(f"{options.nodes} x ({node.cores} cores, {node.ram_gib:g} GiB of RAM" + (f", {node.cuda_devices} GPUs of {node.cuda_memory_gib:g} GiB" if node.cuda_devices else "") + ")")
    print("\n".join(found.lines()))
    if found.problems:
        raise UserError(f"{recipe} does not fit there ({len(found.problems)} problems, above)", "change the settings named, or plan for other machines: --nodes, --gpus, --gpu-memory, --cores, --memory")


def _simulate(settings: Any, run: str) -> None:
    """How long a step would take, with the costs of a run's stages."""
    from cluster import run_folder, stage_costs

    measured = stage_costs.measure(run_folder.find(run))
    print("\n".join(measured.lines()))
    sizes = stage_costs.sizes_of(settings)
    print(f"{settings.run.recipe}: {sizes.engines} engines, {sizes.segmenters} segmenters, {sizes.ranks} learner ranks, {sizes.groups} groups of {sizes.completions} a step")
    print("\n".join(stage_costs.table(stage_costs.forecasts(measured, settings), settings.loop.max_staleness)))


def bench(options: argparse.Namespace) -> None:
    """Measure a part side by side with what it is compared with; prints JSON."""
    import subprocess

    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    scripts = sorted(f.stem for f in folder.glob("*.py") if '__name__ == "__main__"' in f.read_text(encoding="utf-8"))
    if options.name not in scripts:
        here = f"choose one of {', '.join(scripts)}" if scripts else "benchmarks are not installed: run from a checkout of the project"
        raise UserError(f"there is no benchmark {options.name!r}", here)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(folder.parent), os.environ.get("PYTHONPATH"))))}
    done = subprocess.run([sys.executable, str(folder / f"{options.name}.py"), *options.arguments], env=environment)
    if done.returncode:
        raise UserError(f"the benchmark {options.name} ended with status {done.returncode}", "see what it printed above")


def serve_segmentation(options: argparse.Namespace) -> None:
    """Serve SAM2 and the propagation of its masks to other programs, by HTTP."""
    from cluster import config_dump, serve_command

    file, overrides = file_and_overrides(options)
    settings = serve_command.load_settings(file, overrides, paths=not options.show)
    if options.show:
        print(config_dump.dump_yaml(settings), end="")
    else:
        serve_command.serve_segmentation(settings)


def serve_reward(options: argparse.Namespace) -> None:
    """Serve rewards to other RL stacks, by HTTP."""
    from cluster import config_dump, serve_command

    settings = serve_command.load_reward_settings(*file_and_overrides(options))
    if options.show:
        print(config_dump.dump_yaml(settings), end="")
    else:
        serve_command.serve_reward(settings)


def _recipe_and_overrides(options: argparse.Namespace) -> tuple[str, list[str]]:
    file, overrides = file_and_overrides(options)
    return file or DEFAULT_RECIPE, overrides


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Settings may also stand behind options, where argparse takes no more of them."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    words = getattr(options, "words", None)  # queries, which may stand there too
    if rest and (any(r.startswith("-") for r in rest) or words is None and not (hasattr(options, "settings") and all("=" in r for r in rest))):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        (options.settings if words is None else words).extend(rest)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="videoseg",
        description="Reinforcement learning for reasoning video object segmentation.",
        epilog="example: videoseg train            (the debug recipe, on whatever this machine has)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"videoseg {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    command = add_command(commands, "train", train, "videoseg train configs/debug.yaml loop.steps=10 run.name=short", _SETTINGS_HELP)
    _add_settings(command)
    command.add_argument("--profile", action="store_true", help=f"record step {PROFILED} in all processes, operator by operator (loop.profile_step names another step)")
    command.add_argument("--replay", action="append", metavar="PATH", help="train on saved rollouts (a file, a run) without engines; may be repeated")
    command.add_argument("--start", metavar="CHECKPOINT", help="with --replay: a run's checkpoint to begin with, in place of policy.path alone")

    rule = "No engines and no segmenter. Settings are those of `videoseg train`, with a section sft; docs/sft.md says which of them count.\n\n" + _SETTINGS_HELP
    command = add_command(commands, "sft", sft, "videoseg sft videoseg_r1_7b data.train=data/mevis/train learner.lr=1e-5", rule)
    _add_settings(command)

    rule = "Settings that would change what was trained so far are refused."
    command = add_command(commands, "resume", resume, "videoseg resume runs/latest loop.steps=80", rule)
    command.add_argument("run", metavar="RUN", help="run folder, or its name below runs/ (also: latest)")
    command.add_argument("overrides", metavar="key=value", nargs="*", help="settings to change, for example loop.steps")

    rule = (
        "Ray's runtime environment is that of the nodes, with --env and a copy of --working-dir where they are given. Ctrl-C leaves the job\n"
        "running and says how to look at it, stop it and go on. Exit status: the job's; 130 if it was stopped. docs/cluster.md: how to get\n"
        "a cluster, and what its nodes must share.\n\n" + _SETTINGS_HELP
    )
    command = add_command(commands, "submit", submit, "videoseg submit videoseg_r1_7b data.train=/data/train data.evaluation=/data/valid run.dir=/shared/runs", rule)
    _add_settings(command)
    command.add_argument("--resume", metavar="RUN", help="go on with this run instead of starting one (CONFIG is then the run's own)")
    command.add_argument("--address", metavar="URL", help="the cluster's job server (default: RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265)")
    command.add_argument("--working-dir", metavar="DIR", help="send a copy of this folder to the nodes: the job runs in it, code in it comes first")
    command.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="environment variable of the job and all its parts; may be repeated")
    command.add_argument("--name", metavar="ID", help="the job's id (default: the run's name)")
    command.add_argument("--no-wait", action="store_true", help="end when the job is submitted")

    rule = "From the run's folder alone, so it works wherever the folder can be seen, with or without Ray."
    command = add_command(commands, "status", status, "videoseg status runs/latest", rule)
    command.add_argument("run", metavar="RUN", help="run folder, or its name below runs/ (also: latest)")
    command.add_argument("--json", action="store_true", help="print it as JSON")

    rule = "The page needs neither a network nor the run's folder. It may be written while the run goes on. docs/report.md"
    command = add_command(commands, "report", report, "videoseg report runs/latest --against runs/earlier", rule)
    command.add_argument("run", metavar="RUN", help="run folder, or its name below runs/ (also: latest)")
    command.add_argument("--against", metavar="RUN2", help="another run, whose curves are drawn beside")
    command.add_argument("--out", metavar="FILE", help="file to write (default: RUN/report.html)")
    command.add_argument("--groups", type=int, default=300, metavar="N", help="at most so many groups of rollouts, evenly over the steps (default 300)")
    command.add_argument("--megabytes", type=float, default=20.0, metavar="MB", help="largest page; rollouts fill what is left (default 20)")

    rule = "Needs neither a GPU nor the ranks that trained it. Adapters are merged."
    command = add_command(commands, "export", export, "videoseg export runs/latest models/my-policy", rule)
    command.add_argument("run", metavar="RUN", help="run folder, or its name below runs/ (also: latest)")
    command.add_argument("out", metavar="OUT", help="folder to make")
    command.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step (default: the newest)")

    cli_policy.add_to(commands)

    command = add_command(commands, "config", show_config, "videoseg config videoseg_r1_7b learner.zero_stage=2", _SETTINGS_HELP)
    _add_settings(command)
    command.add_argument("--plain", action="store_true", help="without the comments")
    command.add_argument("--gpus", type=int, metavar="N", help="as if this machine had N GPUs of 80 GB")
    command.add_argument("--unresolved", action="store_true", help="leave `auto` as it is instead of filling it in for this machine")

    more = "Estimates; docs/plan.md says how they are made.\n\n" + _SETTINGS_HELP
    command = add_command(commands, "plan", plan, "videoseg plan videoseg_r1_7b --gpus 8 --gpu-memory 80 --cores 64 --memory 512", more)
    _add_settings(command)
    command.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes of the cluster, all alike (default 1)")
    command.add_argument("--gpus", type=int, metavar="N", help="GPUs of a node (default: as here)")
    command.add_argument("--gpu-memory", type=float, metavar="GIB", help="memory of a GPU (default: as here, else 80)")
    command.add_argument("--cores", type=int, metavar="N", help="cores of a node (default: as here)")
    command.add_argument("--memory", type=float, metavar="GIB", help="RAM of a node (default: as here)")
    command.add_argument("--simulate", metavar="RUN", help="tell instead how long a step would take, in each mode, with stages that cost what they did in RUN")

    more = "What follows NAME goes to the benchmark; `videoseg bench NAME --help` says what it takes."
    command = add_command(commands, "bench", bench, "videoseg bench segmentation --json segmentation.json", more)
    command.add_argument("name", metavar="NAME", help="a script in benchmarks/, such as segmentation")
    command.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)

    services = commands.add_parser("serve", help="Serve a part of the system to other programs.", description="Serve a part of the system to other programs.")
    kinds = services.add_subparsers(title="commands", metavar="COMMAND", required=True)
    rule = "Runs until Ctrl-C. A bearer token is read from the environment, VIDEOSEG_TOKEN; beyond this machine it is required."
    for name, function, example in (
        ("segmentation", serve_segmentation, "videoseg serve segmentation segmentation.checkpoint=facebook/sam2.1-hiera-large 'roots=[videos]'"),
        ("reward", serve_reward, "videoseg serve reward reward.preset=vision_reasoner replicas=4"),
    ):
        command = add_command(kinds, name, function, example, rule)
        command.add_argument("settings", metavar="[CONFIG] key=value", nargs="*", help="YAML file of settings, and changes to it")
        command.add_argument("--show", action="store_true", help="print the settings with their meaning, and end")

    cli_data.add_to(commands)
    return parser


def _add_settings(command: argparse.ArgumentParser) -> None:
    command.add_argument("settings", metavar="[CONFIG] key=value", nargs="*", help=f"recipe (default: {DEFAULT_RECIPE}) and changes to it")


if __name__ == "__main__":
    sys.exit(main())
