"""The whole loop on real parts: vLLM, DeepSpeed, SAM2 and Ray at toy size, one short run shared by the tests."""

import asyncio
import dataclasses
import gzip
import json
import os
import re
import shutil

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file

from cluster import checkpoints, cli, config, config_resolve, ledger, rollout_log, run_folder, timeline
from cluster.errors import RunFailed
from cluster.metrics import read_metrics
from cluster.policies import find_policy
from tests.conftest import ROOT, TOY

SMALL = [
    f"policy.path={TOY / 'policy'}",
    f"segmentation.checkpoint={TOY / 'sam2'}",
    "rollout.prompts_per_step=4",
    "rollout.group_size=4",
    "learner.warmup_steps=0",
    "eval.episodes=4",
    "loop.save_every=2",
    "data.generate=null",
]


def settings(toy_data, *more):
    where = [f"data.train={toy_data / 'train'}", f"data.evaluation={toy_data / 'valid_u'}"]
    return [*SMALL, *where, *more]


def resolved(toy_data, *more):
    return config_resolve.resolve(config.load("debug", settings(toy_data, *more)), config_resolve.detect_hardware())


@pytest.fixture(scope="module")
def run(ray_session, toy_data, tmp_path_factory):
    """A finished, deterministic run of three steps, its difficulties half rated and half from its groups' success, its hard budget
    widened by the policy's uncertainty, its second step profiled. Its updates take longer than
    `loop.learn_seconds`; its learner is alive, and they count."""
    from cluster import trainer

    folder = run_folder.plan(tmp_path_factory.mktemp("runs"), "three", "debug")
    asked = ["learner.lr_schedule=constant", "eval.every=1", "loop.keep_best=iou/box", "difficulty.source=blend", "difficulty.success=mask_iou", "reward.length.uncertainty_scale=25", "loop.profile_step=2", "loop.learn_seconds=0.01"]
    trainer.train(resolved(toy_data, "loop.steps=3", "loop.deterministic=true", *asked), folder)
    return folder


def test_the_run_folder_is_complete(run):
    assert config.load(run.config).loop.steps == 3
    assert json.loads(run.environment.read_text())["packages"]["torch"]
    assert [step for step, _ in checkpoints.steps(run.checkpoints)][-2:] == [2, 3]
    assert [step for step, _ in rollout_log.rollout_files(run.rollouts)] == [1, 2, 3]
    assert [step for step, _ in rollout_log.rollout_files(run.path / "evaluations")] == [0, 1, 2, 3]
    assert list(run.tensorboard.iterdir())


def test_the_best_checkpoint_is_kept_beside_the_newest(run):
    evaluations = {r["step"]: r["eval/iou/box"] for r in read_metrics(run.metrics) if r.get("eval/iou/box") is not None}
    assert sorted(evaluations) == [0, 1, 2, 3]
    best = max((1, 2), key=evaluations.get)  # step 3 is evaluated after its checkpoint, as the run ends
    assert {step for step, _ in checkpoints.steps(run.checkpoints)} == {best, 2, 3}


def test_the_metrics_tell_what_happened(run):
    records = read_metrics(run.metrics)
    steps = [r for r in records if "reward/mean" in r]
    assert [r["step"] for r in steps] == [1, 2, 3]
    for r in steps:
        assert 0 < r["mismatch/logprob_diff"] < 1e-3 and 0 <= r["mismatch/kl"] < 0.01
        assert r["groups/used"] == 4 and r["failures/scoring"] == 0
        assert r["staleness/0"] == 16  # synchronous: always the newest weights
        assert {"iou/box", "iou/mask", "kl/reference", "learner/grad_norm", "length/reasoning", "seconds/train", "sync/bytes"} <= r.keys()
    assert steps[0]["kl/reference"] == 0 < steps[2]["kl/reference"]
    assert [r["step"] for r in records if "eval/iou/box" in r] == [0, 1, 2, 3]


