"""Configuration: what is read, what is refused and with which words, what the hardware decides, what is written down."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import pytest

import configs
from cluster import config, config_check, config_dump, config_resolve, config_rules
from cluster.config_check import Source, build, leaf_keys, nearest_key
from cluster.config_file import read_settings
from cluster.config_resolve import Hardware, resolve
from cluster.errors import ConfigError
from learner.config import LearnerConfig

ROOT = Path(__file__).parents[2]
LAPTOP = Hardware(cores=2, ram_gib=16)
ONE_GPU = Hardware(cuda_devices=1, cuda_memory_gib=80, cuda_capability=9.0, cores=16, ram_gib=128)
ROOMY = ["rollout.max_model_len=9000"]  # the packages' own defaults with room for the longest prompt


@dataclass
class Inner:
    lr: float = field(default=1e-6, metadata={"min": 0.0, "help": "Learning rate."})
    steps: int = field(default=3, metadata={"min": 1, "max": 9})
    share: Optional[float] = field(default=None, metadata={"above": 0, "max": 1})
    mode: str = field(default="fast", metadata={"choices": ("fast", "exact")})
    sizes: list[int] = field(default_factory=lambda: [1, 2])
    pair: tuple[int, int] = (1, 2)
    flag: bool = False
    name: str = "auto"
    kind: Literal["a", "b"] = "a"
    either: int | str = "auto"
    weights: dict[str, float] = field(default_factory=dict)


@dataclass
class Root:
    inner: Inner = field(default_factory=Inner, metadata={"help": "The inner part."})
    seed: int = 0


def problems_of(overrides, tmp_path=None, text=None):
    file = None
    if text is not None:
        file = tmp_path / "x.yaml"
        file.write_text(text)
    values, sources = read_settings(file, overrides)
    made, problems = build(Root, values, sources)
    return made, [str(p) for p in problems]


# ------------------------------------------------------------------------------------------------ values and types


def test_values_of_every_type_are_taken():
    made, problems = problems_of(
        ["inner.lr=1e-4", "inner.steps=4.0", "inner.share=0.5", "inner.mode=exact", "inner.sizes=[3]", "inner.pair=[5,6]", "inner.flag=true"]
        + ["inner.kind=b", "inner.either=7", "inner.weights={x: 1, y: 2.5}"]
    )
    assert problems == []
    assert made.inner == Inner(1e-4, 4, 0.5, "exact", [3], (5, 6), True, "auto", "b", 7, {"x": 1.0, "y": 2.5})
    assert type(made.inner.steps) is int and type(made.inner.lr) is float


def test_an_override_that_looks_like_a_number_is_text_for_a_text_setting():
    made, problems = problems_of(["inner.name=007"])
    assert problems == [] and made.inner.name == "007"


def test_a_whole_number_is_a_float_and_null_is_none():
    made, problems = problems_of(["inner.lr=2", "inner.share=null"])
    assert problems == [] and made.inner.lr == 2.0 and type(made.inner.lr) is float and made.inner.share is None


@pytest.mark.parametrize(
    "override, message",
    [
        ("inner.steps=2.5", "2.5 is not a whole number"),
        ("inner.steps=true", "true is not a whole number"),
        ("inner.steps=many", "'many' is not a whole number"),
        ("inner.steps=0", "0 is out of range, allowed is 1 .. 9"),
        ("inner.lr=-1", "-1 is out of range, allowed is at least 0"),
        ("inner.lr=.nan", "must be a number, got nan"),
        ("inner.share=0", "0 is out of range, allowed is above 0 and at most 1"),
        ("inner.share=1.5", "1.5 is out of range"),
        ("inner.mode=fsat", "'fsat' is not one of 'fast', 'exact' (did you mean fast?)"),
        ("inner.flag=1", "1 is not true or false"),
        ("inner.flag=maybe", "'maybe' is not true or false"),
        ("inner.sizes=3", "3 is not a list (a whole number each)"),
        ("inner.sizes=[1,x]", "'x' is not a whole number"),
        ("inner.pair=[1]", "[1] is not a list of 2"),
        ("inner.kind=c", "'c' is not one of 'a', 'b'"),
        ("inner.name=null", "null is not text"),
        ("inner.name=[1]", "[1] is not text"),
        ("inner=3", "3 is not a section (lr, steps"),
        ("inner.weights=3", "3 is not a section of a number values"),
    ],
)
def test_wrong_values_are_refused_in_words(override, message):
    made, problems = problems_of([override])
    assert len(problems) == 1
    assert f"override '{override}'" in problems[0] and override.split("=")[0] in problems[0] and message in problems[0]


def test_a_number_for_text_in_a_file_wants_quotes(tmp_path):
    _, problems = problems_of([], tmp_path, "inner:\n  name: 7\n")
    assert problems == [f"{tmp_path}/x.yaml:2: inner.name: 7 is not text (write it in quotes)"]


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("inner.lrr", "inner.lr"),
        ("inner.step", "inner.steps"),
        ("lr", "inner.lr"),  # the section forgotten
        ("other.lr", "inner.lr"),
        ("iner", "inner"),
        ("seeed", "seed"),
        ("iner.mode", "inner.mode"),
        ("xyzzy", None),
    ],
)
def test_nearest_key(key, nearest):
    assert nearest_key(key, Root) == nearest
    _, problems = problems_of([f"{key}=1"])
    if key != "iner.mode":
        assert (f"did you mean {nearest}?" if nearest else "the keys here are inner, seed") in problems[0]


def test_all_problems_are_reported_together_with_their_places(tmp_path):
    _, problems = problems_of(["inner.mode=slow"], tmp_path, "inner:\n  lrr: 1\n  steps: 99\nseeds: 3\n")
    assert len(problems) == 4
    assert any(p.startswith(f"{tmp_path}/x.yaml:2: inner.lrr: unknown key; did you mean inner.lr?") for p in problems)
    assert any(p.startswith(f"{tmp_path}/x.yaml:3: inner.steps: 99 is out of range") for p in problems)
    assert any(p.startswith(f"{tmp_path}/x.yaml:4: seeds: unknown key") for p in problems)


def test_a_post_init_that_refuses_is_a_problem_not_a_crash():
    @dataclass
    class Picky:
        a: int = 1

        def __post_init__(self):
            if self.a == 2:
                raise ValueError("a must not be 2")

    made, problems = build(Picky, {"a": 2}, {"a": Source("x.yaml:1")})
    assert made is None and "a must not be 2" in str(problems[0])


def test_a_required_setting_that_is_missing_is_named():
    @dataclass
    class Strict:
        a: int = field(metadata={"help": "How many."})

    made, problems = build(Strict, {}, {})
    assert made is None and str(problems[0]) == "a: must be set; How many."


# ------------------------------------------------------------------------------------------------------- the files


def test_extends_is_relative_and_later_wins(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text("inner: {lr: 1e-3, steps: 2, sizes: [9, 9, 9]}\nseed: 1\n")
    child = tmp_path / "sub" / "child.yaml"
    child.write_text("extends: ../base.yaml\ninner:\n  lr: 1e-5\n  sizes: [4]\n")
    values, sources = read_settings(child, ["seed=5"])
    assert values == {"inner": {"lr": 1e-5, "steps": 2, "sizes": [4]}, "seed": 5}
    assert sources["inner.lr"].where == f"{child}:3" and sources["inner.steps"].where.endswith("base.yaml:1")
    assert sources["seed"].where == "override 'seed=5'"
    grandchild = tmp_path / "grandchild.yaml"
    grandchild.write_text("extends: sub/child.yaml\nseed: 7\n")
    assert read_settings(grandchild)[0] == {"inner": {"lr": 1e-5, "steps": 2, "sizes": [4]}, "seed": 7}
    (tmp_path / "base.yaml").write_text("extends: grandchild.yaml\n")
    with pytest.raises(ConfigError, match="which extends it"):
        read_settings(grandchild)
    grandchild.write_text("extends: none.yaml\n")
    with pytest.raises(ConfigError, match="there is no file"):
        read_settings(grandchild)


def test_a_section_with_everything_commented_out_keeps_the_base(tmp_path):
    (tmp_path / "base.yaml").write_text("inner: {lr: 1e-3}\n")
    child = tmp_path / "child.yaml"
    child.write_text("extends: base.yaml\ninner:\n  # lr: 1\n")
    assert read_settings(child)[0] == {"inner": {"lr": 1e-3}}
    alone = tmp_path / "alone.yaml"
    alone.write_text("inner:\n  # lr: 1\n")
    assert build(Root, *read_settings(alone)) == (Root(), [])


@pytest.mark.parametrize(
    "text, message",
    [
        ("inner: [1\n", "not valid YAML"),
        ("a: 1\na: 2\n", r"x.yaml:2: not valid YAML: found duplicate key"),
        ("- 1\n", "holds no settings by name"),
        ("inner:\n\tlr: 1\n", r"x.yaml:2: not valid YAML"),
        ("seed: ${nowhere}\n", "nowhere"),
        ("extends: [a]\n", "extends must be the name"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, text, message):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_settings(file)


def test_binary_rubbish_is_not_a_recipe(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match="not a text file"):
        read_settings(file)


def test_an_empty_file_is_the_defaults(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("# nothing\n")
    assert read_settings(file) == ({}, {})


def test_references_between_settings():
    assert read_settings(None, ["seed=3", "inner.steps=${seed}"])[0]["inner"]["steps"] == 3


@pytest.mark.parametrize("override", ["lr", "=3", "a..b=1", ".a=1", "a =1", "inner.sizes=[1"])
def test_overrides_that_are_none(override):
    with pytest.raises(ConfigError):
        read_settings(None, [override])


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="no configuration file 'debgu'") as caught:
        config.load("debgu")
    assert "did you mean debug?" in caught.value.remedy and "videoseg_r1_7b" in caught.value.remedy


def test_recipes_are_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("debug", "debug.yaml", "configs/debug.yaml"):
        assert config.load(name).run.recipe == "debug"


# --------------------------------------------------------------------------------------------------- the real thing


@pytest.mark.parametrize("name", configs.names())
def test_every_recipe_is_valid_and_resolves_and_survives_being_written(name, tmp_path):
    loaded = config.load(name)
    for hardware in (LAPTOP, ONE_GPU):
        resolved = resolve(loaded, hardware)
        file = tmp_path / "config.yaml"
        file.write_text(config_dump.dump_yaml(resolved))
        assert config.load(file) == resolved
        assert resolve(resolved, hardware) == resolved  # nothing is left to decide


def test_the_paper_recipe_holds_the_papers_values():
    c = config.load("videoseg_r1_7b")
    assert (c.rollout.prompts_per_step, c.rollout.group_size, c.learner.lr, c.learner.weight_decay, c.learner.ranks) == (16, 8, 1e-6, 0.01, 8)
    assert c.reward.formula == "videoseg_r1" and c.reward.accuracy_iou == "box" and not c.reward.needs_predicted_masks
    small = config.load("videoseg_r1_3b")
    assert small.policy.path.endswith("3B-Instruct") and small.reward == c.reward and small.run.recipe == "videoseg_r1_3b"
    newer = config.load("videoseg_r1_qwen3_vl_8b")
    assert newer.reward == c.reward and not any(side % 32 for side in newer.prompt.target_size + newer.prompt.reference_size)


def test_the_paper_recipe_fits_eight_gpus():
    eight = Hardware(cuda_devices=8, cuda_memory_gib=80, cuda_capability=8.0, cores=64, ram_gib=512)
    resolved = resolve(config.load("videoseg_r1_7b"), eight)
    assert config_rules.hardware_problems(resolved, eight, "cuda") == []
    assert resolved.rollout.weight_sync == "ipc"


def test_the_nodes_of_a_cluster_count_together():
    """Two nodes of eight GPUs behind a head without any: sixteen ranks fit, and threads are shared out over all nodes, at most one node's to a part."""
    node = Hardware(cuda_devices=8, cuda_memory_gib=80, cuda_capability=8.0, cores=64, ram_gib=512)
    whole = config_resolve.together([Hardware(cores=8, ram_gib=32), node, node])
    assert whole == Hardware(cuda_devices=16, cuda_memory_gib=80, cuda_capability=8.0, cores=8, ram_gib=32, nodes=3)
    assert whole.each == (Hardware(cores=8, ram_gib=32), node, node) and config_resolve.together([node]).each == ()
    asked = config.load("videoseg_r1_7b", ["learner.ranks=16", "rollout.engines=16"])
    assert config_rules.hardware_problems(resolve(asked, whole), whole, "cuda") == []
    assert [p.key for p in config_rules.hardware_problems(resolve(asked, node), node, "cuda")] == ["learner.ranks", "cluster.gpus_per_engine"]
    three = config_resolve.together([LAPTOP] * 3)
    resolved = resolve(config.load("debug", ["rollout.cpu_threads=0", "rollout.engines=3", "learner.ranks=2"]), three)
    assert (resolved.rollout.cpu_threads, resolved.learner.threads) == (2, 2)


