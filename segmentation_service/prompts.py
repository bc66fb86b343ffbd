"""What a segmenter is asked: one object's box and points, and the rule for prompts that leave the frame. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from . import geometry

NEGATIVE, POSITIVE = 0, 1


@dataclass(frozen=True)
class ObjectPrompt:
    """One object on a frame: a box `(x1, y1, x2, y2)` or None, and points `(x, y)` with labels (1 on the object, 0 off it).

    Pixels of the original frame; corners are inclusive (see `geometry`). Any numbers are legal, NaN included, since
    they come from a policy: `clip_prompt` says what becomes of them. Raises ValueError where the shape is wrong.
    """

    box: tuple[float, float, float, float] | None
    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        # Lists are accepted and made tuples: equal prompts must compare and hash equal, or they would be decoded twice.
        box = None if self.box is None else tuple(float(v) for v in self.box)
        points = tuple(tuple(float(v) for v in point) for point in self.points)
        labels = tuple(int(label) for label in self.labels)
        if box is not None and len(box) != 4:
            raise ValueError(f"a box is (x1, y1, x2, y2) or None; got {box}")
        if any(len(point) != 2 for point in points):
            raise ValueError(f"points are (x, y); got {points}")
        if len(points) != len(labels):
            raise ValueError(f"each point needs a label; got {len(points)} points and {len(labels)} labels")
        if any(label not in (NEGATIVE, POSITIVE) for label in labels):
            raise ValueError(f"labels are 1 (on the object) or 0 (off it); got {labels}")
        object.__setattr__(self, "box", box)
        object.__setattr__(self, "points", points)
        object.__setattr__(self, "labels", labels)


def clip_prompt(prompt: ObjectPrompt, hw) -> ObjectPrompt | None:
    """The part of a prompt that lies in a frame of size `hw`, or None where nothing is left to segment.

    * A box is clipped to the frame. A box that covers no pixel of it (outside, inverted, or with a NaN or infinity)
      makes the whole prompt None, whatever its points: the box is the answer's claim where the object is, and a point
      that rescued a broken box would earn a reward for it. Equal corners are one pixel, and legal.
    * Points outside the frame, or not finite, are left out.
    * Without a box, at least one positive point must be left: negative points alone name no object.
    """
    box = prompt.box
    if box is not None:
        if not geometry.boxes_in_frame(box, hw):
            return None
        box = tuple(geometry.clip_boxes(box, hw).tolist())
    points, labels = prompt.points, prompt.labels
    if points:
        kept = geometry.points_in_frame(points, hw)
        points = tuple(tuple(point) for point in geometry.clip_points(points, hw)[kept].tolist())
        labels = tuple(label for label, keep in zip(labels, kept) if keep)
    if box is None and POSITIVE not in labels:
        return None
    return ObjectPrompt(box, points, labels)
