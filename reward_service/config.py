"""RewardConfig: which terms count, with which thresholds and weights, and where each default comes from."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Optional

from reward_service.own_terms import OwnTerm

FORMULAS = ("videoseg_r1", "seg_zero", "vision_reasoner", "pixelthink", "veason_r1", "revseg")

# Where defaults come from; named in each field's metadata and in docs/rewards.md.
PAPER = "VideoSeg-R1 paper, section on rewards"
VISION_REASONER = "VisionReasoner, vision_reasoner.py (the base VideoSeg-R1 declares)"
PIXELTHINK = "PixelThink, seg_pixelthink.py"
SEG_ZERO = "Seg-Zero, seg_restrict.py"
OURS = "ours (the paper is silent)"


def option(default, help, source, min=None, max=None, choices=None):
    metadata = {"help": help, "source": source}
    metadata |= {k: v for k, v in (("min", min), ("max", max), ("choices", choices)) if v is not None}
    return field(default=default, metadata=metadata)


def weight(default, help, source):
    return option(default, f"weight of the term: {help}", source, min=0.0)


def grading(what):
    return option("threshold", f"{what}: 0/1 at the threshold, or graded", OURS, choices=("threshold", "graded"))


@dataclass
class TermWeights:
    """One weight a term; 0 switches the term off, and then it needs no input."""

    think_format: float = weight(1.0, "think and answer blocks are in place (0..1)", VISION_REASONER)
    segmentation_format: float = weight(1.0, "the answer is well-formed JSON (0..2)", VISION_REASONER)
    iou: float = weight(1.0, "overlap of matched objects (0..1)", VISION_REASONER)
    box_l1: float = weight(1.0, "corner distance of matched boxes (0..1)", VISION_REASONER)
    point: float = weight(1.0, "distance of matched points (0..1)", VISION_REASONER)
    negative_point: float = weight(1.0, "negative points close to, not on, the target (0..1)", PAPER + "; placement ours")
    no_repeat: float = weight(1.0, "no sentence said again and again (0..1)", VISION_REASONER)
    mask_iou: float = weight(0.0, "IoU of the union of SAM2's masks on the target frame (0..1)", OURS)
    video_quality: float = weight(0.0, "J, F or J&F of the union of the propagated masks over the annotated frames (0..1)", OURS)
    temporal_consistency: float = weight(0.0, "propagated masks change from frame to frame as the true ones do (0..1)", OURS)
    keyframe: float = weight(0.0, "area of the target on the frame chosen (0..1; veason_r1, revseg)", "Veason-R1, ReVSeg")
    video_iou: float = weight(0.0, "mean mask IoU over the shown frames (0..1; veason_r1)", "Veason-R1")


@dataclass
class LengthConfig:
    """Soft length penalty: reward x clamp(1 - beta * max(0, used - budget), floor, 1), budget by difficulty."""

    penalty: bool = option(True, "multiply the reward by the length penalty", PAPER)
    unit: str = option(
        "think_tokens",
        "what `length` counts; words are counted here when no length is passed, tokens must be passed",
        PAPER + " (reasoning tokens)",
        choices=("think_tokens", "response_tokens", "think_words", "words"),
    )
    beta: float = option(1 / 500, "penalty per unit over the budget", PIXELTHINK, min=0.0)
    budget_scale: float = option(1.0, "multiplies every budget (small for toy policies; raise beta alike)", OURS, min=0.0)
    easy_budget: Optional[float] = option(96.0, "budget below easy_below; null: no limit", PIXELTHINK, min=0.0)
    medium_budget: Optional[float] = option(176.0, "budget in between; null: no limit", OURS + ", midway", min=0.0)
    hard_budget: Optional[float] = option(256.0, "budget from hard_from on; null: no limit", PIXELTHINK, min=0.0)
    easy_below: float = option(3.5, "difficulties below this are easy", PIXELTHINK)
    hard_from: float = option(5.0, "difficulties from this on are hard", PIXELTHINK)
    uncertainty_scale: float = option(0.0, "added to the hard budget per unit of uncertainty", "paper has no such term", min=0.0)
    default_difficulty: float = option(3.0, "difficulty when none is given", PIXELTHINK)
    clamp: bool = option(True, "keep the penalty at or above the floor; false: the paper's formula as written", OURS)
    floor: float = option(0.0, "smallest penalty factor", PIXELTHINK, min=0.0, max=1.0)


@dataclass
class RewardConfig:
    """Everything a reward depends on besides completion and target. The defaults are the preset `videoseg_r1`.

    Raises ValueError on a value outside its range or a setting that the chosen formula does not know.
    """

    formula: str = option("videoseg_r1", "whose rules apply; usually set by a preset", PAPER, choices=FORMULAS)
    weights: TermWeights = field(default_factory=TermWeights, metadata={"help": "one weight a term"})
    length: LengthConfig = field(default_factory=LengthConfig, metadata={"help": "soft length penalty"})
    own_terms: list[OwnTerm] = field(
        default_factory=list, metadata={"help": "terms of your own besides: [{function: package.module:name, weight: 1}], each (answer, target) -> 0..1", "source": OURS}
    )

    iou_threshold: float = option(0.5, "an IoU counts above this, strictly", VISION_REASONER, min=0.0, max=1.0)
    box_l1_threshold: float = option(10.0, "a box counts when its mean corner distance is below this", VISION_REASONER, min=0.0)
    point_threshold: float = option(30.0, "a point counts when its distance is below this", VISION_REASONER, min=0.0)
    negative_reach: float = option(40.0, "a negative point counts when 0 < L1 distance <= this", PAPER + " (tau_neg)", min=0.0)
    mask_iou_threshold: float = option(0.5, "the mask_iou term counts above this, strictly", OURS, min=0.0, max=1.0)
    video_quality_threshold: float = option(0.5, "the video_quality term counts above this, strictly", OURS, min=0.0, max=1.0)

    accuracy_iou: str = option(
        "box",
        "overlap in the iou term: boxes, SAM2's masks on the target frame, or those masks propagated: mean J over the annotated frames",
        VISION_REASONER,
        choices=("box", "mask", "video"),
    )
    video_measure: str = option(
        "jf", "what video_quality is, a mean over the annotated frames: j (region), f (boundary), or jf (the mean of both)", OURS, choices=("j", "f", "jf")
    )
    iou_grading: str = grading("iou")
    box_l1_grading: str = grading("box_l1")
    point_grading: str = grading("point")
    negative_grading: str = grading("negative_point")
    mask_iou_grading: str = grading("mask_iou")
    video_quality_grading: str = grading("video_quality")
    graded_reach: float = option(4.0, "a graded distance falls from 1 to 0 at this many thresholds", OURS, min=1.0)

    space: str = option(
        "normalised",
        "where distances are measured: both axes mapped to 0..space_size, or raw pixels of the policy's image",
        OURS + ": equals the published code on its square images",
        choices=("normalised", "raw"),
    )
    space_size: int = option(840, "side of the normalised space", "Seg-Zero, VisionReasoner: images of 840x840", min=1)
    max_objects: int = option(120, "objects of an answer that are matched", VISION_REASONER, min=1, max=120)
    max_repeats: int = option(2, "repeated sentences that forfeit no_repeat", VISION_REASONER, min=1)
    no_repeat_scope: str = option(
        "response", "text that no_repeat reads: all of it, or the reasoning only", VISION_REASONER, choices=("response", "think")
    )
    strict_keys: bool = option(True, "seg_zero, pixelthink: exact key names (false: Seg-Zero's loose seg.py)", SEG_ZERO)

    def __post_init__(self):
        _check_ranges(self, "reward")
        if self.length.hard_from < self.length.easy_below:
            raise ValueError(
                f"reward.length.hard_from={self.length.hard_from} is below easy_below={self.length.easy_below}; raise it"
            )
        _check_known(self, _preset_module(self.formula))
        names = [term.name for term in self.own_terms]
        taken = {f.name for f in fields(TermWeights)} | {"original", "length_penalty"}
        if clash := [name for name in names if name in taken or names.count(name) > 1]:
            raise ValueError(f"reward.own_terms: {clash[0]} is the name of another term; rename the function")

    @classmethod
    def preset(cls, name: str) -> "RewardConfig":
        """The published settings of one system: videoseg_r1, seg_zero, vision_reasoner, pixelthink, veason_r1, revseg."""
        if name not in FORMULAS:
            close = difflib.get_close_matches(name, FORMULAS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"no reward preset {name!r}{hint} Known: {', '.join(FORMULAS)}")
        values = dict(_preset_module(name).CONFIG)
        off = {f.name: 0.0 for f in fields(TermWeights)}
        if "weights" in values:
            values["weights"] = TermWeights(**(off | values["weights"]))
        if "length" in values:
            values["length"] = LengthConfig(**values["length"])
        return cls(formula=name, **values)

    @property
    def mask_terms(self) -> tuple[str, ...]:
        """The active settings that need SAM2's masks of the answer on the target frame."""
        return self._active("mask_iou") + self._accuracy_by("mask")

    @property
    def video_terms(self) -> tuple[str, ...]:
        """The active settings that need propagated masks on every frame of `target.frames`."""
        return self._active("video_iou", "video_quality", "temporal_consistency") + self._accuracy_by("video")

    @property
    def needs_predicted_masks(self) -> bool:
        """True when `predicted_masks` must have SAM2's masks of the answer on the target frame."""
        return bool(self.mask_terms)

    @property
    def needs_video_masks(self) -> bool:
        """True when `predicted_masks` must be {frame id: masks}, with every frame of `target.frames`."""
        return bool(self.video_terms)

    def _active(self, *terms: str) -> tuple[str, ...]:
        return tuple(name for name in terms if getattr(self.weights, name) > 0)

    def _accuracy_by(self, overlap: str) -> tuple[str, ...]:
        return (f"accuracy_iou={overlap}",) if self.accuracy_iou == overlap and self.weights.iou > 0 else ()

    @property
    def needs_length(self) -> bool:
        """True when the caller must count tokens and pass `length`."""
        return self.length.penalty and self.length.unit.endswith("tokens")

    @property
    def needs_uncertainty(self) -> bool:
        """True when `uncertainty` widens a budget; without one it counts as 0."""
        return self.length.penalty and self.length.uncertainty_scale > 0 and self.length.hard_budget is not None


