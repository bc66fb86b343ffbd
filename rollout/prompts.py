"""Prompts: a query and some frames become token ids and resized images, the same ones for vLLM and for the learner.

Frames go in as images with a label each. Every image is resized here, once, to a size that the processors leave alone
(a multiple of patch * merge on both axes), so the number of tokens is known before anything is generated and the policy's
coordinates refer to a size that we chose.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from PIL import Image

from rollout.banned_tokens import MEDIA_TOKENS

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


@dataclass
class PromptConfig:
    """What the policy is shown, and the words round it."""

    system: str = field(default="You are a helpful assistant.", metadata={"help": "System message; empty for none."})
    template: str = field(
        default="Frames of a video: {frames}Target frame: {target}\n" + ANSWER_FORMAT,
        metadata={"help": "User message. {query}, {frames} (labelled reference frames) and {target} (the target frame) are filled in."},
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
    max_tokens: int = field(default=8192, metadata={"help": "Longest prompt; a longer one is an error, never cut.", "min": 1})


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
        self.patch = model.vision_config.patch_size
        self.merge = model.vision_config.spatial_merge_size

    @cached_property
    def image_pad_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(IMAGE_PAD)

    def chat(self, system: str, user: str) -> str:
        """The chat as text, generation prompt included; `user` holds an `IMAGE` for each image."""
        messages = [{"role": "system", "content": system}] if system else []
        return self.tokenizer.apply_chat_template([*messages, {"role": "user", "content": user}], tokenize=False, add_generation_prompt=True)

    def encode(self, text: str, images: Sequence[np.ndarray]) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Token ids with a pad per image, token ids with a pad per visual token (int32, P), and grid_thw of images that are at size."""
        grid_thw = np.array([[1, h // self.patch, w // self.patch] for h, w, _ in (image.shape for image in images)], np.int64)
        short_ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return short_ids, expand_pads(short_ids, self.image_pad_id, grid_thw.prod(1) // self.merge**2), grid_thw


def check_query(episode_id: str, query: str) -> None:
    """Raises `PromptError` if a query holds a media token."""
    if any(token in query for token in MEDIA_TOKENS):
        raise PromptError(f"episode {episode_id}: the query {query!r} holds a media token")


class PromptBuilder(ImageChat):
    """Builds prompts for one policy (tokenizer, chat template, patch geometry) under one `PromptConfig`."""

    def __init__(self, policy_path: str, config: PromptConfig):
        super().__init__(policy_path)
        self.config = config
        for name in ("reference_size", "target_size"):
            size, step = getattr(config, name), self.patch * self.merge
            if len(size) != 2 or any(v <= 0 or v % step for v in size):
                raise PromptError(f"prompt.{name} = {list(size)}: two positive multiples of {step} (height, width) are needed")

    def render(self, query: str, frame_ids: Sequence[int], target_frame: int, fps: float) -> str:
        """The chat as text, generation prompt included, one image pad per image."""
        label = lambda order, t: self.config.frame_label.format(index=t, seconds=t / fps, order=order)
        frames = "".join(label(order, t) + IMAGE for order, t in enumerate(frame_ids, 1))
        target = label(len(frame_ids) + 1, target_frame) + IMAGE
        return self.chat(self.config.system, self.config.template.format(query=query, frames=frames, target=target))

    def build(
        self, episode_id: str, query: str, frames: Mapping[int, np.ndarray], frame_ids: Sequence[int], target_frame: int, fps: float = 1.0
    ) -> Prompt:
        """The prompt that shows `frame_ids` and the target frame.

        `frames` maps frame ids to uint8 (H, W, 3) pictures of the original size. Raises `PromptError` if the prompt is
        longer than `max_tokens`, or a query holds a media token.
        """
        check_query(episode_id, query)
        text = self.render(query, frame_ids, target_frame, fps)
        images = [resize(frames[t], self.config.reference_size) for t in frame_ids]
        images.append(resize(frames[target_frame], self.config.target_size))
        short_ids, token_ids, grid_thw = self.encode(text, images)
        if len(token_ids) > self.config.max_tokens:
            raise PromptError(
                f"episode {episode_id}: the prompt has {len(token_ids)} tokens, more than prompt.max_tokens = {self.config.max_tokens}; "
                "show fewer or smaller frames, or raise the limit"
            )
        return Prompt(
            episode_id=episode_id,
            text=text,
            token_ids=token_ids,
            vllm_token_ids=tuple(short_ids),
            images=tuple(images),
            grid_thw=grid_thw,
            frame_ids=tuple(int(t) for t in frame_ids),
            target_frame=int(target_frame),
            policy_hw=tuple(self.config.target_size),
            frame_hw=frames[target_frame].shape[:2],
            units=self.units,
            fingerprint=fingerprint(token_ids, images),
        )


def expand_pads(short_ids: Sequence[int], pad_id: int, counts: Sequence[int]) -> np.ndarray:
    """Every pad id repeated as often as its image has visual tokens: int32 (P,)."""
    short_ids = np.asarray(short_ids, np.int32)
    repeats = np.ones(len(short_ids), np.int64)
    if (short_ids == pad_id).sum() != len(counts):
        raise PromptError(f"the text holds {(short_ids == pad_id).sum()} image pads for {len(counts)} images")
    repeats[short_ids == pad_id] = counts
    return np.repeat(short_ids, repeats)