def test_the_debug_recipe_uses_the_mask_reward_and_its_budgets_bite():
    c = config.load("debug")
    assert c.reward.needs_predicted_masks and c.reward.length.easy_budget * c.reward.length.budget_scale < c.rollout.max_response_tokens / 2


def test_one_cuda_gpu_selects_bf16_the_gpu_build_and_ipc_without_edits():
    c = config.load("debug")
    gpu, cpu = resolve(c, ONE_GPU), resolve(c, LAPTOP)
    assert (gpu.policy.dtype, gpu.learner.dtype, gpu.segmentation.dtype) == ("bfloat16",) * 3
    assert (gpu.cluster.device, gpu.cluster.build, gpu.segmentation.device, gpu.rollout.weight_sync) == ("cuda", "cuda", "cuda", "ipc")
    assert (cpu.policy.dtype, cpu.learner.dtype, cpu.segmentation.dtype) == ("float32",) * 3
    assert (cpu.cluster.device, cpu.cluster.build, cpu.segmentation.device, cpu.rollout.weight_sync) == ("cpu", "cpu", "cpu", "object_store")
    assert (cpu.rollout.cpu_threads, cpu.learner.threads) == (1, 2)
    assert config_rules.hardware_problems(gpu, ONE_GPU, "cuda") == config_rules.hardware_problems(cpu, LAPTOP, "cpu") == []
    assert c == config.load("debug")  # pure: the argument is as it was