def _preset_module(name):
    from importlib import import_module

    return import_module(f"reward_service.presets.{name}")


def _check_ranges(config, path):
    for f in fields(config):
        value, limits = getattr(config, f.name), f.metadata
        if is_dataclass(value):
            _check_ranges(value, f"{path}.{f.name}")
            continue
        if value is None:
            continue
        low, high, choices = limits.get("min"), limits.get("max"), limits.get("choices")
        if choices and value not in choices:
            raise ValueError(f"{path}.{f.name}={value!r}: choose one of {', '.join(map(repr, choices))}")
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            allowed = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ValueError(f"{path}.{f.name}={value!r}: must be {allowed}")


def _check_known(config, module):
    """A published formula takes only the settings it has: any other one changed from its default is an error."""
    for f in fields(TermWeights):
        if getattr(config.weights, f.name) and f.name not in module.MAXIMA:
            known = ", ".join(module.MAXIMA)
            raise ValueError(f"reward.weights.{f.name}: formula {config.formula!r} has no such term; it has {known}")
    for f in fields(RewardConfig):
        if module.SETTINGS is None or f.name in ("formula", "weights", "length", "own_terms", *module.SETTINGS):
            continue
        if getattr(config, f.name) != f.default:
            value = getattr(config, f.name)
            raise ValueError(f"reward.{f.name}={value!r}: formula {config.formula!r} does not use it; leave it at {f.default!r}")