def test_the_trace_holds_the_stages_and_calls_of_every_step(run):
    spans = {}
    for event in timeline.read(run.path / timeline.FILE):
        spans.setdefault((event["cat"], event["name"]), {}).setdefault(event["id"], {})[event["ph"]] = event
    assert all(set(span) == {"b", "e"} and span["b"]["ts"] <= span["e"]["ts"] for kind in spans.values() for span in kind.values())
    versions = {name: sorted({span["b"]["args"]["version"] for span in spans["loop", name].values()}) for track, name in spans if track == "loop"}
    assert versions["rollout"] == versions["train"] == [0, 1, 2] and versions["log"] == [1, 2, 3] and {"sync", "evaluate", "checkpoint"} <= versions.keys()
    assert len(spans["engine 0", "generate_in_order"]) == 3 + 4 and len(spans["segmenter 0", "segment_group"]) == 3 * 4 + 4 * 4  # steps and evaluations


def test_the_profile_of_a_step_holds_the_operators_of_all_processes_on_the_clock_of_the_trace(run):
    events = json.loads(gzip.decompress((run.path / "profile-2.json.gz").read_bytes()))["traceEvents"]
    (first,), (last,) = ([s for s in timeline.spans(run.path / "trace.json") if s.name == name and s.details.get("version") == 1] for name in ("rollout", "sync"))
    parts = {part: [e for e in events if str(e["pid"]).startswith(f"{part} ") and e["ph"] == "X" and e["cat"] == "cpu_op"] for part in ("engine 0", "segmenter 0", "learner 0")}
    for part, own in parts.items():
        assert len(own) > 1000 and all(first.begin < e["ts"] / 1e6 < last.end for e in own), part
    assert {"_C::onednn_mm"} < {e["name"] for e in parts["engine 0"]} and {"aten::convolution"} < {e["name"] for e in parts["segmenter 0"]}
    backward = [e["ts"] for e in parts["learner 0"] if e["name"] == "aten::_scaled_dot_product_flash_attention_for_cpu_backward"]
    assert min(backward) > max(e["ts"] for e in parts["segmenter 0"])  # a synchronous step: all is scored before anything is learned
    assert {"rollout", "train", "sync", "generate_in_order"} <= {e["name"] for e in events if e["ph"] == "b"}
    summary = (run.path / "profile-2.txt").read_text().splitlines()
    assert len(summary) == 4 and all("s in operators" in line for line in summary[1:])


def test_saved_rollouts_repeat_what_was_learned_without_engines(run, tmp_path, capsys):
    """Two steps replayed from the start, and the third from the checkpoint before it: the same numbers and the same policy, to the last bit."""
    files, where = [file for _, file in rollout_log.rollout_files(run.rollouts)], [f"run.dir={tmp_path}"]
    assert cli.main(["train", str(run.config), "--replay", str(files[0]), "--replay", str(files[1]), *where, "run.name=again"]) == 0
    assert cli.main(["train", str(run.config), "--replay", str(files[2]), "--start", str(run.checkpoints / "step_000002"), *where, "run.name=third"]) == 0
    first = {r["step"]: r for r in read_metrics(run.metrics) if "reward/mean" in r}
    again = {r["step"]: r for name in ("again", "third") for r in read_metrics(tmp_path / name / "metrics.jsonl")}
    same = ("reward/mean", "learner/loss", "learner/grad_norm", "learner/grad_norm/layers.0", "kl/reference", "mismatch/logprob_diff")
    assert [[again[step][name] for name in same] for step in (1, 2, 3)] == [[first[step][name] for name in same] for step in (1, 2, 3)]
    assert cli.main(["resume", str(tmp_path / "again")]) == 2 and "was made by --replay" in capsys.readouterr().err
    weights = {}
    for name, folder in (("run", run.path), ("again", tmp_path / "again")):
        assert cli.main(["export", str(folder), str(tmp_path / name / "policy"), "--step", "2"]) == 0
        weights[name] = load_file(tmp_path / name / "policy" / "model.safetensors")
    start = load_file(TOY / "policy" / "model.safetensors")
    assert weights["run"].keys() == start.keys() and any(not torch.equal(weights["run"][n], start[n]) for n in start)
    assert all(torch.equal(weights["run"][n], weights["again"][n]) for n in start)