def test_fine_tuning_reserves_gpus_for_learners_alone():
    asked = ["learner.ranks=1", "rollout.engines=2", "rollout.weight_sync=nccl"]
    assert [p.key for p in config_rules.hardware_problems(resolve(config.load("debug", asked), ONE_GPU), ONE_GPU, "cuda")] == ["cluster.gpus_per_engine"]
    tuned = resolve(config.load("debug", [*asked, "run.task=sft"]), ONE_GPU)
    assert config_rules.hardware_problems(tuned, ONE_GPU, "cuda") == []


def test_resolving_heeds_what_is_fixed():
    old_gpu = dataclasses.replace(ONE_GPU, cuda_capability=7.5)
    assert resolve(config.load("debug"), old_gpu).policy.dtype == "float32"  # no bfloat16 before Ampere
    assert resolve(config.load("debug", ["cluster.device=cpu"]), ONE_GPU).rollout.weight_sync == "object_store"
    assert resolve(config.load("debug", ["loop.deterministic=true"]), ONE_GPU).learner.dtype == "float32"
    assert resolve(config.load("debug", ["policy.dtype=float32"]), ONE_GPU).learner.dtype == "float32"
    assert resolve(config.load("debug", ["rollout.engines=2"]), dataclasses.replace(ONE_GPU, cuda_devices=3)).rollout.weight_sync == "nccl"
    with pytest.raises(ConfigError, match="rollout.weight_sync: is ipc, which needs CUDA"):
        resolve(config.load("debug", ["rollout.weight_sync=ipc"]), LAPTOP)
    with pytest.raises(ConfigError, match="a learner rank on every GPU"):
        resolve(config.load("debug", ["rollout.weight_sync=ipc", "rollout.engines=2"]), ONE_GPU)


