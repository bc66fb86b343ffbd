"""Answers to learn from, for supervised fine-tuning: made from the truth, or read from a file that a person or a stronger model wrote."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from reward_service import Target
from rollout.banned_tokens import MEDIA_TOKENS
from rollout.prompts import Prompt, PromptBuilder
from segmentation_service.geometry import round_boxes, round_points, to_policy_units
from segmentation_service.masks import mask_to_box

from cluster.errors import DataError

OBJECTS = "{objects}"  # in a response of a file: here comes the truth's list of objects


class AnswerTooLong(ValueError):
    """One draw's answer has more tokens than a completion may have; others may fit."""


@dataclass(frozen=True)
class LearnedAnswer:
    """What is to be said about a draw. `token_ids`: int32 (R,), the end token included, as an engine would have sampled them."""

    text: str
    token_ids: np.ndarray


@dataclass(frozen=True)
class Written:
    """An answer of a file. `target_frame` is the one that it is about; None: whichever a prompt shows as its target."""

    response: str
    target_frame: int | None


class Answers:
    """The answer to each draw of a policy: made from the truth, or the one that `written` has for its episode."""

    def __init__(self, builder: PromptBuilder, thought: str, negative_points: bool, max_tokens: int, written: WrittenAnswers | None = None) -> None:
        """`thought`: template of the text between the tags of answers made from the truth; `negative_points`: whether they, and the objects filled
        into written ones, have some; `max_tokens`: of an answer, its end token included."""
        self.tokenizer, self.thought, self.negative_points, self.max_tokens, self.written = builder.tokenizer, thought, negative_points, max_tokens, written

    def to(self, query: str, prompt: Prompt, target: Target, written: Written | None = None) -> LearnedAnswer:
        """Raises AnswerTooLong."""
        text = f"<answer>{OBJECTS}</answer>" if written is None else written.response
        if OBJECTS in text:
            objects = truth_objects(target, prompt.units, prompt.policy_hw, self.negative_points)
            text = text.replace(OBJECTS, json.dumps(objects, separators=(",", ":")))
        if written is None:
            text = f"<think>{self.thought.format(query=query, count=len(target))}</think>{text}"
        token_ids = np.array([*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id], np.int32)
        if len(token_ids) > self.max_tokens:
            raise AnswerTooLong(
                f"episode {prompt.episode_id}: the answer to learn has {len(token_ids)} tokens, more than rollout.max_response_tokens = {self.max_tokens}; "
                "raise it, or give shorter answers"
            )
        return LearnedAnswer(text, token_ids)


def truth_objects(target: Target, units: str, policy_hw: tuple[int, int], negative_points: bool = False) -> list[dict[str, list[int]]]:
    """The objects that a right answer names, in whole units of the policy, as `Answer.to_frame` takes them; from left to right, so that there is one
    right answer.

    `negative_points`: a point just outside of each object too, where the target has masks and they leave room for it.
    """
    frame_hw, units_hw = target.image_size, policy_hw if units == "pixels" else (1000, 1000)
    in_units = lambda values, rounded: rounded(to_policy_units(values, units, policy_hw, frame_hw), units_hw).tolist()
    points = target.points_N2()
    objects = [{"bbox_2d": box, "point_2d": point} for box, point in zip(in_units(target.boxes_N4(), round_boxes), in_units(points, round_points))]
    if negative_points and target.masks is not None and objects:
        # Farther than a unit and a pixel, which is more than rounding to units and back can move it.
        gap = 1.0 + max(frame / unit for frame, unit in zip(frame_hw, units_hw))
        for one, point in zip(objects, points):
            outside = outside_point(target.union_HW("negative_point"), point, gap)
            if outside is not None:
                one["negative_point_2d"] = in_units(outside, round_points)
    return sorted(objects, key=lambda one: one["bbox_2d"])


