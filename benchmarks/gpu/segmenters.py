"""SAM2 and XMem on the device: what they answer there against float32 on the CPU, and how many frames a second they take."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch

import random_models
from memory import peak
from segmentation import Moving
from side_by_side import in_turns
from segmentation_service.config import PropagationConfig
from segmentation_service.masks import mask_iou, mask_to_box, mask_to_point
from segmentation_service.propagation import Propagator
from segmentation_service.propagation_xmem import XMemMethod
from segmentation_service.prompts import ObjectPrompt
from segmentation_service.sam2_transformers import TransformersSam2
from segmentation_service.video import FramesInMemory

PRECISIONS = ("float32", "bfloat16")
GROUP = 8
SHORT_SIDE = {"toy": 144, "full": 480}


def numerics(size: str, device: str) -> Iterator[tuple[str, dict]]:
    """Trained toys, whose masks are masks, and at full size also networks of published sizes, whose masks are noise near the edge."""
    for which in dict.fromkeys(("toy", size)):
        for name, answer in (("sam2", sam2_answer), ("xmem", xmem_answer)):
            values, masks = answer(which, "cpu", "float32")
            found = {}
            for dtype in PRECISIONS:
                if (device, dtype) != ("cpu", "float32"):
                    there, there_masks = answer(which, device, dtype)
                    difference = (there - values).abs()
                    ious = [mask_iou(a, b) for a, b in zip(there_masks, masks)]
                    found[f"{device} {dtype}"] = {
                        "largest": float(f"{difference.max():.3g}"), "mean": float(f"{difference.mean():.3g}"), "iou_mean": round(float(np.mean(ious)), 4), "iou_least": round(min(ious), 4),
                    }  # fmt: skip
            spread = {"values": "mask logits" if name == "sam2" else "probabilities", "deviation": round(float(values.std()), 3), "share_in_masks": round(float(masks.mean()), 3)}
            yield f"{name} {which}", spread | {"against cpu float32": found}


def sam2_answer(size: str, device: str, dtype: str) -> tuple[torch.Tensor, np.ndarray]:
    """Of a group's prompts on one frame: mask logits as the decoder gives them, and masks at the frame's size."""
    backend, seen = TransformersSam2(*random_models.sam2(size), device, getattr(torch, dtype)), []
    backend.model.mask_decoder.register_forward_hook(lambda module, given, output: seen.append(output[0].float().cpu()))
    frame, prompts = asked(size)
    masks = backend.decode(backend.encode(frame), prompts)
    return torch.cat(seen, 1), masks


def asked(size: str) -> tuple[np.ndarray, list[ObjectPrompt]]:
    """A frame, and a box and a point for each of the group."""
    video = Moving(1, random_models.HW[size], GROUP)
    return video.frame(0), [ObjectPrompt(tuple(mask_to_box(mask)), (tuple(mask_to_point(mask)),), (1,)) for mask in video.masks(0)]


def xmem_answer(size: str, device: str, dtype: str) -> tuple[torch.Tensor, np.ndarray]:
    """Of one object through four frames: its probabilities, and its masks."""
    video = Moving(5, random_models.HW[size])
    method = XMemMethod(random_models.xmem(size).to(device), PropagationConfig(size=SHORT_SIDE[size], dtype=dtype))
    tracker = method.start(video.frame(0), [video.masks(0)])
    probabilities = torch.stack([tracker.step(video.frame(i))[0].float().cpu() for i in range(1, len(video))])
    return probabilities[:, 1], (probabilities.argmax(1) == 1).numpy()


def sam2_speed(size: str, device: str) -> Iterator[tuple[str, dict]]:
    """Frames encoded a second, and groups of eight prompts decoded a second, from arrays to arrays."""
    frame, prompts = asked(size)
    model, processor = random_models.sam2(size)
    for dtype in PRECISIONS:
        backend = TransformersSam2(copy.deepcopy(model), processor, device, getattr(torch, dtype))
        embedding = backend.encode(frame)
        runs = {"encode": lambda: _waited(backend.encode(frame), device), "decode": lambda: backend.decode(embedding, prompts)}
        times = _timed(runs, size)
        yield dtype, {"frames_encoded_per_second": _per_second(1, times["encode"]), "groups_decoded_per_second": _per_second(1, times["decode"]), "times": times} | peak(device)


def xmem_speed(size: str, device: str) -> Iterator[tuple[str, dict]]:
    """Frames a second of a clip, as `propagate` gives its masks: one object, three, and the one object of eight hypotheses."""
    frames = 24 if size == "full" else 6
    network = random_models.xmem(size).to(device)
    videos = {n: Moving(frames, random_models.HW[size], n) for n in (1, 3, GROUP)}
    clips = {n: FramesInMemory([video.frame(i) for i in range(frames)]) for n, video in videos.items()}
    given = {"1 object": (1, [videos[1].masks(0)]), "3 objects": (3, [videos[3].masks(0)]), "8 hypotheses": (GROUP, [mask[None] for mask in videos[GROUP].masks(0)])}
    for dtype in PRECISIONS:
        propagator = Propagator(network, PropagationConfig(size=SHORT_SIDE[size], dtype=dtype))
        runs = {name: lambda n=n, masks=masks: sum(1 for _ in propagator.propagate(clips[n], 0, masks)) for name, (n, masks) in given.items()}
        times = _timed(runs, size)
        yield dtype, {"frames_per_second": {name: _per_second(frames - 1, time) for name, time in times.items()}, "times": times} | peak(device)


def _timed(runs: dict, size: str) -> dict[str, dict]:
    with torch.inference_mode():
        return in_turns(runs, 5 if size == "full" else 2)


def _per_second(count: int, time: dict) -> float:
    return round(count / max(time["seconds"], 1e-4), 2)


def _waited(result: object, device: str) -> object:
    if device == "cuda":
        torch.cuda.synchronize()
    return result