def test_what_the_machine_lacks_is_told_before_the_start():
    asked = resolve(config.load("debug", ["cluster.device=cuda", "learner.ranks=2"]), LAPTOP)
    assert [p.key for p in config_rules.hardware_problems(asked, LAPTOP, "cpu")] == ["cluster.device", "cluster.build"]
    crowded = resolve(config.load("debug", ["learner.ranks=2"]), ONE_GPU)
    assert [p.key for p in config_rules.hardware_problems(crowded, ONE_GPU, "cuda")] == ["learner.ranks", "cluster.gpus_per_engine"]
    with pytest.raises(ConfigError, match="no CUDA GPU here"):
        config_resolve.check_hardware(asked, LAPTOP)


@pytest.mark.parametrize(
    "overrides, key",
    [
        (["rollout.group_size=1"], "rollout.group_size"),
        (["rollout.max_model_len=300"], "rollout.max_model_len"),
        (["learner.tokens_per_microbatch=300"], "learner.tokens_per_microbatch"),
        (["rollout.max_images=4"], "rollout.max_images"),
        (["rollout.top_p=0.9"], "rollout.top_p"),
        (["prompt.target_size=[112]"], "prompt.target_size"),
        (["prompt.reference_size=[0,56]"], "prompt.reference_size"),
        (["prompt.frames_as=video"], "prompt.frames_as"),
        (["learner.minibatches=25"], "learner.minibatches"),
        (["learner.ranks=25"], "learner.ranks"),
        (["loop.deterministic=true", "policy.dtype=bfloat16"], "loop.deterministic"),
        (["loop.learn_on_arrival=true", "loop.deterministic=true"], "loop.learn_on_arrival"),
        (["loop.learn_on_arrival=true", "rollout.sleep=true"], "loop.learn_on_arrival"),
        (["loop.learn_on_arrival=true", "learner.minibatches=2"], "loop.learn_on_arrival"),
        (["loop.learn_on_arrival=true", "learner.advantage=reinforce++_baseline"], "loop.learn_on_arrival"),
        (["loop.learn_on_arrival=true", "learner.kl_in=reward"], "loop.learn_on_arrival"),
        (["data.train=elsewhere/trian"], "data.train"),
        (["data.evaluation=elsewhere"], "data.evaluation"),
        (["learner.adam_eps=0"], "learner.adam_eps"),
        (["learner.dual_clip=3.0", "learner.surrogate=cispo"], "learner.dual_clip"),
        (["loop.steps=2", "loop.profile_step=3"], "loop.profile_step"),
        (["loop.keep_best=iou/box"], "loop.keep_best"),
        (["loop.keep_best=iou/video", "eval.every=5"], "loop.keep_best"),
        (["loop.keep_best=j_and_f", "eval.every=5"], "loop.keep_best"),
        (["eval.propagate=true", "segmentation.propagation.checkpoint=null"], "eval.propagate"),
        (["loop.keep_best=sft/loss", "eval.every=5"], "loop.keep_best"),
        (["loop.keep_best=iou/box", "eval.every=5", "run.task=sft"], "loop.keep_best"),
        (["sft.thought=it is {who}"], "sft.thought"),
        (["sft.thought=it is {query"], "sft.thought"),
        (["learner.offload=all", "learner.zero_stage=2"], "learner.offload"),
        (["learner.vision_lr=1e-6", "learner.lora_rank=8"], "learner.vision_lr"),
        (["learner.lora_targets=[]", "learner.lora_rank=8"], "learner.lora_targets"),
        (["reward.length.hard_from=1"], "reward.length.hard_from"),
    ],
)
def test_combinations_that_cannot_work_are_refused_with_a_remedy(overrides, key):
    with pytest.raises(ConfigError) as caught:
        config.load("debug", overrides)
    lines = [line for line in str(caught.value).splitlines()[1:] if f"{key}:" in line]
    assert len(lines) == 1 and overrides[0] in lines[0]


