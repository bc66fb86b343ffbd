"""What a completion says: the objects of its answer, in the coordinates it was written in and in those of the target."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple, Optional

Point = tuple[float, float]
Box = tuple[float, float, float, float]


class AnswerObject(NamedTuple):
    """One object of an answer; it has a box or a point, or both.

    box: (x1, y1, x2, y2) as answered, not sorted and not clipped, or None.
    points, negative_points: tuples of (x, y); `point_2d` gives one positive point.
    item: position of the object in the answer's list (malformed items leave gaps).
    """

    box: Optional[Box]
    points: tuple[Point, ...]
    negative_points: tuple[Point, ...]
    item: int

    @property
    def point(self) -> Optional[Point]:
        return self.points[0] if self.points else None


@dataclass(frozen=True)
class Answer:
    """A parsed completion. Nothing in it depends on the target.

    text: the completion.
    think_format: the whole text is a think block and an answer block.
    strict: the answer block is exactly one JSON list. Only a strict answer earns accuracy; the objects of any other are
        salvaged for masks and logs.
    n_items: items of that list, malformed ones and those past the cap included (salvaged: number of objects).
    segmentation_format: 0..2, the mean over items of (valid `bbox_2d`) + (valid `point_2d`); 0 for an empty list.
    objects: at most 120, in the target's coordinates once `to_frame` was called, before that as answered.
    answered: the same objects as answered. units_hw: height and width that the answer's coordinates span (None: those
        of the target). policy_hw, frame_hw: sizes of the policy's image and of the original frame.
    keyframe: frame that the answer names, in the formats that name one.
    """

    text: str = field(repr=False)
    think_format: bool
    strict: bool
    n_items: int
    segmentation_format: float
    objects: tuple[AnswerObject, ...]
    answered: tuple[AnswerObject, ...] = field(repr=False)
    keyframe: Optional[float] = None
    units_hw: Optional[tuple[int, int]] = None
    policy_hw: Optional[tuple[int, int]] = None
    frame_hw: Optional[tuple[int, int]] = None

    @property
    def well_formed(self) -> bool:
        """Both formats are perfect (the empty list counts as such)."""
        return self.think_format and self.strict and (self.n_items == 0 or self.segmentation_format == 2.0)

    def to_frame(self, units: str, policy_hw: tuple[int, int], frame_hw: tuple[int, int]) -> "Answer":
        """The same answer with `objects` in pixels of the original frame; call it once, right after parsing.

        units: "pixels" (of the policy's resized image) or "relative_1000". The answered numbers are kept, so that
        thresholds are compared without a second rounding. Raises ValueError on other units or a second call.
        """
        if units not in ("pixels", "relative_1000"):
            raise ValueError(f"units={units!r}: expected 'pixels' or 'relative_1000'")
        if self.units_hw is not None:
            raise ValueError("this answer was converted already; convert it once, right after parse_answer")
        policy_hw, frame_hw = (int(policy_hw[0]), int(policy_hw[1])), (int(frame_hw[0]), int(frame_hw[1]))
        return replace(
            self,
            objects=_convert(self.answered, units, policy_hw, frame_hw),
            units_hw=policy_hw if units == "pixels" else (1000, 1000),
            policy_hw=policy_hw,
            frame_hw=frame_hw,
        )


def _convert(objects, units, policy_hw, frame_hw):
    import numpy as np
    from segmentation_service.geometry import from_policy_units

    pairs = []  # every coordinate pair of every object, so that the conversion is one call
    for one in objects:
        pairs += [one.box[:2], one.box[2:]] if one.box else []
        pairs += [*one.points, *one.negative_points]
    if not pairs:
        return objects
    flat = np.asarray(from_policy_units(np.array(pairs, dtype=np.float64), units, policy_hw, frame_hw)).tolist()
    converted = iter(map(tuple, flat))
    take = lambda n: tuple(next(converted) for _ in range(n))
    return tuple(
        AnswerObject(
            box=next(converted) + next(converted) if one.box else None,
            points=take(len(one.points)),
            negative_points=take(len(one.negative_points)),
            item=one.item,
        )
        for one in objects
    )
