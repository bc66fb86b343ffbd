"""Rollouts in Parquet: everything comes back as it was, files are whole or absent, bad files are named."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import rollout_log
from cluster.errors import DataError
from cluster.rollout_log import RolloutRow, drop_after, read_columns, read_metadata, read_rollouts, rollout_files, write_rollouts


def row(group=0, index=0, step=3, **changes):
    values = dict(
        step=step,
        group=group,
        index=index,
        episode_id="toy-1",
        query="the red circle, größer",
        difficulty=4.0,
        difficulty_class="mid",
        video="videos/00001",
        frame_ids=[0, 5, 9],
        target_frame=5,
        frame_hw=[96, 128],
        policy_hw=[112, 112],
        grid_thw=[[1, 4, 4], [1, 8, 8]],
        units="pixels",
        prompt_text="Find it",
        prompt_token_ids=[1, 2, 3],
        prompt_fingerprint="ab" * 32,
        processor_fingerprint="cd",
        response_text="<think>x</think>",
        response_token_ids=[7, 8],
        rollout_logprobs=[-0.5, -1.25],
        weight_versions=[("3", 1), ("4", 1)],
        seed=2**40,
        finish_reason="stop",
        valid=True,
        failure=None,
        answer_json='[{"bbox_2d": [1, 2, 3, 4]}]',
        reward=1.5,
        reward_terms={"iou": 1.0, "format": 0.5},
        length_factor=0.9,
        box_iou=0.7,
        mask_iou=None,
        advantage=-0.25,
        masks=[{"size": [96, 128], "counts": "abc"}],
    )
    return RolloutRow(**{**values, **changes})


def test_columns_are_the_row_fields():
    assert rollout_log.SCHEMA.names == list(RolloutRow.__dataclass_fields__)


def test_rows_come_back_sorted_and_equal(tmp_path):
    failed = row(1, 1, valid=False, failure="segmenter timed out", reward=None, advantage=None, masks=None, answer_json=None, reward_terms={})
    no_object = row(1, 0, masks=[], answer_json="[]")
    path = write_rollouts(tmp_path / "rollouts", 3, [failed, no_object, row()], {"weights": "hash"})
    assert path.name == "step_000003.parquet"
    assert read_rollouts(path) == [row(), no_object, failed]  # None and an empty list of masks stay different
    assert read_metadata(path) == {"format": "1", "step": "3", "weights": "hash"}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_numpy_arrays_are_taken_and_float32_logprobs_are_kept_exactly(tmp_path):
    logprobs = np.random.default_rng(0).normal(size=50).astype(np.float32)
    ids, grid = np.arange(50, dtype=np.int32), np.ones((2, 3), np.int64)
    arrays = row(response_token_ids=ids, rollout_logprobs=logprobs, weight_versions=[("1", 50)], grid_thw=grid)
    back = read_rollouts(write_rollouts(tmp_path, 3, [arrays]))[0]
    assert np.array_equal(np.asarray(back.rollout_logprobs, np.float32), logprobs)
    assert back.response_token_ids == list(range(50)) and back.grid_thw == [[1, 1, 1], [1, 1, 1]]


def test_some_columns_only(tmp_path):
    path = write_rollouts(tmp_path, 3, [row(), row(index=1, reward=2.0)])
    assert read_columns(path, ["reward", "reward_terms"]) == {"reward": [1.5, 2.0], "reward_terms": [row().reward_terms] * 2}
    with pytest.raises(DataError, match="no column rewrad"):
        read_columns(path, ["rewrad"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rollout_logprobs": [-1.0]}, "2 response tokens but 1 log-probs"),
        ({"weight_versions": [("3", 1)]}, "weight versions for 1 of 2"),
        ({"step": 4}, "is of step 4"),
        ({"reward": None}, "valid but has no reward"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused_and_nothing_is_written(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        write_rollouts(tmp_path, 3, [row(), replace(row(index=1), **changes)])
    assert list(tmp_path.iterdir()) == []


def test_files_are_listed_in_order_and_dropped_after_a_step(tmp_path):
    for step in (2, 10, 9):
        write_rollouts(tmp_path, step, [row(step=step)])
    (tmp_path / ".step_000011.parquet.tmp").write_bytes(b"half")
    assert [s for s, _ in rollout_files(tmp_path)] == [2, 9, 10]
    assert drop_after(tmp_path, 2) == [9, 10]
    assert [p.name for p in tmp_path.iterdir()] == ["step_000002.parquet"]
    assert list(rollout_files(tmp_path / "none")) == []


def test_a_bad_file_is_named(tmp_path):
    broken = tmp_path / "step_000001.parquet"
    broken.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="step_000001.parquet is not a readable"):
        read_rollouts(broken)
    other = tmp_path / "step_000002.parquet"
    pq.write_table(pa.table({"step": [1], "group": [0]}), other)
    with pytest.raises(DataError, match="lacks the columns index, episode_id"):
        read_rollouts(other)
    with pytest.raises(DataError, match="lacks the columns reward"):
        read_columns(other, ["step", "reward"])
