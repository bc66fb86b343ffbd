"""A deterministic world of small videos: coloured shapes that move, overlap, enter, leave and turn round, with exact masks.

A video is a pure function of `(seed, WorldConfig)`. Queries come at three difficulties:

* easy: names a colour and a shape ("the red circle");
* mid:  compares shapes in space ("the largest square", "the leftmost shape");
* hard: needs time or a relation ("the shape that turns back", "the shape that enters last", "both shapes that touch").

A query is emitted only where the truth is unambiguous by a margin. Ratings on the 1..10 scale of the reward's difficulty
classes are fixed per level in `DIFFICULTY`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 45, 45),
    "green": (45, 190, 70),
    "blue": (60, 95, 235),
    "yellow": (240, 220, 60),
    "purple": (170, 60, 200),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIFFICULTY = {"easy": 2.0, "mid": 4.0, "hard": 6.0}


@dataclass(frozen=True)
class WorldConfig:
    """Ranges are inclusive. Sizes are in pixels."""

    height: int = 96
    width: int = 128
    frames: tuple[int, int] = (8, 48)
    objects: tuple[int, int] = (1, 3)
    radius: tuple[int, int] = (7, 18)
    touching: float = 0.2  # share of videos in which two shapes come to touch


@dataclass(frozen=True)
class Shape:
    """One object: its look, and the path of its centre over time (float pixels, may lie outside of the frame)."""

    colour: str
    kind: str
    radius: float
    centre_T2: np.ndarray
    turns: bool

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class Query:
    text: str
    level: str  # easy | mid | hard
    targets: tuple[int, ...]  # indices into the video's shapes


@dataclass(frozen=True)
class ToyVideo:
    """Shapes later in the list are drawn on top of earlier ones."""

    seed: int
    config: WorldConfig
    num_frames: int
    shapes: tuple[Shape, ...]
    queries: tuple[Query, ...]

    def frame(self, t: int) -> np.ndarray:
        """The picture at time t: uint8 (H, W, 3)."""
        image_HW3 = _background(self.seed, self.config).copy()
        for shape in self.shapes:
            (y0, y1, x0, x1), inside = _raster(shape, t, self.config)
            texture = 1.0 - 0.15 * ((np.arange(y0, y1)[:, None] // 3 + np.arange(x0, x1)[None] // 3) % 2)
            colour_hw3 = np.asarray(COLOURS[shape.colour]) * texture[..., None]
            crop = image_HW3[y0:y1, x0:x1]
            crop[inside] = colour_hw3[inside]
        return image_HW3.clip(0, 255).astype(np.uint8)

    def masks(self, t: int) -> np.ndarray:
        """Visible pixels of every shape at time t (occluded ones excluded): bool (N, H, W)."""
        masks_NHW = np.zeros((len(self.shapes), self.config.height, self.config.width), bool)
        for i, shape in enumerate(self.shapes):
            (y0, y1, x0, x1), inside = _raster(shape, t, self.config)
            masks_NHW[:i, y0:y1, x0:x1] &= ~inside
            masks_NHW[i, y0:y1, x0:x1] = inside
        return masks_NHW


def make_video(seed: int, config: WorldConfig = WorldConfig()) -> ToyVideo:
    """The video of this seed. Shapes have distinct (colour, kind) pairs; every video has at least one query."""
    rng = np.random.default_rng([seed, 0])
    num_frames = int(rng.integers(config.frames[0], config.frames[1] + 1))
    count = int(rng.integers(config.objects[0], config.objects[1] + 1))
    looks = rng.permutation(len(COLOURS) * len(SHAPES))[:count]
    motions = [str(rng.choice(["still", "drift", "turn", "enter", "leave"], p=[0.15, 0.3, 0.2, 0.2, 0.15])) for _ in looks]
    if motions[0] in ("enter", "leave"):
        motions[0] = "drift"  # something is in view at all times
    shapes = [
        Shape(
            colour=list(COLOURS)[look // len(SHAPES)],
            kind=SHAPES[look % len(SHAPES)],
            radius=(radius := float(rng.uniform(*config.radius))),
            centre_T2=_path(rng, motion, radius, num_frames, config),
            turns=motion == "turn",
        )
        for look, motion in zip(looks, motions)
    ]
    if count >= 2 and rng.random() < config.touching:
        shapes[1] = _follow(rng, shapes[0], shapes[1])
    video = ToyVideo(seed, config, num_frames, tuple(shapes), ())
    return ToyVideo(seed, config, num_frames, video.shapes, tuple(_queries(video)))


# ---------------------------------------------------------------------------------------------------------- motion


def _path(rng: np.random.Generator, motion: str, radius: float, num_frames: int, config: WorldConfig) -> np.ndarray:
    """Centre (x, y) at every frame, float (T, 2)."""
    size = np.array([config.width, config.height], float)
    inner_low, inner_high = np.full(2, radius), size - radius
    start, end = rng.uniform(inner_low, inner_high), rng.uniform(inner_low, inner_high)
    s = np.linspace(0.0, 1.0, num_frames)
    if motion == "still":
        return np.repeat(start[None], num_frames, 0)
    if motion == "drift":
        return start + s[:, None] * (end - start)
    if motion == "turn":
        turn_at = rng.uniform(0.35, 0.65)
        reach = np.where(s <= turn_at, s / turn_at, (1 - s) / (1 - turn_at))
        start[0] = rng.uniform(radius, size[0] * 0.3)
        end = np.array([rng.uniform(size[0] * 0.65, size[0] - radius), start[1]])
        if rng.random() < 0.5:
            start, end = end, start
        return start + reach[:, None] * (end - start)
    outside = start.copy()
    outside[0] = -radius - 1 if rng.random() < 0.5 else size[0] + radius
    moment = rng.uniform(0.2, 0.7)  # when it starts to enter, or is gone
    if motion == "enter":
        reach = np.clip((s - moment) / (1 - moment), 0, 1)
        return outside + reach[:, None] * (end - outside)
    reach = np.clip(s / moment, 0, 1)
    return start + reach[:, None] * (outside - start)


def _follow(rng: np.random.Generator, leader: Shape, shape: Shape) -> Shape:
    """`shape` moved so that it stays in contact with `leader`."""
    angle = rng.uniform(0, 2 * np.pi)
    gap = 0.75 * (leader.radius + shape.radius)
    offset = gap * np.array([np.cos(angle), np.sin(angle)])
    return Shape(shape.colour, shape.kind, shape.radius, leader.centre_T2 + offset, leader.turns)


# --------------------------------------------------------------------------------------------------------- drawing


@lru_cache(maxsize=4)
def _background(seed: int, config: WorldConfig) -> np.ndarray:
    """A dim wall lit from one side, with grain: float (H, W, 3)."""
    rng = np.random.default_rng([seed, 1])
    y, x = np.mgrid[0 : config.height, 0 : config.width]
    light = np.stack([x / config.width, 0.5 + 0 * x, y / config.height], -1)
    return 20 + 60 * light + 10 * rng.random() + 6 * rng.random((config.height, config.width, 1))


def _raster(shape: Shape, t: int, config: WorldConfig) -> tuple[tuple[int, int, int, int], np.ndarray]:
    """The rows and columns `(y0, y1, x0, x1)` that the shape may touch, and which of these pixels it covers."""
    cx, cy = shape.centre_T2[t]
    r = shape.radius
    y0, y1 = (min(max(int(v), 0), config.height) for v in (cy - r - 1, cy + r + 2))
    x0, x1 = (min(max(int(v), 0), config.width) for v in (cx - r - 1, cx + r + 2))
    dy, dx = np.arange(y0, y1)[:, None] - cy, np.arange(x0, x1)[None] - cx
    if shape.kind == "circle":
        inside = dx**2 + dy**2 <= r**2
    elif shape.kind == "square":
        inside = (abs(dx) <= 0.87 * r) & (abs(dy) <= 0.87 * r)
    elif shape.kind == "triangle":
        inside = (abs(dy) <= r) & (abs(dx) <= (dy + r) / 2)
    else:
        inside = ((abs(dx) <= r / 3) & (abs(dy) <= r)) | ((abs(dy) <= r / 3) & (abs(dx) <= r))
    return (y0, y1, x0, x1), inside


# --------------------------------------------------------------------------------------------------------- queries


def _queries(video: ToyVideo) -> list[Query]:
    shapes = video.shapes
    everyone = range(len(shapes))
    found = [Query(f"the {shape.name}", "easy", (i,)) for i, shape in enumerate(shapes)]
    if len(shapes) < 2:
        return found
    for kind in ("shape", *SHAPES):
        group = [i for i in everyone if kind in ("shape", shapes[i].kind)]
        for word, key in (("largest", lambda i: shapes[i].radius), ("smallest", lambda i: -shapes[i].radius)):
            found += _best(f"the {word} {kind}", group, key, margin=3.0)
        for word, axis, sign in (("leftmost", 0, -1), ("rightmost", 0, 1), ("topmost", 1, -1), ("lowest", 1, 1)):
            found += _extreme(f"the {word} {kind}", group, shapes, axis, sign, video.config)
    turning = [i for i in everyone if shapes[i].turns]
    if len(turning) == 1:
        found.append(Query("the shape that turns back", "hard", (turning[0],)))
    in_view = np.stack([video.masks(t).any((1, 2)) for t in range(video.num_frames)])  # (T, N)
    first, last = in_view.argmax(0), video.num_frames - 1 - in_view[::-1].argmax(0)
    margin = max(2, video.num_frames // 8)
    seen = [i for i in everyone if in_view[:, i].any()]
    if (late := [i for i in seen if first[i] > 0]) and len(seen) > 1:
        found += _best("the shape that enters last", late, lambda i: first[i], margin, "hard", alone=True)
    if early := [i for i in seen if last[i] < video.num_frames - 1]:
        found += _best("the shape that leaves first", early, lambda i: -last[i], margin, "hard", alone=True)
    touching = _touching_pairs(shapes)
    if len(touching) == 1:
        found.append(Query("both shapes that touch", "hard", touching[0]))
    return found


def _best(text: str, group: list[int], key: Callable[[int], float], margin: float, level: str = "mid", alone: bool = False):
    """The query for the member of `group` with the largest key, if it leads by `margin`."""
    ranked = sorted(group, key=key, reverse=True)
    if len(ranked) == 1:
        return [Query(text, level, (ranked[0],))] if alone else []
    clear = len(ranked) > 1 and key(ranked[0]) - key(ranked[1]) >= margin
    return [Query(text, level, (ranked[0],))] if clear else []


def _extreme(text, group, shapes, axis: int, sign: int, config: WorldConfig) -> list[Query]:
    """The query for the shape that is furthest along an axis at every moment; all of the group stay in view."""
    if len(group) < 2:
        return []
    paths_NT2 = np.stack([shapes[i].centre_T2 for i in group])
    if (paths_NT2 < 0).any() or (paths_NT2 >= [config.width, config.height]).any():
        return []
    along = np.sort(sign * paths_NT2[..., axis], 0)
    winner = (sign * paths_NT2[..., axis]).argmax(0)
    if (winner == winner[0]).all() and (along[-1] - along[-2]).min() >= 6:
        return [Query(text, "mid", (group[int(winner[0])],))]
    return []


def _touching_pairs(shapes: tuple[Shape, ...]) -> list[tuple[int, int]]:
    """Pairs in contact at every moment, provided that all other pairs stay clear of one another at every moment."""
    pairs = []
    for i in range(len(shapes)):
        for j in range(i + 1, len(shapes)):
            distance = np.linalg.norm(shapes[i].centre_T2 - shapes[j].centre_T2, axis=-1)
            reach = shapes[i].radius + shapes[j].radius
            if (distance <= 0.8 * reach).all():
                pairs.append((i, j))
            elif (distance < 1.2 * reach).any():
                return []
    return pairs
