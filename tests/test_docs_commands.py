"""Every shell command of README.md and docs/: the program that it names takes it, and it is run where a toy makes that quick. One that no rule here covers fails."""

import configparser
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass

import pytest

import configs
from cluster import cli, config, sample_frames, serve_command
from cluster.cli_parsing import file_and_overrides
from tests.conftest import ROOT, TOY

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^(```+)(\w*)\n(.*?)^\1\s*$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`((?:[A-Z_]+=\S+\s)*(?:videoseg|python3?|make|pytest|ray|pip|sbatch)\s[^`]+)`(?!`)")
ENVIRONMENT = re.compile(r"[A-Z_]+=.*")

# Programs that are not run here, and why.
OTHER_PROGRAMS = {
    "export": "sets variables of the shell",
    "mkdir": "coreutils",
    "zip": "Info-ZIP",
    "curl": "the requests are sent by tests/segmentation_service/test_http_docs.py and tests/reward_service/test_reward_service.py",
    "ssh": "needs a second machine",
    "kubectl": "needs a Kubernetes cluster; tests/examples/test_cluster_examples.py looks at the manifests",
    "sbatch": "needs SLURM; tests/examples/test_cluster_examples.py looks at the script",
    "apt-get": "changes the machine",
    "git": "needs a remote",
    "tensorboard": "serves until it is ended",
}
# Subcommands that need models, engines or a cluster, and the test that runs them for real.
ELSEWHERE = {
    "train": "tests/cluster/test_faults.py",
    "sft": "tests/cluster/test_sft.py",
    "resume": "tests/cluster/test_sft.py",
    "submit": "tests/cluster/test_submit.py",
    "export": "tests/cluster/test_loop.py",
    "segment": "tests/cluster/test_segment.py",
    "demo": "tests/cluster/test_demo.py",
    "plan": "tests/cluster/test_stage_costs.py",  # with --simulate
    "eval": "tests/cluster/test_evaluate.py",
    "sample-frames": "tests/cluster/test_sample_frames.py",
    "serve segmentation": "tests/cluster/test_serve_command.py",
    "serve reward": "tests/cluster/test_serve_command.py",
    "data toy": "tests/cluster/test_cli.py",
    "data import": "tests/cluster/test_inspect_data.py",
    "data inspect": "tests/cluster/test_oracle.py",
    "data difficulty": "tests/cluster/test_rate_difficulty.py",
    "bench": "tests/cluster/test_cli.py",
}
RUN_HERE = {"config", "plan", "status", "report", "data inspect", "data import own", "serve segmentation --show", "serve reward --show", "sample-frames --show"}
MODULES_RUN_HERE = {"examples.own_videos", "examples.rewards.score_completions"}
# Words that stand for something of the reader's: what is there in their place when commands are run.
PLACEHOLDERS = {
    "RUN": "runs/latest", "RECIPE": "debug", "CONFIG": "debug", "[CONFIG]": "debug", "NAME": "learning", "DATA": "data/toy", "KIND": "own", "SRC": "mine", "OUT": "out",
    "X1": "40", "Y1": "30", "X2": "90", "Y2": "80",
}  # fmt: skip
SYNOPSIS = {"...", "[key=value", "...]", "key=value", "&"}


@dataclass(frozen=True)
class Command:
    where: str
    words: tuple[str, ...]
    inline: bool  # in a sentence, where a command may only be named: `videoseg train`

    @property
    def program(self):
        return self.words[0]

    def __str__(self):
        return f"{self.where}: {' '.join(self.words)}"


def split(block):
    """The commands of a block as words: without comments, continued lines joined."""
    pending = ""
    for line in block.splitlines():
        pending += f"{line}\n"
        try:
            words = [] if line.endswith("\\") else shlex.split(pending.replace("\\\n", " "), comments=True)
        except ValueError:  # a quotation that goes on
            continue
        if not line.endswith("\\"):
            pending = ""
        if words:
            yield words
    assert not pending, f"this does not end: {pending}"


def commands_of(text, where):
    for fence in FENCE.finditer(text):
        language, block = fence[2], fence[3]
        if language == "console":
            block = "".join(line.removeprefix("$ ") for line in block.splitlines(True) if line.startswith("$ "))
        elif language not in ("", "sh") or not language and block.startswith("{"):  # JSON lines
            continue
        for words in split(block):
            yield command(where, words, False)
    for found in INLINE.finditer(FENCE.sub("", text)):
        (words,) = split(" ".join(found[1].split()))
        yield command(where, words, True)


def command(where, words, inline):
    while ENVIRONMENT.fullmatch(words[0]):
        words = words[1:]
    words = [PLACEHOLDERS.get(word, word) for word in words if word not in SYNOPSIS]
    words[0] = words[0].removeprefix(".venv/bin/")
    return Command(where, tuple(words[2:] if words[:3] == ["python", "-m", "pytest"] else words), inline)


COMMANDS = list({c.words + (c.inline,): c for page in PAGES for c in commands_of(page.read_text(), str(page.relative_to(ROOT)))}.values())
OURS = [c for c in COMMANDS if c.program == "videoseg"]
PYTHON = [c for c in COMMANDS if c.program in ("python", "python3")] + [c for c in OURS if c.words[1:2] == ("bench",) and len(c.words) > 2]


def test_the_commands_are_found():
    text = "```sh\nA=1 .venv/bin/ray up   # it's up\nvideoseg train \\\n  a=1 'b=[1, 2]' &\ncurl -d '\n  {}'\n```\n`videoseg\nplan RECIPE` ```no``` `make` `make train`\n```console\n$ ls\nmake it\n```\n```text\nno\n```\n"
    assert [(c.words, c.inline) for c in commands_of(text, "x")] == [
        (("ray", "up"), False), (("videoseg", "train", "a=1", "b=[1, 2]"), False), (("curl", "-d", "\n  {}"), False), (("ls",), False),
        (("videoseg", "plan", "debug"), True), (("make", "train"), True),
    ]  # fmt: skip
    assert len(OURS) > 40 and len({c.words[1] for c in OURS}) >= 15


def test_every_command_is_covered():
    covered = {"videoseg", "python", "python3", "make", "pytest", "ray", "pip", *OTHER_PROGRAMS}
    unknown = [str(c) for c in COMMANDS if c.program not in covered and not (ROOT / c.program).is_file()]
    assert not unknown, "no rule for these; label a block that is none `text`"
    assert all(os.access(ROOT / c.program, os.X_OK) for c in COMMANDS if "/" in c.program)
    assert {c.words[1] for c in COMMANDS if c.program == "sbatch"} <= {"examples/cluster/slurm.sh"}


def parsed(c, capsys):
    """The options of a `videoseg` command; None where a sentence names less than a whole one."""
    if c.words[1] == "bench":
        return None
    try:
        return cli._parse(c.words[1:])
    except SystemExit:
        said = capsys.readouterr().err
        assert c.inline and ("arguments are required" in said or "expected one argument" in said), f"{c}\n{said}"


@pytest.mark.parametrize("c", OURS, ids=str)
def test_videoseg_takes_its_commands(c, capsys):
    options = parsed(c, capsys)
    if options is None or c.inline and len(c.words) == 2:
        return
    name = c.words[1]
    if name in ("train", "sft", "submit", "config", "plan"):
        file, overrides = file_and_overrides(options)
        config.load("debug" if file is None or file.startswith("runs/") else file, overrides)
    elif name == "resume":
        config.load("debug", options.overrides)
    elif name == "segment":
        config.load("debug", [w for w in options.words if re.match(r"[a-z_]+(\.\w+)+=", w) and not w.startswith("sampler.")])
    elif name == "eval":
        config.load("debug", [w for w in file_and_overrides(options)[1] if not w.startswith("sampler.")])
    elif name == "sample-frames":
        sample_frames.load_settings(*file_and_overrides(options))
    elif name == "serve" and c.words[2] == "segmentation":
        serve_command.load_settings(*file_and_overrides(options), paths=False)
    elif name == "serve":
        serve_command.load_reward_settings(*file_and_overrides(options))


def runs_here(c):
    """Whether the command, all of it, is one that is run below."""
    text = " ".join(c.words[1:])
    return not {"--oracle", "--simulate"} & set(c.words) and any(set(rule.split()) <= set(c.words) and text.startswith(rule.split(" --")[0]) for rule in RUN_HERE)


def test_what_is_not_run_here_is_run_by_another_test():
    for c in OURS:
        name = " ".join(c.words[1:3]) if c.words[1] in ("data", "serve") else c.words[1]
        if not runs_here(c):
            assert name in ELSEWHERE, f"{c}: no rule says where it is run"
    for name, file in ELSEWHERE.items():
        assert all(f'"{word}"' in (ROOT / file).read_text() for word in name.split()), f"{file} does not run `videoseg {name}`"


@pytest.fixture(scope="module")
def place(tmp_path_factory, toy_data):
    """A folder in which the docs' relative paths lead to toy data and to runs of a few steps."""
    from transformers import AutoTokenizer

    from rollout.episodes import read_episodes
    from tests.cluster.test_report import made

    there = tmp_path_factory.mktemp("docs")
    for name in ("toy", "mevis"):
        (there / "data").mkdir(exist_ok=True)
        (there / "data" / name).symlink_to(toy_data)
    episodes, tokenizer = list(read_episodes(toy_data / "train")), AutoTokenizer.from_pretrained(TOY / "policy")
    for name in ("earlier", "one"):
        made(there / "runs", name, episodes, tokenizer)  # the second is also `latest`
    return there


def test_quick_commands_run(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "200")
    wrong = []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    for words in sorted({c.words for c in PYTHON if c.words[1:2] == ("-m",) and c.words[2] in MODULES_RUN_HERE}):
        done = subprocess.run([sys.executable, *words[1:]], env=environment, capture_output=True, text=True)
        wrong += [f"{words}: {done.stderr}"] * (done.returncode != 0)
    ran = 0
    for c in OURS:
        if runs_here(c) and parsed(c, capsys) is not None:
            ran += 1
            if cli.main(c.words[1:]) != 0:
                wrong.append(f"{c}: {capsys.readouterr().err}")
    assert not wrong, "\n".join(wrong)
    assert ran >= 12


def test_programs_take_their_arguments():
    """Benchmarks and examples, by their own parsers, and with --help; nothing of them is run."""
    calls = set()
    for c in PYTHON:
        program, *arguments = c.words[2:] if c.words[1] in ("-m", "bench") else c.words[1:]
        program = str(ROOT / f"benchmarks/{program}.py") if c.program == "videoseg" else str(ROOT / program) if program.endswith(".py") else program
        if program not in MODULES_RUN_HERE:
            calls |= {(program, tuple(arguments)), (program, ("--help",))}
    done = subprocess.run([sys.executable, "-m", "tests.parse_only"], cwd=ROOT, input=json.dumps(sorted(calls)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [] and len(calls) > 20


def test_targets_files_and_extras_are_there():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = set(setup["options.extras_require"])
    for c in COMMANDS:
        if c.program == "make":
            assert {w for w in c.words[1:] if "=" not in w} <= targets, str(c)
        if c.program == "pytest":
            assert all((ROOT / w).exists() for w in c.words[1:] if "/" in w), str(c)
        for word in c.words if c.program == "pip" else ():
            assert set(re.findall(r"\w+", (re.search(r"\[(.*)\]", word) or ["", ""])[1])) <= extras, str(c)


def test_ray_has_the_commands_and_options():
    import click
    from ray.scripts.scripts import cli as ray

    for c in (c for c in COMMANDS if c.program == "ray"):
        known = ray
        for word in c.words[1:]:
            if word.startswith("-"):
                assert word.split("=")[0] in {o for parameter in known.params for o in parameter.opts}, str(c)
            elif isinstance(known, click.Group):
                known = known.commands.get(word)
                assert known, str(c)


def test_every_recipe_is_named():
    assert all(name in (ROOT / "docs/plan.md").read_text() or "_lora_" in name for name in configs.names())
