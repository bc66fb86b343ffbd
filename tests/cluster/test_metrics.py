"""Metrics: aggregation over completions, what reaches the disk, and what a person is shown."""

import io
import json
import math

import numpy as np
import pytest

from cluster import metrics, progress
from cluster.errors import DataError
from cluster.metrics import MetricsWriter, ScoredCompletion, completion_metrics, drop_after, read_metrics


def completions():
    return [
        ScoredCompletion(0, True, 1.0, {"iou": 1.0}, True, 0.6, 0.5, 10, 20, 8, 0.5, "easy", staleness=0),
        ScoredCompletion(0, True, 3.0, {"iou": 0.0}, False, 0.2, None, 10, 40, 16, 1.0, "easy", truncated=True, staleness=0),
        ScoredCompletion(1, True, 2.0, {"iou": 0.5, "negative": 1.0}, True, 0.4, 0.7, 10, 30, 12, 0.8, "hard", staleness=2),
        ScoredCompletion(1, True, 2.0, {"iou": 0.5}, True, 0.4, 0.7, 10, 30, 12, 1.0, "hard", staleness=2),
        ScoredCompletion(2, False, response_tokens=60, prompt_tokens=10, used=False),
    ]


def test_completion_metrics_by_hand():
    out = completion_metrics(completions())
    assert out["reward/mean"] == 2.0
    assert out["reward/std"] == pytest.approx(math.sqrt(0.5))
    assert out["reward/term/iou"] == 0.5
    assert out["reward/term/negative"] == 1.0  # only where the term was active
    assert out["iou/box"] == pytest.approx(0.4)
    assert out["iou/mask"] == pytest.approx(1.9 / 3)
    assert out["length/response"] == 36.0
    assert out["length/reasoning"] == 12.0
    assert out["length/truncated_fraction"] == 0.2
    assert out["length/factor"] == pytest.approx(3.3 / 4)
    assert out["length/factor/easy"] == 0.75 and out["length/factor/hard"] == 0.9
    assert out["length/penalised_fraction"] == 0.5
    assert out["answers/invalid_fraction"] == 0.25
    assert out["groups/used"] == 2 and out["groups/dropped"] == 1
    assert out["groups/zero_variance_fraction"] == 0.5
    assert out["tokens/prompt"] == 50 and out["tokens/response"] == 180
    assert out["failures/scoring"] == 1
    assert out["staleness/0"] == 2 and out["staleness/2"] == 2 and "staleness/1" not in out


def test_the_best_step(tmp_path):
    file = tmp_path / "metrics.jsonl"
    values = [(0, 0.9), (5, 0.3), (10, None), (15, 0.5), (20, 0.5)]  # before training; not finite; equal
    file.write_text("".join(json.dumps({"step": step, "eval/iou/box": value}) + "\n" for step, value in values) + json.dumps({"step": 25, "reward/mean": 1.0}) + "\n")
    assert metrics.best_step(file, "eval/iou/box") == 15
    assert metrics.best_step(file, "eval/None") is None
    file.write_text("".join(json.dumps({"step": step, "eval/sft/loss": value}) + "\n" for step, value in values))
    assert metrics.best_step(file, "eval/sft/loss") == 5  # a loss is best where it is smallest


def test_a_failed_score_is_no_zero():
    scored = completions()[:4]
    failed = [ScoredCompletion(3, False, used=False)] * 10
    for name in ("reward/mean", "reward/std", "iou/box", "answers/invalid_fraction", "groups/zero_variance_fraction"):
        assert completion_metrics(scored)[name] == completion_metrics(scored + failed)[name]


def test_nothing_scored_leaves_means_out():
    out = completion_metrics([ScoredCompletion(0, False, used=False)])
    assert "reward/mean" not in out and "groups/zero_variance_fraction" not in out
    assert out["failures/scoring"] == 1
    assert not any(completion_metrics([]).values())


def test_episodes_left_out_are_counted_by_kind():
    assert metrics.left_out_metrics([]) == {"failures/video": 0, "failures/too_long": 0}
    counts = metrics.left_out_metrics(["slow", "too_long", "unreadable", "slow"])
    assert counts == {"failures/too_long": 1, "failures/video": 3, "failures/video/slow": 2, "failures/video/unreadable": 1}


