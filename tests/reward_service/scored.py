"""What the tests of the served rewards share: items of every kind, and what `score` gives for them in this process."""

import numpy as np

from reward_service import RewardConfig, Target, score
from reward_service.score_request import InvalidItem
from segmentation_service.masks import encode_rle

HEIGHT, WIDTH = 60, 100
GOOD = '<think>The cat is left.</think><answer>[{"bbox_2d": [10, 10, 29, 29], "point_2d": [20, 20], "negative_point_2d": [[33, 20]]}]</answer>'
COMPLETIONS = [
    GOOD,
    '<think>Two.</think><answer>[{"bbox_2d": [50, 30, 80, 50], "point_2d": [60, 40]}, {"bbox_2d": [11, 9, 30, 28], "point_2d": [19, 21]}]</answer>',
    '<think>Far off.</think><answer>[{"bbox_2d": [70, 0, 99, 20], "point_2d": [80, 5]}]</answer>',
    '<think>None.</think><answer>[]</answer>',
    'It is ```json\n[{"bbox_2d": [10, 10, 29, 29]}]\n```',
    '<think>Broken</think><answer>[{"bbox_2d": [10, 10, 29</answer>',
    "",
    "same. " * 50,
    '<think>é ☃ 𝕏</think><answer>[{"bbox_2d": [1e400, NaN, true, "3"]}]</answer>',
]


def mask(x1, y1, x2, y2, hw=(HEIGHT, WIDTH)):
    out = np.zeros(hw, bool)
    out[y1 : y2 + 1, x1 : x2 + 1] = True
    return out


MASKS = [mask(10, 10, 29, 29), mask(50, 30, 79, 49)]
TARGETS = [
    {
        "image_size": [HEIGHT, WIDTH],
        "boxes": [[10, 10, 29, 29], [50, 30, 79, 49]],
        "points": [[[20, 20]], [[64, 40]]],
        "masks": [encode_rle(m) for m in MASKS],
    },
    {"image_size": [HEIGHT, WIDTH], "boxes": [[10, 10, 29, 29]], "points": [[[20, 20], [21, 20]]], "masks": [encode_rle(MASKS[0])]},
    {"image_size": [HEIGHT, WIDTH], "masks": []},
]


def item(completion=GOOD, target=0, **values):
    return {"completion": completion, "target": TARGETS[target], "length": 7, **values}


def items():
    """Every completion against every target, with some of the optional values."""
    return [
        item(completion, t, length=40 * c, **([{}, {"difficulty": 5.5, "uncertainty": 0.5}, {"difficulty": 2}][(c + t) % 3]))
        for t in range(len(TARGETS))
        for c, completion in enumerate(COMPLETIONS)
    ]


def expected(given, config=None):
    """(total, terms) by `score` in this process, or what it raises."""
    target = Target(**given["target"])
    try:
        found = score(given["completion"], target, config or RewardConfig(), given.get("difficulty"), given.get("uncertainty"), given["length"])
    except ValueError as error:
        return str(error)
    return found.total, found.terms


def outcome(found):
    """The same of an answer of the service."""
    return found.reason if isinstance(found, InvalidItem) else (found.total, found.terms)