def test_gradients_begun_as_groups_arrive_make_the_same_update(run, toy_data, tmp_path, ray_session):
    """A step whose groups come one by one is what its rollouts, replayed at once, make of the same weights."""
    from cluster import trainer

    early = run_folder.plan(tmp_path, "early", "debug")
    trainer.train(resolved(toy_data, "loop.steps=2", "loop.learn_on_arrival=true", "learner.lr_schedule=constant", "learner.tokens_per_microbatch=400", "eval.ends=false"), early)
    spans = timeline.spans(early.path / timeline.FILE)
    assert any(
        begun.name == "accumulate" and stage.name == "rollout" and stage.begin <= begun.begin < stage.end for begun in spans for stage in spans
    ), "the learner began while groups were on their way"
    assert cli.main(["train", str(early.config), "--replay", str(early.rollouts), f"run.dir={tmp_path}", "run.name=at_once"]) == 0
    steps, replayed = read_metrics(early.metrics), read_metrics(tmp_path / "at_once/metrics.jsonl")
    assert len(steps) == len(replayed) == 2
    for mine, whole in zip(steps, replayed):
        for name in ("learner/loss", "learner/grad_norm", "kl/reference", "learner/entropy", "learner/samples", "learner/response_tokens", "mismatch/kl"):
            assert mine[name] == pytest.approx(whole[name], rel=1e-3, abs=1e-6), name
    assert steps[1]["kl/reference"] > 0


def test_every_panel_of_the_dashboard_has_a_number_of_a_run(run):
    told = {re.sub(r"\W", "_", name) for record in read_metrics(run.metrics) for name in record}
    for panel in json.loads((ROOT / "examples/cluster/grafana.json").read_text())["panels"]:
        asked = {re.fullmatch(r'ray_videoseg_(\w+)\{run=~"\$run"\}', target["expr"])[1] for target in panel["targets"]}
        assert asked & told, panel["title"]


