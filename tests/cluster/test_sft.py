"""Supervised fine-tuning: the answers made from the truth, those of a file, and the whole of `videoseg sft` on real learners at toy size."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster import checkpoints, cli, config, config_files, sft
from cluster.answers import Answers, WrittenAnswers, outside_point
from cluster.draws import Draws
from cluster.errors import CheckpointError, DataError
from cluster.metrics import read_metrics
from cluster.run_folder import RunFolder
from cluster.trainer import check_resumable
from learner.batch import Sample
from learner.grpo import policy_loss
from reward_service import RewardConfig, Target, maximum, parse_answer, score
from rollout.episodes import read_episodes, write_episodes
from rollout.fingerprints import policy_fingerprints
from rollout.toy_world import make_video
from segmentation_service.masks import mask_to_box, mask_to_point
from tests.conftest import TOY
from tests.rollout.parity import load_policy, transformers_logprobs

SMALL = ["rollout.prompts_per_step=4", "eval.episodes=3", "eval.every=2", "loop.steps=4", "loop.save_every=2", "learner.lr=2e-3", "learner.lr_schedule=constant", "learner.warmup_steps=0"]


def settings(toy_data, *more):
    where = [f"policy.path={TOY / 'policy'}", f"data.train={toy_data / 'train'}", f"data.evaluation={toy_data / 'valid_u'}", "data.generate=null"]
    return ["debug", *where, *SMALL, *more]


def draws_of(toy_data, *more):
    recipe, *overrides = settings(toy_data, "run.task=sft", *more)
    return Draws.of_run(config_files.locate(config.load(recipe, overrides)))


@pytest.fixture(scope="module")
def draws(toy_data):
    training, held_out = draws_of(toy_data)
    yield training, held_out
    training.close()


# --------------------------------------------------------------------------------------------- answers from the truth


class Words:
    """In place of a prompt builder and its tokenizer where tokens do not matter: one a word."""

    eos_token_id = 0

    @property
    def tokenizer(self):
        return self

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [1] * len(text.split())}


def target_with(masks_NHW):
    return Target(masks_NHW.shape[1:], [mask_to_box(m) for m in masks_NHW], [[mask_to_point(m)] for m in masks_NHW], masks_NHW)


def true_answer(target, units, policy_hw, negative_points=True):
    prompt = SimpleNamespace(episode_id="e", units=units, policy_hw=policy_hw)
    return Answers(Words(), "I look for {query}. Found: {count}.", negative_points, 1000).to("the {cat}", prompt, target).text


@pytest.mark.parametrize("units, policy_hw, units_hw", [("pixels", (112, 168), (112, 168)), ("pixels", (840, 840), (840, 840)), ("relative_1000", (64, 96), (1000, 1000))])
def test_the_true_answer_is_parsed_to_the_truth_and_earns_the_maximum(units, policy_hw, units_hw):
    reward, counts = RewardConfig(), set()
    for seed in range(60):
        video = make_video(seed)
        masks_NHW = video.masks(video.num_frames // 2)
        target = target_with(masks_NHW[masks_NHW.sum((1, 2)) > 100])
        answer = parse_answer(true_answer(target, units, policy_hw)).to_frame(units, policy_hw, target.image_size)
        reach = 0.5 * np.array(target.image_size)[::-1] / np.array(units_hw)[::-1] + 1e-9  # half a unit, in pixels of the frame, x and y
        # Each from the true one that is nearest: the answer goes from left to right.
        boxes, points = np.array([o.box for o in answer.objects]).reshape(-1, 1, 2, 2), np.array([o.point for o in answer.objects]).reshape(-1, 1, 2)
        near = (np.abs(boxes - target.boxes_N4().reshape(1, -1, 2, 2)) <= reach).all((2, 3)) & (np.abs(points - target.points_N2()) <= reach).all(2)
        assert near.any(0).all() and near.any(1).all() and boxes[:, 0, 0, 0].tolist() == sorted(boxes[:, 0, 0, 0])
        assert all(len(o.negative_points) == 1 for o in answer.objects) and answer.well_formed
        assert score(answer, target, reward, length=10).total == maximum(reward)
        counts.add(len(target))
    assert counts >= {1, 2, 3}


def test_the_words_of_a_true_answer():
    target = target_with(np.pad(np.ones((1, 10, 20), bool), ((0, 0), (20, 66), (40, 68))))
    said = '<think>I look for the {cat}. Found: 1.</think><answer>[{"bbox_2d":[40,20,59,29],"point_2d":[44,24]}]</answer>'
    assert true_answer(target, "pixels", target.image_size, negative_points=False) == said
    nothing = Target((96, 128))
    text = true_answer(nothing, "pixels", (112, 112))
    assert text == "<think>I look for the {cat}. Found: 0.</think><answer>[]</answer>"
    assert score(text, nothing, RewardConfig(), length=3).total == maximum(RewardConfig()) - 1  # no point can be just outside of nothing


def test_points_outside_stay_outside_whatever_the_sizes():
    rng, found = np.random.default_rng(0), 0
    for _ in range(100):
        frame_hw, policy_hw = rng.integers(8, 300, 2), tuple(rng.integers(28, 300, 2))
        masks_NHW = np.zeros((2, *frame_hw), bool)
        for mask_HW in masks_NHW:
            (y1, y2), (x1, x2) = (np.sort(rng.integers(0, size, 2)) for size in frame_hw)
            mask_HW[y1 : y2 + 1, x1 : x2 + 1] = True
        target = target_with(masks_NHW)
        for units in ("pixels", "relative_1000"):
            answer = parse_answer(true_answer(target, units, policy_hw)).to_frame(units, policy_hw, target.image_size)
            outside = [o.negative_points for o in answer.objects]
            assert score(answer, target, RewardConfig(negative_reach=1e6), length=1).terms["negative_point"] == float(any(outside))
            found += all(outside)
    assert found > 150  # a frame may be too full to have one
    assert outside_point(np.ones((5, 6), bool), (2, 2), 2.0) is None


# ------------------------------------------------------------------------------------------------- answers of a file


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def an_episode(toy_data, skip=0):
    return [e for e in read_episodes(toy_data / "train") if e.target_frames(0.001)][skip]


def test_written_answers_are_learned_as_they_are_and_only_their_episodes_drawn(toy_data, draws, tmp_path):
    few = [an_episode(toy_data, i) for i in (1, 3, 6)]
    about = [e.target_frames(0.001)[-1] for e in few]
    rows = [{"episode_id": e.episode_id, "response": f"<think>See {t}.</think><answer>[]</answer>", "target_frame": t, "by": "a model"} for e, t in zip(few, about)]
    rows.append(rows[0] | {"response": "<think>Or so.</think><answer>[]</answer>"})
    rows.append({"episode_id": "of another data set", "response": "<answer>[]</answer>", "target_frame": 0})
    lines, table = write_lines(tmp_path / "answers.jsonl", rows), tmp_path / "answers.parquet"
    pq.write_table(pa.Table.from_pylist(rows), table)
    drawn = {}
    for file in (lines, table):
        training, held_out = draws_of(toy_data, f"sft.answers={file}")
        drawn[file] = training.batch(range(24))
        assert [d.answer.text for d in held_out.held_out(2)[0]] == [d.answer.text for d in draws[1].held_out(2)[0]]  # from the truth, without a file of their own
        training.close()
    assert {d.episode.episode_id for d in drawn[lines][:3]} == {e.episode_id for e in few}  # an epoch is each of them once
    assert {d.answer.text for d in drawn[lines]} == {row["response"] for row in rows[:4]}  # both answers to the first episode come up
    tokenizer = draws[0].builder.tokenizer
    for d, same in zip(drawn[lines], drawn[table], strict=True):
        assert d.prompt.target_frame == dict(zip([e.episode_id for e in few], about))[d.episode.episode_id]
        assert d.answer.token_ids.tolist() == [*tokenizer(d.answer.text)["input_ids"], tokenizer.eos_token_id] == same.answer.token_ids.tolist()
        assert tokenizer.decode(d.answer.token_ids) == d.answer.text + "<|im_end|>"


def test_the_truth_is_filled_into_a_response_that_asks_for_it(toy_data, draws, tmp_path):
    """Reasoning alone from a stronger model, about whichever frame is the target."""
    file = write_lines(tmp_path / "a.jsonl", [{"episode_id": e.episode_id, "response": "<think>Hm.</think><answer>{objects}</answer>"} for e in read_episodes(toy_data / "train")])
    training, _ = draws_of(toy_data, f"sft.answers={file}")
    for ours, true in zip(training.batch(range(6)), draws[0].batch(range(6)), strict=True):
        assert ours.prompt.fingerprint == true.prompt.fingerprint
        assert ours.answer.text == "<think>Hm.</think>" + true.answer.text.split("</think>")[1]
    training.close()


def test_answers_that_are_too_long_cost_their_episodes(toy_data, tmp_path):
    """Replaced as an episode with too long a prompt is, and counted with them; an error where it never ends."""
    long, short = an_episode(toy_data, 0), an_episode(toy_data, 1)
    rows = [{"episode_id": e.episode_id, "response": "a " * n + "{objects}"} for e, n in ((long, 200), (short, 1))]
    training, _ = draws_of(toy_data, f"sft.answers={write_lines(tmp_path / 'a.jsonl', rows)}")
    batch = training.batch(range(6))
    assert {d.episode.episode_id for d in batch} == {short.episode_id}
    replaced = [b for d in batch for b in d.replaced]
    assert {(b.episode_id, b.kind) for b in replaced} == {(long.episode_id, "too_long")} and "more than rollout.max_response_tokens = 96" in replaced[0].reason
    training.close()
    training, _ = draws_of(toy_data, f"sft.answers={write_lines(tmp_path / 'b.jsonl', rows[:1])}")
    with pytest.raises(DataError, match="episodes one after another cannot be used, last: .*the answer to learn has"):
        training.check_videos(0.0)  # before anything starts
    training.close()


GOOD = {"episode_id": "e", "response": "<think>x</think><answer>[]</answer>", "target_frame": 3}


@pytest.mark.parametrize(
    "lines, said",
    [
        (["not json"], "answers.jsonl:1: not JSON"),
        (["", "[1]"], "answers.jsonl:2: not a JSON object"),
        ([{"episode_id": "e"}], "answers.jsonl:1: an answer has episode_id and response"),
        ([GOOD, GOOD | {"target_frame": "3"}], "answers.jsonl:2: an answer has"),
        ([GOOD | {"response": "<answer>[]</answer><|im_end|>"}], r"the response to e holds <\|im_end\|>"),
        ([GOOD | {"response": "<|image_pad|>"}], r"holds <\|image_pad\|>"),
        ([GOOD | {"target_frame": 4}], "answer to episode e is about frame 4, which is not annotated"),
        ([GOOD | {"target_frame": None}], "no target_frame, .* its boxes would be those of another frame"),
    ],
)
def test_a_file_that_cannot_be_learned_is_refused(tmp_path, lines, said):
    file = tmp_path / "answers.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    with pytest.raises(DataError, match=said) as caught:
        WrittenAnswers(file, "<|im_end|>").check([{"episode_id": "e", "num_frames": 9, "annotated_frames": [0, 3]}], frames_are_fixed=False)
    assert caught.value.remedy


def test_frames_that_are_fixed_need_no_naming(tmp_path):
    written = WrittenAnswers(write_lines(tmp_path / "a.jsonl", [GOOD | {"target_frame": None}]), "<|im_end|>")
    written.check([{"episode_id": "e", "num_frames": 9, "annotated_frames": [0, 3]}], frames_are_fixed=True)
    written.check([{"episode_id": "e", "num_frames": 1, "annotated_frames": [0]}], frames_are_fixed=False)  # an image


def test_nothing_is_begun_with_answers_that_are_not_there_or_to_other_episodes(toy_data, tmp_path, capsys):
    (tmp_path / "x.parquet").write_text("no")
    others = write_lines(tmp_path / "others.jsonl", [GOOD])
    for file, said in (
        (tmp_path / "nowhere", "sft.answers = "),
        (tmp_path / "x.parquet", "not a readable Parquet file"),
        (others, f"no episode has a frame in which its target can be seen and an answer in {others}"),
    ):
        assert cli.main(["sft", *settings(toy_data, f"run.dir={tmp_path / 'runs'}", f"sft.answers={file}")]) == 2
        error = capsys.readouterr().err
        assert said in error and "remedy: " in error and not (tmp_path / "runs").exists()


def test_boxes_without_masks_have_answers_without_negative_points(toy_data, tmp_path):
    episode = an_episode(toy_data)
    plain = [replace(o, annotations=tuple(replace(a, counts=None) for a in o.annotations)) for o in episode.objects]
    write_episodes([replace(episode, objects=tuple(plain), video=str(episode.video_path))], tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no masks, and the reward needs masks"):
        draws_of(toy_data, f"data.train={tmp_path}")
    training, _ = draws_of(toy_data, f"data.train={tmp_path}", "reward.weights.negative_point=0", "reward.accuracy_iou=box")
    assert "negative" not in training.train(0).answer.text
    training.close()


# --------------------------------------------------------------------------------------------------------- the loop


@pytest.fixture(scope="module")
def run(ray_session, toy_data, tmp_path_factory):
    """A finished run of four steps, started by `videoseg sft`."""
    where = tmp_path_factory.mktemp("runs")
    assert cli.main(["sft", *settings(toy_data, f"run.dir={where}", "run.name=four", "loop.keep_best=sft/loss", "loop.keep_checkpoints=2", "learner.kl_in=reward")]) == 0
    return RunFolder(where / "four")


def steps_of(folder):
    untimed = lambda record: {name: value for name, value in record.items() if "second" not in name and name != "time"}
    return [untimed(record) for record in read_metrics(folder.metrics)]


def test_the_loss_is_the_likelihood_by_transformers(run, draws):
    """Of the first step's answers and of the held-out ones, under the policy as it was, its end token included."""
    records, (training, held_out) = read_metrics(run.metrics), draws
    folder = str(TOY / "policy")
    policy, banned = load_policy(folder), policy_fingerprints(folder)["banned_token_ids"]

    def loss(some):
        return -np.concatenate([transformers_logprobs(policy, folder, d.prompt, d.answer.token_ids, 1.0, banned) for d in some]).mean(dtype=np.float64)

    (first,) = [r for r in records if r["step"] == 1]
    assert first["sft/loss"] == pytest.approx(loss(training.batch(range(4))), abs=1e-4)
    assert records[0]["eval/sft/loss"] == pytest.approx(loss(held_out.held_out(3)[0]), abs=1e-4)


