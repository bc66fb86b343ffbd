"""Prompts: a query and some frames become token ids and resized images, the same ones for vLLM and for the learner.

Frames go in as images with a label each. Every image is resized here, once, to a size that the processors leave alone
(a multiple of patch * merge on both axes), so the number of tokens is known before a frame is decoded and the policy's
coordinates refer to a size that we chose. How the two families differ: docs/prompts.md.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Optional

import numpy as np
from PIL import Image

from rollout.banned_tokens import holds_media_token

IMAGE_PAD = "<|image_pad|>"
IMAGE = f"<|vision_start|>{IMAGE_PAD}<|vision_end|>"
UNITS = {"qwen2_5_vl": "pixels", "qwen3_vl": "relative_1000"}

ANSWER_FORMAT = (
    'Find "{query}" in the target frame. Compare the objects over time, and reason inside <think> </think>. Then give one '
    "tight box, one point inside and one point just outside of each object as JSON inside <answer> </answer>, in this form: "
    '<think>reasoning</think><answer>[{{"bbox_2d": [x1, y1, x2, y2], "point_2d": [x, y], "negative_point_2d": [x, y]}}]</answer>'
)


class PromptError(ValueError):
    """A prompt that cannot be built as configured; the message names the value and the remedy."""


class PromptTooLong(PromptError):
    """One episode's prompt has more than `max_tokens` tokens; others may fit."""


@dataclass
class PromptConfig:
    """What the policy is shown, and the words round it."""

    system: str = field(default="You are a helpful assistant.", metadata={"help": "System message; empty for none."})
    template: str = field(
        default="Frames of a video: {frames}Target frame: {target}\n" + ANSWER_FORMAT,
        metadata={"help": "User message. {query}, {frames} (labelled reference frames) and {target} (the target frame) are filled in."},
    )
    frames_as: str = field(
        default="images", metadata={"help": "Kind of media that frames go in as; video is refused (docs/prompts.md).", "choices": ("images", "video")}
    )
    frame_label: str = field(
        default="{seconds:.1f}s: ", metadata={"help": "Text before every frame; {index}, {seconds} and {order} (1, 2, …) are filled in."}
    )
    reference_frames: int = field(default=4, metadata={"help": "Frames shown besides the target frame.", "min": 0, "max": 128})
    reference_size: list[int] = field(default_factory=lambda: [448, 448], metadata={"help": "Height and width of reference frames, pixels."})
    target_size: list[int] = field(
        default_factory=lambda: [840, 840],
        metadata={"help": "Height and width of the target frame, pixels; 840x840 in Seg-Zero and VisionReasoner."},
    )
    keep_aspect: bool = field(
        default=False,
        metadata={"help": "true: frames keep their proportions, resized by the processors' rule to at most the area of those sizes; false: exactly to those sizes."},
    )
    max_tokens: int = field(default=8192, metadata={"help": "Longest prompt; an episode with a longer one is left out and counted, never cut.", "min": 1})
    min_reference_tokens: Optional[int] = field(
        default=None,
        metadata={"help": "Reference frames of a prompt that is too long shrink, to no fewer visual tokens each than this; null: they do not.", "min": 1},
    )


@dataclass(frozen=True)
class PromptPlan:
    """What is known of a prompt before a frame is decoded: its length is `len(token_ids)`.

    `token_ids` (int32, P) has one id per visual token, `vllm_token_ids` a single pad per image; `sizes_hw` and `grid_thw` (int64,
    n x 3) are those of the images, the target frame last.
    """

    text: str
    token_ids: np.ndarray
    vllm_token_ids: tuple[int, ...]
    sizes_hw: tuple[tuple[int, int], ...]
    grid_thw: np.ndarray


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready for the engine and the learner.

    `token_ids` (int32, P) has one id per visual token; `vllm_token_ids` has a single pad per image, which vLLM expands.
    `images` are uint8 (H, W, 3) in the order of the prompt, the target frame last; `grid_thw` (int64, n x 3) counts patches.
    """

    episode_id: str
    text: str
    token_ids: np.ndarray
    vllm_token_ids: tuple[int, ...]
    images: tuple[np.ndarray, ...]
    grid_thw: np.ndarray
    frame_ids: tuple[int, ...]
    target_frame: int
    policy_hw: tuple[int, int]
    frame_hw: tuple[int, int]
    units: str
    fingerprint: str


def fingerprint(token_ids: np.ndarray, images: Sequence[np.ndarray]) -> str:
    """SHA-256 over the int32 token ids, then the int32 shape and the bytes of every image; hex."""
    digest = hashlib.sha256(np.ascontiguousarray(token_ids, "<i4").tobytes())
    for image in images:
        digest.update(np.asarray(image.shape, "<i4").tobytes())
        digest.update(np.ascontiguousarray(image))
    return digest.hexdigest()


def smart_size(size_hw: Sequence[int], step: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The (height, width) to which Qwen-VL's image processors resize a picture (`smart_resize` of Qwen2-VL): multiples of `step` near
    its own size, scaled down to `max_pixels` or up to `min_pixels` in all. Raises PromptError for proportions beyond 200:1, as they do."""
    height, width = size_hw
    if max(height, width) > 200 * min(height, width):
        raise PromptError(f"a frame of {height}x{width} pixels: the image processors refuse proportions beyond 200:1; leave the video out, or set prompt.keep_aspect=false")
    near = round(height / step) * step, round(width / step) * step
    if near[0] * near[1] > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        return max(step, math.floor(height / scale / step) * step), max(step, math.floor(width / scale / step) * step)
    if near[0] * near[1] < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        return math.ceil(height * scale / step) * step, math.ceil(width * scale / step) * step
    return near


