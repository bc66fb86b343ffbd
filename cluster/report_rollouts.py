"""The rollouts that a report shows: whole groups, evenly over the steps, with their frames, masks and tokens, as JSON values."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segmentation_service.masks import decode_rle
from segmentation_service.palette import davis_palette
from segmentation_service.video import VideoError, read_frames

from cluster import paths, rollout_log
from cluster.rollout_log import RolloutRow

FRAME_WIDTH, THUMB_WIDTH = 640, 112  # pixels
MASK_ALPHA = 120


def groups_of(folder: Path, tokenizer: Any | None) -> Iterator[dict[str, Any]]:
    """All groups of a run, in such an order that the first n are spread evenly over its steps, for every n."""
    files = dict(rollout_log.rollout_files(folder))
    steps = sorted(files)
    bits = max(1, (len(steps) - 1).bit_length())
    spread = [steps[i] for i in sorted(range(len(steps)), key=lambda i: f"{i:0{bits}b}"[::-1])]
    groups = {step: sorted(set(rollout_log.read_columns(file, ["group"])["group"])) for step, file in files.items()}
    for turn in range(max(map(len, groups.values()), default=0)):
        for n, step in enumerate(spread):
            if turn < len(groups[step]):
                # Another place in each step, as a data set's order may put like episodes at like places.
                chosen = groups[step][(turn + n) % len(groups[step])]
                yield group_values([row for row in rollout_log.read_rollouts(files[step]) if row.group == chosen], tokenizer)


def group_values(rows: Sequence[RolloutRow], tokenizer: Any | None) -> dict[str, Any]:
    """One group. Frames that cannot be read any more are left out, and `unread` says why."""
    first = rows[0]
    shown, unread = [*dict.fromkeys([*first.frame_ids, first.target_frame])], ""
    try:
        frames = read_frames(paths.local_path(first.video) or Path(first.video), shown)
    except VideoError as error:
        frames, unread = {}, str(error)
    return {
        "step": first.step, "group": first.group, "episode": first.episode_id, "query": first.query, "difficulty": first.difficulty, "class": first.difficulty_class,
        "video": first.video, "hw": list(first.frame_hw), "target": first.target_frame, "unread": unread,
        "image": jpeg(frames[first.target_frame], FRAME_WIDTH, 75) if frames else None,
        "shown": [[t, jpeg(frames[t], THUMB_WIDTH, 60)] for t in first.frame_ids if t in frames],
        "rollouts": [_rollout(row, tokenizer) for row in rows],
    }


def _rollout(row: RolloutRow, tokenizer: Any | None) -> dict[str, Any]:
    objects = json.loads(row.answer_json) if row.answer_json else []
    return {
        "index": row.index, "reward": _short(row.reward), "advantage": _short(row.advantage), "valid": row.valid, "failure": row.failure,
        "numbers": {name: _short(value) for name, value in (("box IoU", row.box_iou), ("mask IoU", row.mask_iou), ("length factor", row.length_factor)) if value is not None},
        "terms": {name: _short(value) for name, value in row.reward_terms.items()},
        "finish": row.finish_reason, "versions": [[version, count] for version, count in row.weight_versions], "length": len(row.response_token_ids),
        "objects": [{"box": [round(v, 1) for v in o["box"] or ()], "points": _rounded(o["points"]), "negative": _rounded(o["negative_points"])} for o in objects],
        "masks": None if row.masks is None else masks_png([decode_rle(m) for m in row.masks], row.frame_hw),
        "tokens": token_texts(row.response_token_ids, row.rollout_logprobs, tokenizer) if tokenizer else [[row.response_text, None]],
    }


def token_texts(ids: Sequence[int], logprobs: Sequence[float], tokenizer: Any) -> list[list[Any]]:
    """[text, log-prob] of each token; tokens that share a character are one entry, with the sum of their log-probs, as only together they are text."""
    texts: list[list[Any]] = []
    pending, logprob = [], 0.0
    for n, (token, value) in enumerate(zip(ids, logprobs), 1):
        pending.append(token)
        logprob += value
        text = tokenizer.decode(pending, clean_up_tokenization_spaces=False)
        if not text.endswith("\ufffd") or n == len(ids):
            texts.append([text, round(logprob, 3)])
            pending, logprob = [], 0.0
    return texts


def masks_png(masks: Sequence[np.ndarray], hw: Sequence[int]) -> str:
    """Data URI of a picture over the frame: each object in its colour, half seen through, and the rest not at all."""
    numbers_HW = np.zeros(tuple(hw), np.uint8)
    for number, mask_HW in enumerate(masks, 1):
        numbers_HW[mask_HW.astype(bool)] = 1 + (number - 1) % 255
    image = Image.fromarray(numbers_HW)
    image.putpalette(davis_palette())
    height, width = numbers_HW.shape
    if width > FRAME_WIDTH:
        image = image.resize((FRAME_WIDTH, max(1, round(height * FRAME_WIDTH / width))), Image.Resampling.NEAREST)
    return _uri(image, "png", optimize=True, transparency=bytes([0] + [MASK_ALPHA] * 255))


def jpeg(frame_HW3: np.ndarray, width: int, quality: int) -> str:
    """Data URI of a frame, no wider than `width` pixels."""
    image = Image.fromarray(frame_HW3)
    image.thumbnail((width, 4 * width))
    return _uri(image, "jpeg", quality=quality)


def _uri(image: Image.Image, kind: str, **options: Any) -> str:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


def _rounded(points: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[round(v, 1) for v in point] for point in points]


def _short(value: float | None) -> float | None:
    """Six digits; what is not finite has no form in JSON."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def short_values(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _short(value) if isinstance(value, float) else value for name, value in record.items()}