def test_it_learns_and_says_what_it_does(run):
    records = read_metrics(run.metrics)
    steps, held_out = [r for r in records if "sft/loss" in r], {r["step"]: r["eval/sft/loss"] for r in records if "eval/sft/loss" in r}
    assert [r["step"] for r in steps] == [1, 2, 3, 4] and sorted(held_out) == [0, 2, 4]
    assert steps[3]["sft/loss"] < 0.85 * steps[0]["sft/loss"] and held_out[4] < held_out[2] < held_out[0]
    for r in steps:
        assert r["learner/loss"] == pytest.approx(r["sft/loss"], rel=1e-5)
        assert r["sft/answers/iou_box"] > 0.9 and r["sft/answers/invalid_fraction"] == 0 and r["failures/video"] == 0
        assert not [name for name in r if name.startswith(("mismatch/", "clip/", "kl/", "reward/"))]
    assert config.load(run.config).run.task == "sft" and list(run.tensorboard.iterdir())


def test_a_resumed_run_repeats_the_uninterrupted_one(run, tmp_path, capsys):
    """Resumed from step 2 by `videoseg resume`: the same numbers, and the policy that `videoseg export` gives is the same, to the last bit."""
    again = RunFolder(shutil.copytree(run.path, tmp_path / "again"))
    shutil.rmtree(dict(checkpoints.steps(again.checkpoints))[4])
    assert cli.main(["resume", str(again.path)]) == 0
    assert f"videoseg export {again.path} OUT" in capsys.readouterr().out.splitlines()[-1]
    assert steps_of(again) == steps_of(run)
    assert checkpoints.latest(again.checkpoints)[0].manifest["position"] == 16
    weights = []
    for folder in (run, again):
        out = tmp_path / f"policy of {folder.path.parent.name}"
        assert cli.main(["export", str(folder.path), str(out)]) == 0
        weights.append(load_file(out / "model.safetensors"))
    start = load_file(TOY / "policy" / "model.safetensors")
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in start) and any(not torch.equal(weights[0][name], start[name]) for name in start)


