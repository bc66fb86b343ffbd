"""A picture of a data set for people to look at: queries, with frames on which their masks, boxes and points are drawn."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from rollout.episodes import Episode, read_episodes
from rollout.order import uniform_frames
from segmentation_service.overlay import draw_overlay, draw_points
from segmentation_service.video import read_frames

FRAMES, HEIGHT, WIDTH, MARGIN, CAPTION = 3, 180, 320, 8, 44
IGNORED = (128, 128, 128)


def write_sheet(paths: Sequence[Path], file: Path, count: int = 12) -> int:
    """Draws `count` episodes, spread evenly over the data sets, two side by side, to a PNG file; returns how many were drawn.

    Of each episode the first, the largest and the last view of its targets are shown.
    """
    total = sum(1 for path in paths for _ in read_episodes(path))
    wanted = set(uniform_frames(total, min(count, total)))
    chosen = [e for n, e in enumerate(e for path in paths for e in read_episodes(path)) if n in wanted]
    rows = -(-len(chosen) // 2)
    cell_w, cell_h = FRAMES * (WIDTH + MARGIN) + 2 * MARGIN, HEIGHT + CAPTION + 2 * MARGIN
    sheet = Image.new("RGB", (2 * cell_w, rows * cell_h), "white")
    for n, episode in enumerate(chosen):
        _draw(sheet, episode, n % 2 * cell_w + MARGIN, n // 2 * cell_h + MARGIN)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    sheet.save(part, format="PNG")
    part.replace(file)
    return len(chosen)


def _draw(sheet: Image.Image, episode: Episode, x: int, y: int) -> None:
    shown = shown_frames(episode)
    facts = [episode.episode_id, episode.query_type or "", f"targets: {len(episode.objects)}" if episode.annotated_frames else "truth not public"]
    facts += ["" if episode.difficulty is None else f"difficulty {episode.difficulty:.1f}", episode.suspect or ""]
    draw = ImageDraw.Draw(sheet)
    draw.text((x, y), textwrap.shorten(", ".join(filter(None, facts)), 140), "black", _font(12))
    draw.text((x, y + 18), textwrap.shorten(episode.query, 120), "black", _font(15))
    frames = read_frames(episode.video_path, shown)
    for n, t in enumerate(shown):
        tile = ImageOps.contain(Image.fromarray(drawn_frame(episode, t, frames[t])), (WIDTH, HEIGHT))
        at = (x + n * (WIDTH + MARGIN), y + CAPTION)
        sheet.paste(tile, at)
        known = "" if t in episode.annotated_frames else ", not annotated"
        draw.text((at[0] + 3, at[1] + 2), f"{t}{known}", "white", _font(12), stroke_width=2, stroke_fill="black")


def _font(size: int) -> ImageFont.FreeTypeFont:
    """One with letters of all European languages where the machine has it."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


def shown_frames(episode: Episode) -> list[int]:
    """The first and the last frame with a target and the one where targets are largest; spread frames where there is none."""
    area: dict[int, int] = {}
    for annotation in (a for o in episode.objects for a in o.annotations):
        area[annotation.frame] = area.get(annotation.frame, 0) + annotation.area
    if not area:
        return uniform_frames(episode.num_frames, FRAMES)
    return sorted({min(area), max(area, key=area.__getitem__), max(area)})


def drawn_frame(episode: Episode, t: int, frame_HW3: np.ndarray) -> np.ndarray:
    """The frame with ignored pixels grey, the targets' masks filled, and their boxes and points."""
    frame_HW3 = frame_HW3.copy()
    frame_HW3[episode.ignored(t)] = IGNORED
    visible = episode.visible(t)
    masks = episode.masks(t) if episode.has_masks else np.zeros((len(visible), *frame_HW3.shape[:2]), bool)
    return draw_points(draw_overlay(frame_HW3, list(masks), [a.box for a in visible]), [a.point for a in visible])
