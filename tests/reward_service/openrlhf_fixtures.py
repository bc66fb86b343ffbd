"""Writes the documented requests as OpenRLHF's own clients would send them (json.dumps), and the replies that are expected to them.

Run `python tests/reward_service/openrlhf_fixtures.py` after a wanted change, and look at the difference.
"""

import json
from pathlib import Path

PROMPT = "<|im_start|>user\nFind the cat.<|im_end|>\n<|im_start|>assistant\n"
TARGET = {"image_size": [60, 100], "boxes": [[10, 10, 29, 29]], "points": [[[20, 20]]]}
GOOD = '<think>The cat is left.</think><answer>[{"bbox_2d": [10, 10, 29, 29], "point_2d": [20, 20]}]</answer>'
TERMS = ["think_format", "segmentation_format", "iou", "box_l1", "point", "no_repeat", "original", "length_penalty"]

REQUESTS = {
    "one": {"query": [PROMPT + GOOD + "<|im_end|>"], "prompts": [PROMPT], "labels": [json.dumps(TARGET)]},
    "batch": {
        "query": [PROMPT + GOOD + "<|im_end|>", PROMPT + "<think>é</think><answer>[]</answer><|im_end|>", PROMPT + "I see <|im_start|>assistant\nno cat"],
        "prompts": [PROMPT] * 3,
        "labels": [json.dumps({"target": TARGET, "difficulty": 4})] * 3,
    },
    "empty": {"query": [], "prompts": [], "labels": []},
}
ROWS = {"one": [[1, 2, 1, 1, 1, 1, 7, 1]], "batch": [[1, 2, 1, 1, 1, 1, 7, 1], [1, 0, 0, 0, 0, 1, 2, 1], [0, 0, 0, 0, 0, 1, 1, 1]], "empty": []}


def reply(rows):
    """By hand: vision_reasoner's terms, at most 7."""
    logs = {name: [float(row[k]) for row in rows] for k, name in enumerate(TERMS)} if rows else {}
    return {"rewards": [float(row[6]) for row in rows], "scores": [row[6] / 7 for row in rows], "extra_logs": logs}


if __name__ == "__main__":
    for name, request in REQUESTS.items():
        (Path(__file__).parent / "openrlhf" / f"{name}.request.json").write_text(json.dumps(request))
        (Path(__file__).parent / "openrlhf" / f"{name}.reply.json").write_text(json.dumps(reply(ROWS[name]), separators=(",", ":"), ensure_ascii=False))
