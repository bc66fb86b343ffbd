"""The command line: help at once, one clear message and exit status 2 for what a person can mend, nothing half-written."""

import os
import subprocess
import sys
import types

import pytest

from cluster import cli, config, config_resolve, errors, run_folder
from cluster.errors import RunFailed, UserError, user_error

HEAVY = ("torch", "vllm", "ray", "deepspeed", "transformers", "omegaconf", "pyarrow", "rich", "numpy")


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A valid recipe in an empty current folder, with stand-ins for models and data."""
    monkeypatch.chdir(tmp_path)
    for name in ("policy", "sam2", "toy/train", "toy/valid_u"):
        (tmp_path / name).mkdir(parents=True)
    models = f"policy: {{path: {tmp_path}/policy}}\nsegmentation: {{checkpoint: {tmp_path}/sam2}}\n"
    (tmp_path / "mine.yaml").write_text(models + "data: {train: toy/train, evaluation: toy/valid_u}\nrollout: {max_model_len: 9000}\n")
    return "mine.yaml"


@pytest.fixture
def trainer(monkeypatch):
    """Stands in for the trainer; remembers how it was called."""
    fake = types.ModuleType("cluster.trainer")
    fake.calls = []
    fake.train = lambda settings, folder, resume=False: fake.calls.append((settings, folder, resume))
    monkeypatch.setitem(sys.modules, "cluster.trainer", fake)
    monkeypatch.setattr("cluster.trainer", fake, raising=False)
    return fake


def test_help_imports_nothing_heavy():
    code = f"import sys; from cluster import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\nprint([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    assert all(word in done.stdout for word in ("train", "resume", "config", "data", "segment", "demo", "example:"))


@pytest.mark.parametrize(
    "command",
    [["train"], ["sft"], ["resume"], ["submit"], ["status"], ["plan"], ["config"], ["bench"], ["sample-frames"], ["segment"], ["demo"], ["eval"], ["data"], ["data", "toy"], ["data", "difficulty"], ["data", "import"], ["data", "inspect"], ["serve"], ["serve", "segmentation"]],
)
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and (len(command) == 1 and command[0] in ("data", "serve") or f"example: videoseg {' '.join(command)}" in text)


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("videoseg 0.")


def test_config_prints_yaml_that_reads_back(recipe, tmp_path, capsys):
    assert cli.main(["config", recipe, "learner.lr=3e-5"]) == 0
    printed = capsys.readouterr()
    (tmp_path / "printed.yaml").write_text(printed.out)
    assert config.load("printed.yaml").learner.lr == 3e-5
    assert "# Peak learning rate" in printed.out and "auto  #" not in printed.out.split("policy:")[1]
    assert printed.err == ""


def test_config_can_look_at_another_machine(recipe, capsys):
    assert cli.main(["config", recipe, "--gpus", "1", "--plain"]) == 0
    printed = capsys.readouterr().out
    assert "dtype: bfloat16" in printed and "weight_sync: ipc" in printed and "build: cuda" in printed
    assert cli.main(["config", recipe, "--unresolved", "--plain"]) == 0
    assert "weight_sync: auto" in capsys.readouterr().out


def test_config_notes_what_is_missing_and_still_prints(recipe, capsys):
    assert cli.main(["config", recipe, "policy.path=toy/none"]) == 0
    printed = capsys.readouterr()
    assert "would refuse: policy.path = 'toy/none'" in printed.err and "lr:" in printed.out


def test_train_hands_a_planned_folder_to_the_trainer(recipe, trainer, tmp_path):
    assert cli.main(["train", recipe, "run.name=one", "loop.steps=3"]) == 0
    settings, folder, resume = trainer.calls[0]
    assert settings.loop.steps == 3 and settings.cluster.device in ("cpu", "cuda") and not resume
    assert folder.path.name == "one" and not (tmp_path / "runs").exists()  # the trainer makes it when all its checks have passed


def test_sft_is_a_run_with_another_task(recipe, trainer):
    """Nothing else is decided on the command line, so that `resume` goes on with the same task; and no segmenter is looked for."""
    assert cli.main(["sft", recipe, "run.dir=somewhere", "segmentation.checkpoint=not/here"]) == 0
    settings, folder, resume = trainer.calls[0]
    assert settings.run.task == "sft" and not resume and folder.path.parent.name == "somewhere" and folder.name.startswith("mine-sft-")
    assert cli.main(["train", recipe, "segmentation.checkpoint=not/here/either"]) == 2 and len(trainer.calls) == 1


def test_train_without_a_recipe_is_the_debug_recipe(trainer, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cluster.config_files.make_missing_data", lambda settings: None)
    monkeypatch.setattr("cluster.config_files.locate", lambda settings: settings)
    assert cli.main(["train", "loop.steps=3"]) == 0
    assert trainer.calls[0][0].run.recipe == "debug" and trainer.calls[0][1].name.startswith("debug-")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["learner.lrr=3"], "did you mean learner.lr?"),
        (["policy.path=toy/none"], "policy.path = 'toy/none': no such file"),
        (["loop.steps=-3"], "out of range"),
        (["run.name=../x"], "cannot be a run's name"),
        (["stray"], "'stray' is not a setting"),
        (["rollout.weight_sync=nccl", "cluster.device=cpu"], "which needs CUDA"),
    ],
)
def test_bad_input_gives_one_message_exit_2_and_no_folder(recipe, trainer, tmp_path, capsys, arguments, message):
    assert cli.main(["train", recipe, *arguments]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.startswith("error: ") and "\nremedy: " in printed and "Traceback" not in printed
    assert trainer.calls == [] and not (tmp_path / "runs").exists()


def test_a_missing_recipe(trainer, capsys):
    assert cli.main(["train", "debgu"]) == 2
    assert "did you mean debug?" in capsys.readouterr().err


def make_run(recipe, with_checkpoint=True):
    from cluster import checkpoints

    settings = config_resolve.resolve(config.load(recipe), config_resolve.detect_hardware())
    folder = run_folder.plan("runs", "one", "mine")
    folder.create(settings)
    if with_checkpoint:
        with checkpoints.writing(folder.checkpoints, 2) as temporary:
            (temporary / "weights").write_bytes(b"w")
    return folder


def test_resume_goes_on_with_changed_settings_and_keeps_them(recipe, trainer, tmp_path):
    make_run(recipe)
    assert cli.main(["resume", "latest", "loop.steps=700"]) == 0
    settings, folder, resume = trainer.calls[0]
    assert resume and settings.loop.steps == 700 and folder.name == "one"
    assert '"loop.steps": [500, 700]' in (tmp_path / "runs/one/resumes.jsonl").read_text()
    assert cli.main(["resume", "runs/one"]) == 0
    assert trainer.calls[1][0].loop.steps == 700  # the next resume need not repeat it


def test_resume_refuses(recipe, trainer, capsys):
    assert cli.main(["resume", "one"]) == 2
    assert "there are no runs" in capsys.readouterr().err
    make_run(recipe, with_checkpoint=False)
    assert cli.main(["resume", "one"]) == 2
    assert "no usable checkpoint" in capsys.readouterr().err
    assert cli.main(["resume", "one", "learner.lr=1"]) == 2
    assert "learner.lr: was" in capsys.readouterr().err
    assert trainer.calls == []


def test_data_toy_never_overwrites(tmp_path, capsys, monkeypatch):
    from rollout import toy_data

    monkeypatch.setattr(toy_data, "write_toy_data", lambda out, settings: out.mkdir())
    assert cli.main(["data", "toy", str(tmp_path / "toy"), "--seed", "3"]) == 0
    assert cli.main(["data", "toy", str(tmp_path / "toy")]) == 2
    assert "already something" in capsys.readouterr().err


class RayLike(Exception):
    """As Ray wraps a remote failure: the cause is an attribute."""

    def __init__(self, cause):
        super().__init__("wrapped")
        self.cause = cause


@pytest.mark.parametrize(
    "error, status, shown",
    [
        (RunFailed("too many failures", "mend the segmenter"), 2, "error: too many failures\nremedy: mend the segmenter\n"),
        (RayLike(UserError("port 80 is in use", "take another")), 2, "error: port 80 is in use\nremedy: take another\n"),
        (KeyError("bug"), 1, "Traceback"),
        (RayLike(KeyError("bug")), 1, "Traceback"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_status(error, status, shown, recipe, trainer, capsys):
    def fail(*_, **__):
        raise error

    trainer.train = fail
    assert cli.main(["train", recipe]) == status
    assert shown in capsys.readouterr().err


def test_errors_of_our_other_packages_are_for_the_person_too():
    from rollout.prompts import PromptError

    wrapped = RuntimeError("outer")
    wrapped.__cause__ = RayLike(PromptError("the prompt is too long; show fewer frames"))
    assert user_error(wrapped) == ("the prompt is too long; show fewer frames", "")
    assert user_error(ValueError("not ours")) is None


def test_an_error_met_while_handling_another_is_not_mistaken_for_it():
    try:
        try:
            raise UserError("first")
        except UserError:
            raise KeyError("second, a bug")
    except KeyError as error:
        assert user_error(error) is None


def test_a_reader_that_leaves_is_no_error(recipe):
    command = f"{sys.executable} -m cluster.cli config {recipe} | head -1"
    environment = {**os.environ, "PYTHONPATH": str(config.__file__).rsplit("/", 2)[0]}
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_all_our_errors_pickle():
    import pickle

    for kind in (c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, UserError)):
        back = pickle.loads(pickle.dumps(kind("message", "remedy")))
        assert type(back) is kind and (back.message, back.remedy) == ("message", "remedy")


def test_bench_runs_a_script_and_names_those_that_there_are(capfd):
    assert cli.main(["bench", "segmentation", "--help"]) == 0
    assert "hypotheses" in capfd.readouterr().out
    assert cli.main(["bench", "nothing"]) == 2
    assert "segmentation" in capfd.readouterr().err