def test_video_rewards_need_an_answer_without_key_frames_and_weights_that_propagate():
    with pytest.raises(ConfigError, match="reward.weights.video_iou"):
        config.load("videoseg_r1_7b", ["reward.preset=veason_r1"])
    with pytest.raises(ConfigError, match="reward.accuracy_iou: is video, .*checkpoint is null; set that to weights"):
        config.load("videoseg_r1_7b", ["reward.accuracy_iou=video"])
    with pytest.raises(ConfigError, match="reward.weights.temporal_consistency: is above 0, .*checkpoint is null; .*or set this to 0"):
        config.load("videoseg_r1_7b", ["reward.weights.temporal_consistency=1"])
    reward = config.load("debug", ["reward.accuracy_iou=video", "reward.weights.mask_iou=1"]).reward
    assert reward.needs_video_masks and reward.needs_predicted_masks


def test_recipes_of_the_papers_are_valid(tmp_path):
    text = (ROOT / "docs" / "grpo.md").read_text(encoding="utf-8")
    recipes = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(recipes) == 9
    for recipe in recipes:
        (tmp_path / "recipe.yaml").write_text(recipe)
        loaded = config.load(tmp_path / "recipe.yaml").learner
        assert loaded != LearnerConfig() and loaded.tis_cap == 2.0


