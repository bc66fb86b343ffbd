"""How a vision-language model is asked to rate a query's difficulty, and how its reply is read. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from cluster.errors import UserError

ASPECTS = {
    "scene_complexity": "how crowded the scene is, and how many things look like the target",
    "segmentation_challenge": "how hard the target's outline is to trace: small, thin, blurred, hidden or low in contrast",
    "temporal_ambiguity": "how much it takes several frames to tell which object is meant, or when it is there",
    "motion_complexity": "how much the target, other objects or the camera move",
    "linguistic_ambiguity": "how much reading, reasoning or knowledge the query needs before the target is clear",
}
# VideoSeg-R1 rates five aspects of a video, PixelThink three of an image. The wording is ours: neither prompt is public.
VARIANTS: Mapping[str, Sequence[str]] = {
    "videoseg_r1": tuple(ASPECTS),
    "pixelthink": ("scene_complexity", "segmentation_challenge", "linguistic_ambiguity"),
}


class BadReply(UserError):
    """A reply that holds no ratings."""


def rating_prompt(query: str, variant: str) -> str:
    """The text that goes with the frames."""
    names = VARIANTS[variant]
    aspects = "\n".join(f"- {name}: {ASPECTS[name]}" for name in names)
    example = json.dumps({name: 5 for name in names})
    return (
        "These are frames of one video, in order. Someone will be asked to segment, in every frame, what this query refers to:\n"
        f'"{query}"\n\n'
        "Rate how difficult that is in each of these aspects, independently of the others, from 1 (very easy) to 10 (very hard):\n"
        f"{aspects}\n\n"
        f"Reply with one JSON object and nothing else, for example {example}"
    )


def rating_schema(variant: str) -> dict:
    """JSON schema of a reply: an integer from 1 to 10 for each aspect, and nothing else."""
    names = list(VARIANTS[variant])
    rating = {"type": "integer", "enum": list(range(1, 11))}
    return {"type": "object", "properties": {name: rating for name in names}, "required": names, "additionalProperties": False}


def read_ratings(reply: str, variant: str) -> dict[str, float]:
    """The ratings of the last JSON object in the reply that has all of them; text round it, thoughts and code fences do no harm.

    Raises BadReply if there is none, or a rating is not a number from 1 to 10.
    """
    names, found = VARIANTS[variant], None
    at = reply.rfind("{")
    for _ in range(20):  # a reply has one or two objects; a flood of braces is not worth reading
        if at < 0 or found is not None:
            break
        try:
            value = json.JSONDecoder().raw_decode(reply, at)[0]
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict) and all(name in value for name in names):
            found = value
        at = reply.rfind("{", 0, at)
    if found is None:
        raise BadReply(f"no JSON object with {', '.join(names)} in the reply {reply[:200]!r}", "use a model that follows instructions")
    for name in names:
        rating = found[name]
        if isinstance(rating, bool) or not isinstance(rating, (int, float)) or not 1 <= rating <= 10:
            raise BadReply(f"{name}={rating!r} in a reply is not a number from 1 to 10", "use a model that follows instructions")
    return {name: float(found[name]) for name in names}


def difficulty_of(ratings: Mapping[str, float]) -> float:
    """D, the mean of the ratings: 1..10."""
    return sum(ratings.values()) / len(ratings)