def test_a_run_its_checkpoints_and_its_exports_can_be_asked(run, tmp_path, monkeypatch):
    """Each stands for the same weights, and brings the prompt that it was trained with."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/latest").symlink_to(run.path)
    assert cli.main(["export", str(run.path), str(tmp_path / "out"), "--step", "2"]) == 0
    newest, second, exported = find_policy("latest"), find_policy(str(run.checkpoints / "step_000002")), find_policy(str(tmp_path / "out"))
    assert [p.name for p in (newest, second, exported)] == [f"{run.path}/checkpoints/step_000003", f"{run.path}/checkpoints/step_000002", f"{tmp_path}/out"]
    trained = config.load(run.config)
    for policy in (newest, second, exported):
        assert policy.settings.prompt == trained.prompt and policy.settings.segmentation.propagation.size == trained.segmentation.propagation.size
    weights = []
    for policy in (newest, second, exported):
        with policy.loadable() as folder:
            weights.append(load_file(f"{folder}/model.safetensors"))
        assert os.path.exists(folder) == (policy is exported)
    assert all(torch.equal(weights[1][n], weights[2][n]) for n in weights[2]) and any(not torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert find_policy("latest", "debug").settings.prompt == config.load("debug").prompt


def test_rollouts_that_cannot_be_replayed_are_refused(run, tmp_path, capsys):
    where = [str(run.config), f"run.dir={tmp_path}", "run.name=refused"]
    _, file = next(rollout_log.rollout_files(run.rollouts))
    rows = rollout_log.read_rollouts(file)
    gone = rollout_log.write_rollouts(tmp_path / "gone", 1, [dataclasses.replace(row, video=str(tmp_path / "no_video")) for row in rows])
    other = rollout_log.write_rollouts(tmp_path / "other", 1, [dataclasses.replace(row, prompt_text="something else") for row in rows])
    for path, said in ((tmp_path / "empty", "no rollouts here"), (gone, "no such video file, and no folder of frames"), (other, "not tokenised as")):
        assert cli.main(["train", *where, "--replay", str(path)]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "refused").exists()
    assert cli.main(["train", *where, "--start", str(run.checkpoints)]) == 2
    assert "--start is for --replay" in capsys.readouterr().err


def test_masks_and_rewards_of_a_row_belong_together(run):
    from segmentation_service.masks import decode_rle

    _, file = next(rollout_log.rollout_files(run.rollouts))
    for row in rollout_log.read_rollouts(file):
        objects = json.loads(row.answer_json) if row.answer_json else []
        assert len(row.masks) == len(objects)
        assert all(decode_rle(m).shape == tuple(row.frame_hw) for m in row.masks)
        assert row.valid and np.isfinite(row.reward) and 0 <= row.length_factor <= 1


def test_difficulties_follow_the_groups_success(run, toy_data):
    """As logged: half the episode's rating, half 10 - 9 x the share of masks above 0.5; and the checkpoint holds every share seen."""
    from rollout.episodes import read_episodes

    rated = {e.episode_id: e.difficulty for e in read_episodes(toy_data / "train")}
    groups = {}
    for _, file in rollout_log.rollout_files(run.rollouts):
        for row in rollout_log.read_rollouts(file):
            groups.setdefault(row.group, []).append(row)
    shares = {}
    for rows in groups.values():
        share, episode = np.mean([row.mask_iou > 0.5 for row in rows]), rows[0].episode_id
        if episode not in shares:
            assert [row.difficulty for row in rows] == pytest.approx([0.5 * (10 - 9 * share) + 0.5 * rated[episode]] * len(rows))
        shares[episode] = share if episode not in shares else (shares[episode] + share) / 2
    checkpoint, _ = checkpoints.latest(run.checkpoints)
    assert json.loads((checkpoint.path / "difficulty.json").read_text()) == {"rates": pytest.approx(shares)}


def test_the_uncertainty_is_the_policys(run, toy_data):
    """As logged for the first step: 1 - (p1 - p2), mean over tokens and then completions, from a forward pass of transformers."""
    from cluster.draws import Draws
    from rollout.fingerprints import policy_fingerprints
    from tests.rollout.parity import load_policy, transformers_distribution

    folder = str(TOY / "policy")
    policy, banned = load_policy(folder), policy_fingerprints(folder)["banned_token_ids"]
    draws, _ = Draws.of_run(resolved(toy_data))
    _, file = next(rollout_log.rollout_files(run.rollouts))
    uncertainties = []
    for row in rollout_log.read_rollouts(file):
        every = np.exp(transformers_distribution(policy, folder, draws.train(row.group).prompt, row.response_token_ids, 1.0, banned))
        second, first = np.sort(every, axis=1)[:, -2:].T
        uncertainties.append(np.mean(1 - (first - second)))
    logged = [record["length/uncertainty"] for record in read_metrics(run.metrics) if "reward/mean" in record]
    assert len(logged) == 3 and 0 < logged[0] < 1 and logged[0] == pytest.approx(np.mean(uncertainties), abs=1e-4)