def test_reinforce_needs_no_group():
    config.load("debug", ["rollout.group_size=1", "learner.advantage=reinforce++"])


def test_a_reward_preset_gives_the_defaults_and_overrides_win():
    c = config.load(None, ROOMY + ["reward.preset=vision_reasoner", "reward.iou_threshold=0.6"])
    assert c.reward.formula == "vision_reasoner" and c.reward.iou_threshold == 0.6 and not c.reward.length.penalty
    with pytest.raises(ConfigError, match="did you mean 'vision_reasoner'"):
        config.load(None, ROOMY + ["reward.preset=vision_reasoning"])


def test_problems_of_all_kinds_come_in_one_error():
    with pytest.raises(ConfigError) as caught:
        config.load("debug", ["learner.lrr=1", "loop.steps=0", "rollout.top_p=0.5", "reward.preset=sam"])
    text = str(caught.value)
    assert "4 problems" in text and all(k in text for k in ("learner.lrr", "loop.steps", "rollout.top_p", "reward.preset"))


def test_every_setting_has_a_help_text_and_valid_metadata():
    def walk(cls, prefix=""):
        for f in dataclasses.fields(cls):
            kind = config_check.types_of(cls)[f.name]
            inner = config_check.nested_class(kind)
            assert f.metadata.get("help"), f"{prefix}{f.name} has no help"
            if inner is not None:
                walk(inner, f"{prefix}{f.name}.")
                continue
            unknown = set(f.metadata) - {"help", "min", "max", "above", "below", "choices", "source"}
            assert not unknown, f"{prefix}{f.name}: {unknown} means nothing"
            config_check._checked(kind, config_check.default_of(f), f.metadata, None)  # the default obeys its own limits

    walk(config.RunConfig)


