"""Every term of every preset without each input: an error that names it where the term needs it, else no difference."""

import asyncio

import numpy as np
import pytest

from reward_service import FrameTarget, MissingInput, RewardConfig, Target, score
from reward_service.config import FORMULAS
from reward_service.config_values import reward_config
from reward_service.presets import pixelthink, revseg, seg_zero, veason_r1, videoseg_r1, vision_reasoner
from reward_service.score_request import InvalidItem, ScoreRequest
from reward_service.serve_config import RewardServeConfig
from reward_service.service import RewardService
from segmentation_service.masks import encode_rle

MODULES = dict(videoseg_r1=videoseg_r1, seg_zero=seg_zero, vision_reasoner=vision_reasoner, pixelthink=pixelthink, veason_r1=veason_r1, revseg=revseg)
MASK = np.zeros((84, 84), bool)
MASK[10:20, 10:20] = True
RLE, BOX = encode_rle(MASK), [10, 10, 19, 19]
SEEN, AWAY = {"boxes": [BOX], "masks": [RLE]}, {"boxes": [None], "masks": [None]}
TARGET = {"image_size": [84, 84], "boxes": [BOX], "points": [[[15, 15], [12, 12]]], "masks": [RLE], "frames": {0: SEEN, 3: AWAY}}
GOOD = {
    "seg_zero": '<think>a</think><answer>{"bbox": [10, 10, 19, 19], "points_1": [15, 15], "points_2": [12, 12]}</answer>',
    "veason_r1": '<think>a</think><answer>{"keyframe_timestamp": 0, "bbox_2d_list": [[10, 10, 19, 19]]}</answer>',
    "revseg": '<think>a</think><answer>[{"frame_idx": 0}]</answer><think>a</think><answer>[{"bbox_2d": [10, 10, 19, 19]}]</answer>',
}
GOOD["pixelthink"] = GOOD["seg_zero"]
GOOD["videoseg_r1"] = '<think>a</think><answer>[{"bbox_2d": [10, 10, 19, 19], "point_2d": [15, 15], "negative_point_2d": [22, 15]}]</answer>'
GOOD["vision_reasoner"] = GOOD["videoseg_r1"]

INPUTS = ("nothing", "points", "a point", "the second point", "masks", "frames", "boxes of a frame", "masks of a frame", "predicted masks", "length", "difficulty", "uncertainty")
NEEDED = {
    ("videoseg_r1", "point"): {"points", "a point"},
    ("videoseg_r1", "negative_point"): {"masks"},
    ("videoseg_r1", "mask_iou"): {"masks", "predicted masks"},
    ("videoseg_r1", "iou by masks"): {"masks", "predicted masks"},
    ("videoseg_r1", "iou by video"): {"frames", "masks of a frame", "predicted masks"},
    ("videoseg_r1", "video_quality"): {"frames", "masks of a frame", "predicted masks"},
    ("videoseg_r1", "temporal_consistency"): {"frames", "masks of a frame", "predicted masks"},
    ("videoseg_r1", "length"): {"length"},
    ("seg_zero", "point"): {"points", "a point", "the second point"},
    ("pixelthink", "point"): {"points", "a point", "the second point"},
    ("pixelthink", "length"): {"length"},
    ("vision_reasoner", "iou"): {"points", "a point"},  # all three are matched together, as published
    ("vision_reasoner", "box_l1"): {"points", "a point"},
    ("vision_reasoner", "point"): {"points", "a point"},
    ("veason_r1", "keyframe"): {"frames", "masks of a frame"},
    ("veason_r1", "iou"): {"frames", "boxes of a frame"},
    ("veason_r1", "video_iou"): {"frames", "boxes of a frame", "masks of a frame", "predicted masks"},
    ("revseg", "keyframe"): {"frames", "boxes of a frame"},
    ("revseg", "iou"): {"frames", "boxes of a frame"},
}
TERMS = [(name, term) for name in FORMULAS for term in MODULES[name].MAXIMA] + [
    ("videoseg_r1", "iou by masks"),
    ("videoseg_r1", "iou by video"),
    ("videoseg_r1", "length"),
    ("pixelthink", "length"),
]
CASES = [(name, term, without) for name, term in TERMS for without in INPUTS]


def scored_term(term):
    return "think_format" if term == "length" else term.split()[0]


def needs_tracks(term):
    return "video" in term or term == "temporal_consistency"


def settings(name, term):
    """Of a request: this term alone."""
    weights = {t: 0.0 for t in MODULES[name].MAXIMA} | {scored_term(term): 1.0}
    reward = {"weights": weights, "length": {"penalty": term == "length", "unit": "think_tokens"}}
    return reward | {"iou by masks": {"accuracy_iou": "mask"}, "iou by video": {"accuracy_iou": "video"}}.get(term, {})


def item(name, without, tracks):
    """An item of the service with all inputs but one; the preset's own good answer."""
    target, frames = dict(TARGET), {t: dict(frame) for t, frame in TARGET["frames"].items()}
    given = {"completion": GOOD[name], "length": 5, "difficulty": 4.0, "uncertainty": 0.5}
    given |= {"predicted_tracks": {0: [RLE], 3: [None]}} if tracks else {"predicted_masks": [RLE]}
    match without:
        case "points" | "masks":
            target[without] = None
        case "frames":
            frames = None
        case "a point":
            target["points"] = [[]]
        case "the second point":
            target["points"] = [[[15, 15]]]
        case "boxes of a frame" | "masks of a frame":
            del frames[0][without.split()[0]]
        case "predicted masks":
            given = {key: value for key, value in given.items() if not key.startswith("predicted")}
        case "length" | "difficulty" | "uncertainty":
            given[without] = None
    return {**given, "target": {**target, "frames": frames}}


def saying(completion, given):
    """The item with a completion of no objects, and as many masks."""
    none = {"predicted_masks": [], "predicted_tracks": {0: [], 3: []}}
    return given | {"completion": completion} | {key: value for key, value in none.items() if key in given}


def by_function(given, config):
    target = {**given["target"], "frames": given["target"]["frames"] and {t: FrameTarget(**f) for t, f in given["target"]["frames"].items()}}
    masks = given.get("predicted_tracks", given.get("predicted_masks"))
    return score(given["completion"], Target(**target), config, given["difficulty"], given["uncertainty"], given["length"], masks)


def by_service(given, **request):
    (found,) = asyncio.run(RewardService(RewardServeConfig()).score(ScoreRequest(items=[given], **request))).scores
    return found


@pytest.mark.parametrize("name, term, without", CASES)
def test_a_missing_input_is_an_error_and_never_a_zero(name, term, without):
    reward = settings(name, term)
    config, given = reward_config(name, reward, RewardConfig()), item(name, without, tracks=needs_tracks(term))
    if without not in NEEDED.get((name, term), ()):
        full = MODULES[name].MAXIMA[scored_term(term)]
        assert by_function(given, config).total == by_service(given, preset=name, reward=reward).total == full
        return
    for one in (given, saying("", given), saying("<think>a</think><answer>[]</answer>", given)):
        with pytest.raises(MissingInput) as missing:
            by_function(one, config)
        if without == "predicted masks" and one is not given:
            continue  # the service asks for no masks where the answer has no object
        found = by_service(one, preset=name, reward=reward)
        assert isinstance(found, InvalidItem) and not hasattr(found, "total")
        assert found.reason == str(missing.value) or (without == "predicted masks" and "needs SAM2's masks" in found.reason)
