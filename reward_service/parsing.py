"""Completion text -> Answer: strict about what may earn reward, robust about everything else, linear in the text."""

from __future__ import annotations

import json
from typing import Annotated, Optional

import msgspec

from reward_service.answer import Answer, AnswerObject
from reward_service.tags import END_THINK, _find, answer_region, has_think_format

MAX_OBJECTS = 120  # VisionReasoner's cap; also bounds what a completion can ask of the segmenter
MAX_NEGATIVE_POINTS = 120  # per object, ours, for the same reason
LIMIT = 10**9  # no coordinate is as large; an integer, as most coordinates are, for comparing those with floats takes longer

_BOX_KEYS = ("bbox_2d", "bbox", "box", "boxes")
_POINT_KEYS = ("point_2d", "point", "points_1", "points_2", "positive_points", "points")
_NEGATIVE_KEYS = ("negative_point_2d", "negative_point", "negative_points")
_FRAME_KEYS = ("keyframe_timestamp", "frame_idx", "time")


def parse_answer(text: str) -> Answer:
    """Reads a completion; never raises on any string, and takes time linear in its length.

    Strict form: the answer block (see `tags.answer_region`) is one JSON list of objects
    `{"bbox_2d": [x1,y1,x2,y2], "point_2d": [x,y], "negative_point_2d": [x,y] or [[x,y],...]}`. Numbers are JSON integers
    or floats with |v| < 1e9: booleans, numeric strings, NaN and infinities are not numbers. Of duplicate keys the last
    counts. A malformed item stays in `n_items` and gives no object; a malformed negative point is no negative point.

    Anything else (code fence, text round the JSON, an unclosed block, a cut list, the formats of Seg-Zero, Veason-R1,
    ReVSeg and OneThinker) is salvaged into `objects` with `strict=False`.
    """
    if not isinstance(text, str):
        raise TypeError(f"a completion is a str, got {type(text).__name__}")
    think_format = has_think_format(text)
    start, end, closed = answer_region(text)
    if closed and (perfect := _perfect_objects(text[start:end])) is not None:
        return Answer(text, think_format, True, len(perfect), 2.0 if perfect else 0.0, perfect[:MAX_OBJECTS], perfect[:MAX_OBJECTS])
    data = _decode(text[start:end]) if closed else None
    if type(data) is list:
        objects, points_sum = _strict_objects(data)
        format_score = points_sum / len(data) if data else 0.0
        return Answer(text, think_format, True, len(data), format_score, objects, objects)
    if data is None:
        data = _salvage(text, start, end)
    objects, keyframe = _loose_objects(data)
    return Answer(text, think_format, False, len(objects), 0.0, objects, objects, keyframe)


_Number = Annotated[int, msgspec.Meta(gt=-LIMIT, lt=LIMIT)] | Annotated[float, msgspec.Meta(gt=-LIMIT, lt=LIMIT)]


class _Perfect(msgspec.Struct, forbid_unknown_fields=True):
    bbox_2d: tuple[_Number, _Number, _Number, _Number]
    point_2d: tuple[_Number, _Number]
    negative_point_2d: Optional[tuple[_Number, _Number]] = None


_PERFECT = msgspec.json.Decoder(list[_Perfect])


def _perfect_objects(text: str) -> tuple[AnswerObject, ...] | None:
    """What `_decode` and `_strict_objects` make of a list of complete objects with these keys only, in a third of the time; else None."""
    try:
        items = _PERFECT.decode(text)
    except (ValueError, RecursionError):
        return None
    return tuple([AnswerObject(i.bbox_2d, (i.point_2d,), (i.negative_point_2d,) if i.negative_point_2d else (), n) for n, i in enumerate(items)])


def _decode(text: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # deep nesting, integers of more than 4,300 digits, not JSON
        return None


def _strict_objects(items: list) -> tuple[tuple[AnswerObject, ...], int]:
    """Objects of a strict list and the number of valid `bbox_2d` and `point_2d` among all items."""
    objects, valid = [], 0
    for index, item in enumerate(items):
        if type(item) is not dict:
            continue
        box = _numbers(item.get("bbox_2d"), 4)
        point = _numbers(item.get("point_2d"), 2)
        valid += (box is not None) + (point is not None)
        if index < MAX_OBJECTS and (box or point):
            negative = item.get("negative_point_2d")
            negative_points = _points(negative) if negative else ()
            objects.append(AnswerObject(box, (point,) if point else (), negative_points, index))
    return tuple(objects), valid


def _numbers(value, n: int):
    """The n numbers as a tuple, or None."""
    if type(value) is not list or len(value) != n:
        return None
    for v in value:
        # Not a bool; no comparison holds for a NaN. The limit also refuses what is too big for a float.
        if not (type(v) is int or type(v) is float) or not -LIMIT < v < LIMIT:
            return None
    return tuple(value)


def _points(value) -> tuple:
    """A point or a list of points; what is malformed is left out."""
    if type(value) is not list:
        return ()
    single = _numbers(value, 2)
    if single:
        return (single,)
    return tuple([p for v in value[:MAX_NEGATIVE_POINTS] if (p := _numbers(v, 2))])


# ---- everything that is not the strict form ----


def _salvage(text: str, start: int, end: int):
    """First JSON list or object in the answer block, else after the think block, else anywhere; None if there is none.

    At most two decodes (from the first bracket, from the first brace), so that garbage costs linear time.
    """
    if start < 0:
        closed = _find(text, END_THINK)
        start, end = (closed + len(END_THINK) if closed >= 0 else 0), len(text)
    region = text[start:end]
    for at in sorted({_find(region, "["), _find(region, "{")} - {-1}):
        try:
            return json.JSONDecoder().raw_decode(region, at)[0]
        except (ValueError, RecursionError):
            continue
    return None


def _loose_objects(data) -> tuple[tuple[AnswerObject, ...], float | None]:
    keyframe = None
    if type(data) is dict:
        keyframe = next((data[k] for k in _FRAME_KEYS if _numbers([data.get(k)], 1)), None)
        if type(boxes := data.get("bbox_2d_list")) is list:
            return tuple([AnswerObject(box, (), (), n) for n, one in enumerate(boxes[:MAX_OBJECTS]) if (box := _numbers(one, 4))]), keyframe
        data = [data]
    if type(data) is not list:
        return (), None
    objects = []
    for index, item in enumerate(data[:MAX_OBJECTS]):
        if type(item) is not dict:
            continue
        if keyframe is None:
            keyframe = next((item[k] for k in _FRAME_KEYS if k in item and _numbers([item[k]], 1)), None)
        box = next((b for b in [_numbers(item[k], 4) for k in _BOX_KEYS if k in item] if b), None)
        points = tuple([p for k in _POINT_KEYS if k in item for p in _points(item[k])])
        if box or points:
            negative = tuple([p for k in _NEGATIVE_KEYS if k in item for p in _points(item[k])])
            objects.append(AnswerObject(box, points, negative, index))
    return tuple(objects), keyframe