def test_a_run_whose_updates_are_left_out_stops_and_loses_nothing(run, tmp_path, capsys):
    """One step more than allowed, then an end with the reason, a checkpoint, and the policy as it was."""
    again = RunFolder(shutil.copytree(run.path, tmp_path / "again"))
    assert cli.main(["resume", str(again.path), "loop.steps=9", "learner.skip_above=1e-9", "learner.max_skipped=1"]) == 2
    said = capsys.readouterr()
    assert "updates were left out in 2 steps in a row, more than learner.max_skipped = 1" in said.err and "learner.skip_above" in said.err
    assert said.out.count("an update was left out") == 2 and checkpoints.latest(again.checkpoints)[0].step == 6
    assert [r["learner/skipped_in_a_row"] for r in steps_of(again) if "sft/loss" in r] == [0, 0, 0, 0, 1, 2]
    for step in ("4", "6"):
        assert cli.main(["export", str(again.path), str(tmp_path / step), "--step", step]) == 0
    before, after = (load_file(tmp_path / step / "model.safetensors") for step in ("4", "6"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_does_not_go_on_with_other_answers(run, toy_data, tmp_path):
    rows = [{"episode_id": e.episode_id, "response": "{objects}"} for e in read_episodes(toy_data / "train")]
    file = write_lines(tmp_path / "a.jsonl", rows)
    training, _ = draws_of(toy_data, f"sft.answers={file}")
    training.close()
    with pytest.raises(CheckpointError, match="a.jsonl: not the episodes"):
        check_resumable(checkpoints.latest(run.checkpoints)[0], training)


def test_a_run_does_not_go_on_from_another_policy(run, tmp_path, capsys):
    """A checkpoint has no frozen weights: those of its policy's folder, which may lie elsewhere by now, must be the same."""
    again, moved = RunFolder(shutil.copytree(run.path, tmp_path / "again")), tmp_path / "policy"
    shutil.copytree(TOY / "policy", moved)
    again.config.write_text(again.config.read_text().replace(str(TOY / "policy"), str(moved)))
    assert cli.main(["export", str(again.path), str(tmp_path / "same")]) == 0
    weights = load_file(moved / "model.safetensors")
    weights["model.norm.weight"] += 1.0
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    for command in (["resume", str(again.path), "loop.steps=9"], ["export", str(again.path), str(tmp_path / "other")]):
        capsys.readouterr()
        assert cli.main(command) == 2
        assert f"policy.path = {moved}: its files are not those that {again.checkpoints}/step_" in capsys.readouterr().err


def test_the_settings_leave_the_likelihood_alone_whatever_they_were():
    """Also in later passes and mini-batches, where the policy is no longer the one of the step's beginning."""
    asked = ["learner.dual_clip=3", "learner.entropy_coef=0.1", "learner.loss_aggregation=constant", "learner.ratio_level=sequence", "rollout.temperature=0.7", "run.task=sft"]
    made = sft.likelihood_settings(config.load("debug", asked))
    learner, rng = made.learner, np.random.default_rng(0)
    logprobs, old = (torch.tensor(-rng.exponential(1.0, 20), requires_grad=True) for _ in range(2))
    loss, _ = policy_loss(
        logprobs, old.detach(), torch.ones(20, dtype=torch.float64), torch.full((20,), 1 / 20, dtype=torch.float64), sequence=torch.arange(20) // 5, surrogate=learner.surrogate,
        ratio_level=learner.ratio_level, clip_low=learner.clip_low, clip_high=learner.clip_high, dual_clip=learner.dual_clip, rollout_logprobs=torch.zeros(20), tis_cap=learner.tis_cap,
    )
    loss.backward()
    assert loss.item() == pytest.approx(-logprobs.mean().item()) and torch.allclose(logprobs.grad, torch.full_like(logprobs, -1 / 20))
    assert (learner.loss_aggregation, learner.kl_coef, learner.entropy_coef, made.rollout.temperature) == ("token", 0, 0, 1)


def test_samples_are_prompts_with_answers(draws):
    batch = draws[0].batch(range(3))
    samples = sft.samples_of(batch)
    assert all(isinstance(s, Sample) and s.advantage == 1 and not s.truncated for s in samples)
    assert [s.response_ids.tolist() for s in samples] == [d.answer.token_ids.tolist() for d in batch] and len({s.group for s in samples}) == 3
