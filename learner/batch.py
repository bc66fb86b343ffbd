"""Samples, the checks they must pass, and their collation into one packed micro-batch.

A micro-batch is one row of tokens without padding: [prompt 1, prompt 2, ..., completion 1, completion 2, ...], each prompt
once however many completions it has. A completion's last token predicts nothing, so it is not in the row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .patchify import PatchSpec, patchify
from .schedule import SampleSize
from .shared_prompt import SharedPromptLayout, shared_prompt_layout


class SampleError(ValueError):
    """A sample that cannot be trained on; the message names it and what is wrong."""


@dataclass(frozen=True)
class Sample:
    """One completion with its advantage. Completions of one group share `group`, the prompt and its images.

    prompt_ids int32 (P,), image pads expanded; response_ids int32 (R,), R >= 1, as sampled, stop token included;
    rollout_logprobs float32 (R,) as the engine reported them (after temperature and bans); images uint8 (H, W, 3), already
    of the policy's size; grid_thw int64 (n, 3); fingerprint: sha256 hex of ids and images where the prompt was made;
    advantage: one number, or one for each token (R,); truncated: it hit the response limit.
    """

    prompt_ids: np.ndarray
    response_ids: np.ndarray
    rollout_logprobs: np.ndarray
    images: tuple[np.ndarray, ...]
    grid_thw: np.ndarray
    group: int
    fingerprint: str
    advantage: float | np.ndarray = 0.0
    truncated: bool = False

    @property
    def size(self) -> SampleSize:
        """What it costs, for the schedule."""
        patches = int(np.prod(self.grid_thw, axis=1).sum()) if len(self.grid_thw) else 0
        return SampleSize(self.group, len(self.prompt_ids), len(self.response_ids), patches)


def prompt_fingerprint(prompt_ids: np.ndarray, images: Sequence[np.ndarray]) -> str:
    """SHA-256 hex over the ids as little-endian int32, then for each image its shape as int32 and its bytes."""
    digest = hashlib.sha256(np.ascontiguousarray(prompt_ids, "<i4").tobytes())
    for image in images:
        digest.update(np.asarray(image.shape, "<i4").tobytes())
        digest.update(np.ascontiguousarray(image))
    return digest.hexdigest()


def check_samples(samples: Sequence[Sample], banned_token_ids: Collection[int], media_tokens: tuple[int, int], merge: int) -> None:
    """Raise SampleError for what would train on something else than was sampled: wrong lengths, numbers that are not finite,
    banned ids in a response, visual tokens that do not match the images, a group whose prompts differ.

    media_tokens: ids of the image and the video placeholder. Cheap enough for every step; image bytes are not read here.
    """
    if not samples:
        raise SampleError("no samples; a step whose groups were all dropped must be skipped, not trained")
    banned = np.fromiter(banned_token_ids, np.int64, len(banned_token_ids))
    prompts: dict[int, Sample] = {}
    for i, s in enumerate(samples):
        where = f"sample {i} (group {s.group})"
        if len(s.response_ids) == 0 or len(s.prompt_ids) == 0:
            raise SampleError(f"{where} has {len(s.prompt_ids)} prompt and {len(s.response_ids)} response tokens; both must be positive")
        if len(s.rollout_logprobs) != len(s.response_ids):
            raise SampleError(f"{where} has {len(s.response_ids)} response tokens and {len(s.rollout_logprobs)} rollout log-probs")
        if np.shape(s.advantage) not in ((), (len(s.response_ids),)):
            raise SampleError(f"{where} has {len(s.response_ids)} response tokens and advantages of shape {np.shape(s.advantage)}; give one, or one a token")
        if not (np.isfinite(s.rollout_logprobs).all() and np.isfinite(s.advantage).all()):
            raise SampleError(f"{where} has a log-prob or an advantage ({s.advantage}) that is not finite")
        forbidden = np.isin(s.response_ids, banned)
        if forbidden.any():
            raise SampleError(f"{where}: the response holds the banned token id {int(s.response_ids[forbidden.argmax()])}; ban it in sampling")
        first = prompts.setdefault(s.group, s)
        if first is s:
            visual = int(np.isin(s.prompt_ids, media_tokens).sum())
            patches = int(np.prod(s.grid_thw, axis=1).sum()) if len(s.grid_thw) else 0
            if len(s.images) != len(s.grid_thw) or visual * merge**2 != patches:
                raise SampleError(
                    f"{where}: {len(s.images)} images, {len(s.grid_thw)} grids of {patches} patches, {visual} visual tokens in the prompt; "
                    f"{patches} patches need {patches // merge**2} tokens"
                )
        elif first.fingerprint != s.fingerprint:
            raise SampleError(f"{where}: its prompt is not that of the group's first sample (fingerprints differ)")


def check_fingerprints(samples: Sequence[Sample], indices: Collection[int]) -> None:
    """Recompute the fingerprint of each prompt among `indices` from what arrived. Raises SampleError if one differs."""
    seen: set[int] = set()
    for i in indices:
        s = samples[i]
        if s.group in seen:
            continue
        seen.add(s.group)
        found = prompt_fingerprint(s.prompt_ids, s.images)
        if found != s.fingerprint:
            raise SampleError(
                f"group {s.group}: prompt ids or images changed on the way to the learner (fingerprint {s.fingerprint[:12]} when it was "
                f"made, {found[:12]} here); the step would train on something the policy never saw"
            )


@dataclass(frozen=True)
class MicroBatch:
    """One packed micro-batch of N completions, T tokens in the row, M response tokens.

    input_ids (1, T), position_ids (3, 1, T); pixel_values (patches, width) and grid_thw (n, 3) or None without images;
    target_rows (M,): positions whose hidden state predicts a response token; target_ids (M,); sequence (M,): which completion
    a token is of; rollout_logprobs (M,), advantages (M,), lengths (N,) response tokens, truncated (N,) bool; indices: the
    samples, in order. features: the pictures' features, once a model whose vision tower does not learn has computed them.
    """

    input_ids: Tensor
    position_ids: Tensor
    pixel_values: Tensor | None
    grid_thw: Tensor | None
    layout: SharedPromptLayout
    target_rows: Tensor
    target_ids: Tensor
    sequence: Tensor
    rollout_logprobs: Tensor
    advantages: Tensor
    lengths: Tensor
    truncated: Tensor
    indices: tuple[int, ...]
    features: list = field(default_factory=list)


RopeIndex = Callable[[np.ndarray, np.ndarray], np.ndarray]


def collate(
    samples: Sequence[Sample], indices: Sequence[int], spec: PatchSpec, rope_index: RopeIndex, device="cpu", dtype=torch.float32
) -> MicroBatch:
    """Pack samples[i] for i in `indices` (at least one); completions of one group share their prompt.

    rope_index(prompt_ids (P,), grid_thw (n, 3)) -> M-RoPE positions (3, P): the model's own. A completion continues after
    the prompt's largest position, as text does. Everything is on `device`; pixels and the attention mask are of `dtype`.
    """
    chosen = [samples[i] for i in indices]
    number: dict[int, int] = {}
    prompts: list[Sample] = []
    for s in chosen:
        if s.group not in number:
            number[s.group] = len(prompts)
            prompts.append(s)
    prompt_of = np.array([number[s.group] for s in chosen])

    prompt_lengths = np.array([len(p.prompt_ids) for p in prompts])
    lengths = np.array([len(s.response_ids) for s in chosen])
    ends = np.cumsum(np.concatenate([prompt_lengths, lengths - 1]))
    prompt_ends, response_starts = ends[: len(prompts)], (ends - np.concatenate([prompt_lengths, lengths - 1]))[len(prompts) :]

    prompt_positions = [rope_index(p.prompt_ids, p.grid_thw) for p in prompts]
    next_position = np.array([int(positions.max()) + 1 for positions in prompt_positions])
    response_positions = [next_position[b] + np.arange(n - 1) for b, n in zip(prompt_of, lengths)]
    position_ids = np.concatenate(
        [np.concatenate(prompt_positions, 1), np.broadcast_to(np.concatenate(response_positions), (3, int((lengths - 1).sum())))], 1
    )
    # The prompt's last token predicts the first response token; every response token predicts the next one.
    target_rows = [np.concatenate([[prompt_ends[b] - 1], start + np.arange(n - 1)]) for b, start, n in zip(prompt_of, response_starts, lengths)]
    images = [image for p in prompts for image in p.images]
    pixel_values, grid_thw = patchify(images, spec, device, dtype) if images else (None, None)
    tensor = lambda array, kind: torch.from_numpy(np.ascontiguousarray(array, kind)).to(device)
    return MicroBatch(
        input_ids=tensor(np.concatenate([p.prompt_ids for p in prompts] + [s.response_ids[:-1] for s in chosen]), np.int64)[None],
        position_ids=tensor(position_ids, np.int64)[:, None],
        pixel_values=pixel_values,
        grid_thw=None if grid_thw is None else grid_thw.to(device),
        layout=shared_prompt_layout(prompt_lengths, lengths - 1, prompt_of, device, dtype),
        target_rows=tensor(np.concatenate(target_rows), np.int64),
        target_ids=tensor(np.concatenate([s.response_ids for s in chosen]), np.int64),
        sequence=tensor(np.repeat(np.arange(len(chosen)), lengths), np.int64),
        rollout_logprobs=tensor(np.concatenate([s.rollout_logprobs for s in chosen]), np.float32),
        advantages=tensor(np.concatenate([np.broadcast_to(s.advantage, len(s.response_ids)) for s in chosen]), np.float32),
        lengths=tensor(lengths, np.int64),
        truncated=tensor([s.truncated for s in chosen], np.bool_),
        indices=tuple(indices),
    )