def test_equal_rewards_are_zero_variance_even_when_their_std_is_not_zero():
    value = 0.1 + 0.2
    assert np.std([value] * 3 + [value]) >= 0
    out = metrics.group_metrics([ScoredCompletion(0, True, value) for _ in range(7)])
    assert out["groups/zero_variance_fraction"] == 1.0
    out = metrics.group_metrics([ScoredCompletion(0, True, value), ScoredCompletion(0, True, np.nextafter(value, 1))])
    assert out["groups/zero_variance_fraction"] == 0.0


def test_stage_times_nest_and_add_up():
    times = metrics.StageTimes()
    with times.stage("score"):
        with times.stage("segment"):
            assert times.now == "segment"
        assert times.now == "score"
    with pytest.raises(RuntimeError), times.stage("score"):
        raise RuntimeError
    assert times.now is None
    out = times.metrics(response_tokens=100)
    assert set(out) == {"seconds/score", "seconds/segment", "seconds/step", "tokens/per_second"}
    assert out["seconds/segment"] <= out["seconds/score"] <= out["seconds/step"]


def test_writer_writes_strict_json_and_counts_what_is_not_finite(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"a": 1, "b": math.nan, "c": -math.inf})
        # On disk before close: read by another handle now.
        line = (tmp_path / "metrics.jsonl").read_text().splitlines()[0]
    record = json.loads(line, parse_constant=lambda _: pytest.fail("NaN is not JSON"))
    assert record["step"] == 1 and record["a"] == 1.0 and record["b"] is None and record["c"] is None
    assert record["nonfinite_values"] == 2


def test_resume_drops_later_steps_and_a_cut_line(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 6):
            writer.write(step, {"a": step})
    path = tmp_path / "metrics.jsonl"
    with open(path, "a") as file:
        file.write('{"step": 6, "a"')  # the process died here
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4, 5]
    with MetricsWriter(tmp_path, resume_step=3) as writer:
        writer.write(4, {"a": 40})
    assert [(r["step"], r["a"]) for r in read_metrics(path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert drop_after(path, 0) == 4 and path.read_text() == ""


def test_a_bad_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        read_metrics(path)


def test_plain_progress_prints_one_line_a_step():
    stream = io.StringIO()
    with progress.Progress(3, stream=stream) as shown:
        shown.stage("generate")
        for step in (1, 2, 3):
            shown.step(step, {"reward/mean": 1.25, "iou/box": 0.5, "length/response": 61.7, "tokens/per_second": 1234.5, "seconds/train": 9})
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("step 1/3  reward 1.250  box IoU 0.500  length 62  tokens/s 1234") and lines[0].endswith("left")
    assert lines[2].startswith("step 3/3") and "\x1b" not in stream.getvalue()


def test_live_progress_shows_step_stage_and_time_left():
    from rich.console import Console

    stream = io.StringIO()
    shown = progress.Progress(40, first_step=10, stream=stream, live=True)
    with shown:
        shown.step(11, {"reward/mean": 1.25})
        shown.stage("sync")
        console = Console(file=io.StringIO(), width=120)
        console.print(shown._render())
    text = console.file.getvalue()
    assert "step 11/40" in text and "sync" in text and "reward 1.250" in text and "left" in text


def test_time_left_is_the_median_step_times_what_remains():
    shown = progress.Progress(10, live=False, stream=io.StringIO())
    assert shown.seconds_left() is None
    shown._durations.extend([1.0, 1.0, 100.0])
    shown.done = 4
    assert shown.seconds_left() == 6.0


@pytest.mark.parametrize("seconds, text", [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")])
def test_duration(seconds, text):
    assert progress.duration(seconds) == text


def test_summary_says_where_how_and_what_next():
    line = progress.summary_line("runs/x", 40, 500, {"reward/mean": 1.2, "iou/box": 0.41}, {"reward/mean": 1.9, "iou/box": 0.55})
    assert "\n" not in line
    assert "runs/x: 40 steps in 8 min 20 s" in line
    assert "held-out reward 1.200 -> 1.900, box IoU 0.410 -> 0.550" in line
    assert "tensorboard --logdir runs/x/tensorboard" in line
    stopped = progress.summary_line("runs/x", 3, 5, {}, {}, stopped="Ctrl-C")
    assert "(stopped: Ctrl-C)" in stopped and "->" not in stopped


def test_first_and_last():
    records = [{"step": i, "reward/mean": float(i), "iou/box": None if i == 0 else 0.5} for i in range(8)]
    before, after = progress.first_and_last(records, window=2)
    assert before == {"reward/mean": 0.5, "iou/box": 0.5} and after["reward/mean"] == 6.5
    assert progress.first_and_last([]) == ({}, {})