def test_leaf_keys_reach_the_depth():
    assert {"run.seed", "reward.length.beta", "learner.lr"} <= set(leaf_keys(config.RunConfig))


# ---------------------------------------------------------------------------------------------- writing and resuming


TEXTS = ["", "1e-6", "007", "true", "null", "a: b", "# no", "</answer>", "two\nlines", "${seed}", 'ä “quoted” "x"', "~", "-", "{x}", ".inf"]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives_being_written(text, tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(config_dump.dump_yaml(Root(Inner(name=text, lr=1e-06, weights={"a": float("inf")}))))
    made, problems = build(Root, *read_settings(file))
    assert problems == [] and made.inner.name == text and made.inner.lr == 1e-06 and made.inner.weights == {"a": float("inf")}


def test_written_yaml_explains_itself():
    text = config_dump.dump_yaml(Root(), title="title")
    assert text.startswith("# title\n") and "# The inner part.\ninner:\n  lr: 1.0e-06  # Learning rate. [at least 0]\n" in text
    assert "  mode: fast  # [one of fast, exact]\n" in text
    assert "#" not in config_dump.dump_yaml(Root(), comments=False)


def test_the_fingerprint_is_of_the_settings_not_of_the_name():
    a = config.load("debug", ["run.name=a"])
    assert config_dump.fingerprint(a) == config_dump.fingerprint(config.load("debug", ["run.name=b", "run.dir=elsewhere"]))
    assert config_dump.fingerprint(a) != config_dump.fingerprint(config.load("debug", ["run.name=a", "learner.lr=3e-4"]))
    # The same in every process and version: written down here once.
    assert config_dump.fingerprint(Root()) == "ffb53279f0abcc9e285c499bae1ef5cdd7da2e5b6fffe9f2a29fd23179e914d8"


def test_resume_takes_what_may_change_and_refuses_the_rest(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(config_dump.dump_yaml(resolve(config.load("debug"), LAPTOP)))
    resumed, changed = config.load_for_resume(file, ["loop.steps=80", "eval.every=5", f"learner.lr={config.load(file).learner.lr}"])
    assert resumed.loop.steps == 80 and changed == {"loop.steps": (100, 80), "eval.every": (0, 5)}
    with pytest.raises(ConfigError) as caught:
        config.load_for_resume(file, ["learner.lr=1e-3", "rollout.group_size=4", "loop.steps=80"])
    text = str(caught.value)
    assert "learner.lr: was" in text and "and cannot become 0.001" in text and "rollout.group_size" in text and "loop.steps" not in text


def test_settings_that_may_change_exist():
    keys = set(leaf_keys(config.RunConfig))
    for allowed in config_rules._MAY_CHANGE:
        assert any(k.startswith(allowed) if allowed.endswith(".") else k == allowed for k in keys), allowed


# ------------------------------------------------------------------------------------------------------ the hardware


SMI = "0, GPU-aaa, 81559, 9.0\n1, GPU-bbb, 40960, 8.0\n"


@pytest.mark.parametrize(
    "devices, count", [(None, 2), ("", 0), ("0", 1), ("1,0", 2), ("GPU-bbb", 1), ("GPU-b", 1), ("-1", 0), ("0,7,1", 1), ("NoDevFiles", 0)]
)
def test_visible_gpus(devices, count):
    assert len(config_resolve.visible(config_resolve.parse_gpus(SMI), devices)) == count


def test_gpus_are_read_in_gib():
    assert list(config_resolve.parse_gpus(SMI).values()) == [(81559 / 1024, 9.0), (40.0, 8.0)]


def test_this_machine_is_detected():
    here = config_resolve.detect_hardware()
    assert here.cores >= 1 and here.ram_gib > 0.5 and here.cuda_devices >= 0
    assert config_resolve.installed_build() in ("cpu", "cuda", None)