def resize(frame_HW3: np.ndarray, size_hw: Sequence[int]) -> np.ndarray:
    """Bicubic with antialiasing, each axis on its own (as upstream resizes to 840x840): uint8 (h, w, 3)."""
    if frame_HW3.shape[:2] == tuple(size_hw):
        return frame_HW3
    return np.asarray(Image.fromarray(frame_HW3).resize((size_hw[1], size_hw[0]), Image.Resampling.BICUBIC))


class ImageChat:
    """Chats with images for one model: its tokenizer, chat template and patch geometry."""

    def __init__(self, model_path: str):
        from transformers import AutoConfig, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model_path)
        model = AutoConfig.from_pretrained(model_path)
        if model.model_type not in UNITS:
            raise PromptError(f"{model_path} is a {model.model_type!r} model; supported families: {', '.join(UNITS)}")
        self.units = UNITS[model.model_type]
        self.model_path, self.patch, self.merge = model_path, model.vision_config.patch_size, model.vision_config.spatial_merge_size
        self.step = self.patch * self.merge

    @cached_property
    def image_pad_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(IMAGE_PAD)

    def chat(self, system: str, user: str) -> str:
        """The chat as text, generation prompt included; `user` holds an `IMAGE` for each image."""
        messages = [{"role": "system", "content": system}] if system else []
        return self.tokenizer.apply_chat_template([*messages, {"role": "user", "content": user}], tokenize=False, add_generation_prompt=True)

    @cached_property
    def min_pixels(self) -> int:
        """The area to which the checkpoint's image processor enlarges smaller pictures."""
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(self.model_path).size["shortest_edge"]

    def plan_chat(self, text: str, sizes_hw: Sequence[tuple[int, int]]) -> PromptPlan:
        """The plan of a chat whose images have these sizes, in multiples of patch * merge."""
        grid_thw = np.array([[1, h // self.patch, w // self.patch] for h, w in sizes_hw], np.int64)
        short_ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        token_ids = expand_pads(short_ids, self.image_pad_id, grid_thw.prod(1) // self.merge**2)
        return PromptPlan(text, token_ids, tuple(short_ids), tuple(sizes_hw), grid_thw)


def check_query(episode_id: str, query: str) -> None:
    """Raises `PromptError` if a query holds a media token."""
    if holds_media_token(query):
        raise PromptError(f"episode {episode_id}: the query {query!r} holds a media token")


class PromptBuilder(ImageChat):
    """Builds prompts for one policy (tokenizer, chat template, patch geometry) under one `PromptConfig`."""

    def __init__(self, policy_path: str, config: PromptConfig):
        super().__init__(policy_path)
        self.config = config
        for name in ("reference_size", "target_size"):
            size = getattr(config, name)
            if len(size) != 2 or any(v <= 0 or v % self.step for v in size):
                near = [max(1, round(v / self.step)) * self.step for v in size[:2]]
                raise PromptError(f"prompt.{name} = {list(size)}: two positive multiples of {self.step} (height, width) are needed for {policy_path}, such as {near}")
        for name in ("system", "template", "frame_label"):
            if holds_media_token(getattr(config, name)):
                raise PromptError(f"prompt.{name} holds a media token; write {{frames}} and {{target}} in prompt.template where the frames go")
        if self.chat("", "").rstrip().endswith("<think>"):
            raise PromptError(f"the chat template of {policy_path} writes <think> itself, which the answer must begin with; use the Instruct checkpoint")

    def render(self, query: str, frame_ids: Sequence[int], target_frame: int, fps: float) -> str:
        """The chat as text, generation prompt included, one image pad per image."""
        label = lambda order, t: self.config.frame_label.format(index=t, seconds=t / fps, order=order)
        frames = "".join(label(order, t) + IMAGE for order, t in enumerate(frame_ids, 1))
        target = label(len(frame_ids) + 1, target_frame) + IMAGE
        return self.chat(self.config.system, self.config.template.format(query=query, frames=frames, target=target))

    def size_of(self, frame_hw: Sequence[int], size_hw: Sequence[int]) -> tuple[int, int]:
        """What a frame of the original size `frame_hw` is resized to where `size_hw` is configured."""
        if not self.config.keep_aspect:
            return size_hw[0], size_hw[1]
        area = size_hw[0] * size_hw[1]
        return smart_size(frame_hw, self.step, min(self.min_pixels, area), area)

    def plan(
        self, episode_id: str, query: str, frame_hw: Sequence[int], frame_ids: Sequence[int], target_frame: int, fps: float = 1.0
    ) -> PromptPlan:
        """Text, token ids and image sizes of the prompt that `build` makes, from the original size of the frames alone.

        Raises `PromptTooLong` past `max_tokens` (where `min_reference_tokens` is set, only if smaller reference frames do not
        help), `PromptError` if the query holds a media token.
        """
        check_query(episode_id, query)
        config, text = self.config, self.render(query, frame_ids, target_frame, fps)
        reference, target = self.size_of(frame_hw, config.reference_size), self.size_of(frame_hw, config.target_size)
        plan = self.plan_chat(text, [reference] * len(frame_ids) + [target])
        excess = len(plan.token_ids) - config.max_tokens
        if excess > 0 and frame_ids and config.min_reference_tokens is not None:
            tokens = lambda size_hw: size_hw[0] * size_hw[1] // self.step**2
            room = tokens(reference) - math.ceil(excess / len(frame_ids))
            smaller = smart_size(reference, self.step, 0, max(1, room) * self.step**2)
            if tokens(smaller) >= config.min_reference_tokens:
                plan = self.plan_chat(text, [smaller] * len(frame_ids) + [target])
        if len(plan.token_ids) > config.max_tokens:
            raise PromptTooLong(
                f"episode {episode_id}: the prompt has {len(plan.token_ids)} tokens, more than prompt.max_tokens = {config.max_tokens}; "
                "show fewer or smaller frames, let them shrink (prompt.min_reference_tokens), or raise the limit"
            )
        return plan

    def build(
        self, episode_id: str, query: str, frames: Mapping[int, np.ndarray], frame_ids: Sequence[int], target_frame: int, fps: float = 1.0
    ) -> Prompt:
        """The prompt that shows `frame_ids` and the target frame, as `plan` says, whose errors it raises.

        `frames` maps frame ids to uint8 (H, W, 3) pictures of the original size.
        """
        frame_hw = frames[target_frame].shape[:2]
        plan = self.plan(episode_id, query, frame_hw, frame_ids, target_frame, fps)
        images = tuple(resize(frames[t], size_hw) for t, size_hw in zip([*frame_ids, target_frame], plan.sizes_hw, strict=True))
        return Prompt(
            episode_id=episode_id,
            text=plan.text,
            token_ids=plan.token_ids,
            vllm_token_ids=plan.vllm_token_ids,
            images=images,
            grid_thw=plan.grid_thw,
            frame_ids=tuple(int(t) for t in frame_ids),
            target_frame=int(target_frame),
            policy_hw=plan.sizes_hw[-1],
            frame_hw=frame_hw,
            units=self.units,
            fingerprint=fingerprint(plan.token_ids, images),
        )


def expand_pads(short_ids: Sequence[int], pad_id: int, counts: Sequence[int]) -> np.ndarray:
    """Every pad id repeated as often as its image has visual tokens: int32 (P,)."""
    short_ids = np.asarray(short_ids, np.int32)
    repeats = np.ones(len(short_ids), np.int64)
    if (short_ids == pad_id).sum() != len(counts):
        raise PromptError(f"the text holds {(short_ids == pad_id).sum()} image pads for {len(counts)} images")
    repeats[short_ids == pad_id] = counts
    return np.repeat(short_ids, repeats)