def outside_point(mask_HW: np.ndarray, point: Iterable[float], gap: float) -> list[int] | None:
    """[x, y] of the pixel nearest to `point` among those at least `gap` pixels away from the mask; None where there is none."""
    from scipy.ndimage import distance_transform_edt

    (x, y), reach, (x1, y1, x2, y2) = point, int(np.ceil(gap)) + 1, mask_to_box(mask_HW)
    left, top = max(0, x1 - reach), max(0, y1 - reach)
    rows, columns = np.nonzero(distance_transform_edt(~mask_HW[top : y2 + reach + 1, left : x2 + reach + 1]) >= gap)
    if not len(rows):
        return None
    nearest = np.argmin((columns + left - x) ** 2 + (rows + top - y) ** 2)
    return [int(columns[nearest]) + left, int(rows[nearest]) + top]


class WrittenAnswers:
    """The answers of a file, by episode: Parquet if its name ends so, else JSON lines.

    `episode_id` and `response` are text; `target_frame` is the frame whose pixels the response's boxes and points are in, as the policy would give them;
    null or left out: the response holds `{objects}` for the truth to be filled in, or the episodes' target frames are fixed. Further columns do no harm. An
    episode may have several. Raises DataError for a file that is none, and for a response with a token that ends an answer or stands for an image.
    """

    def __init__(self, file: str | Path, end: str) -> None:
        """`end`: the policy's end token as text, which is added to each response and must not be in it."""
        self.file = str(file)
        self._of: dict[str, list[Written]] = {}
        for where, row in _rows(Path(file)):
            episode_id, response, frame = (row.get(name) for name in ("episode_id", "response", "target_frame"))
            if not (isinstance(episode_id, str) and isinstance(response, str) and response) or not (frame is None or type(frame) is int):
                raise DataError(f"{where}: an answer has episode_id and response (text) and may have target_frame (a whole number)", "mend it, or leave it out")
            if held := [token for token in (end, *MEDIA_TOKENS) if token in response]:
                raise DataError(f"{where}: the response to {episode_id} holds {held[0]}", "take it out; the end token is added to every answer")
            self._of.setdefault(episode_id, []).append(Written(response, frame))
        with open(file, "rb") as handle:
            self.fingerprint = hashlib.file_digest(handle, "sha256").hexdigest()[:16]

    @property
    def episode_ids(self) -> Set[str]:
        return self._of.keys()

    def at(self, episode_id: str, position: int, seed: int) -> Written:
        """The answer that is learned at a position: one of the episode's at random."""
        answers = self._of[episode_id]
        return answers[int(np.random.default_rng([seed, position, 6]).integers(len(answers)))] if len(answers) > 1 else answers[0]

    def check(self, episodes: Iterable[Mapping[str, Any]], frames_are_fixed: bool) -> None:
        """Raises DataError where an answer's target frame is not annotated or not known, of `episodes` with `episode_id`, `num_frames`, `annotated_frames`."""
        for row in episodes:
            for answer in self._of[row["episode_id"]]:
                t, where = answer.target_frame, f"{self.file}: an answer to episode {row['episode_id']}"
                if t is not None and t not in row["annotated_frames"]:
                    raise DataError(f"{where} is about frame {t}, which is not annotated", "leave it out, or correct its target_frame")
                if t is None and not (frames_are_fixed or row["num_frames"] == 1 or OBJECTS in answer.response):
                    raise DataError(
                        f"{where} has no target_frame, and the frame that prompts ask about is drawn at random: its boxes would be those of another frame",
                        f"add target_frame, write {OBJECTS} where the truth's list of objects belongs, or fix the frames (data.train_frames, data.evaluation_frames)",
                    )


def _rows(file: Path) -> Iterator[tuple[str, dict]]:
    """(where it stands, row) of a Parquet file or of JSON lines."""
    remedy = "give Parquet, or JSON lines such as {\"episode_id\": \"a\", \"response\": \"<think>...</think><answer>...</answer>\", \"target_frame\": 3}"
    if file.suffix == ".parquet":
        try:
            with pq.ParquetFile(file) as parquet:
                names = [name for name in ("episode_id", "response", "target_frame") if name in parquet.schema_arrow.names]
                rows = parquet.read(columns=names).to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{file} is not a readable Parquet file ({error})", remedy) from error
        yield from ((f"{file}, row {number}", row) for number, row in enumerate(rows))
        return
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{file}:{number}: not JSON ({error})", remedy) from error
                if not isinstance(row, dict):
                    raise DataError(f"{file}:{number}: not a JSON object", remedy)
                yield f"{file}:{number}", row