def test_a_resumed_run_repeats_the_uninterrupted_one_and_its_engine_serves_what_it_learned(run, tmp_path):
    """Resumed from step 2 in the deterministic mode: the same step 3 to the last bit, and then step 4. After its sync, greedy tokens and log-probs are those of an
    engine that loads the learner's export."""
    from cluster import config_files, trainer
    from cluster.draws import Draws
    from cluster.progress import Progress
    from cluster.run import Run
    from rollout.actor import RolloutEngineActor

    copy = run_folder.RunFolder(shutil.copytree(run.path, tmp_path / "copy"))
    shutil.rmtree(dict(checkpoints.steps(copy.checkpoints))[3])
    settings, changed = config.load_for_resume(copy.config, ["loop.steps=4"])
    assert changed == {"loop.steps": (3, 4)}
    settings = config_files.locate(config_resolve.resolve(settings, config_resolve.detect_hardware()))
    draws, held_out = Draws.of_run(settings)
    exported, greedy = tmp_path / "exported", settings.rollout.sampling().greedy()

    async def answers(engine):
        done = await engine.generate_in_order.remote([(draw.prompt, 1, greedy, [0]) for draw in held_out.held_out(6)[0]])
        return [completion for completions in done for completion in completions]

    async def two_steps_and_a_fresh_engine():
        with Progress(4, 2) as progress:
            resumed = await Run.start(settings, settings, copy, draws, held_out, checkpoints.latest(copy.checkpoints)[0], progress)
        try:
            before = await answers(resumed.actors.engines[0])
            for _ in range(2):
                await trainer.learn(resumed, await resumed.collect())
            resumed.config = dataclasses.replace(settings, loop=dataclasses.replace(settings.loop, mismatch_stop=1e-3))
            await trainer.stop_if_untrustworthy(resumed)  # float32 on both sides: far below
            assert resumed.saved < 4
            resumed.mismatch = 0.5
            with pytest.raises(RunFailed, match="step 4: .* KL 0.5 exceeds loop.mismatch_stop = 0.001"):
                await trainer.stop_if_untrustworthy(resumed)  # with a checkpoint
            assert resumed.saved == 4
            served = await answers(resumed.actors.engines[0])
            await resumed.actors.learners[0].export.remote(str(exported))
        finally:
            resumed.close()
        engine = RolloutEngineActor.options(num_cpus=1).remote(str(exported), settings.rollout, dtype="float32", device="cpu")
        try:
            await engine.ready.remote()
            return before, served, await answers(engine)
        finally:
            await engine.shutdown.remote()
            ray.kill(engine)

    before, served, fresh = asyncio.run(two_steps_and_a_fresh_engine())
    draws.close()
    assert any(not np.array_equal(b.logprobs, s.logprobs) for b, s in zip(before, served))
    for s, f in zip(served, fresh, strict=True):
        np.testing.assert_array_equal(s.token_ids, f.token_ids)
        np.testing.assert_array_equal(s.logprobs, f.logprobs)

    checkpoint, _ = checkpoints.latest(copy.checkpoints)
    assert checkpoint.step == 4 and checkpoint.manifest["position"] == 16 and checkpoint.manifest["unfinished"] == []
    assert ledger.check(copy.path / ledger.FILE, 16) == {"trained": 16}
    assert [line["group"] for line in ledger.read(copy.path / ledger.FILE) if line.get("rolled_back")] == [8, 9, 10, 11]
    before, after = (json.loads((folder / "difficulty.json").read_text())["rates"] for folder in (dict(checkpoints.steps(run.checkpoints))[3], checkpoint.path))
    assert before.items() < after.items() or len(after) < 16  # nothing forgotten; fewer than 16 episodes if one came again

    untimed = lambda record: {name: value for name, value in record.items() if "second" not in name and name != "time"}
    once, again = ({r["step"]: untimed(r) for r in read_metrics(folder.metrics) if "reward/mean" in r} for folder in (run, copy))
    assert list(again) == [1, 2, 3, 4] and again[3] == once[3]
    rows, rows_again = (rollout_log.read_rollouts(dict(rollout_log.rollout_files(folder.rollouts))[3]) for folder in (run, copy))
    assert rows == rows_again
    groups = [set(rollout_log.read_columns(f, ["group"])["group"]) for _, f in rollout_log.rollout_files(copy.rollouts)]
    assert groups == [{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9, 10, 11}, {12, 13, 14, 15}]
