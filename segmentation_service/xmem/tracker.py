"""Trackers: frames go in one at a time, with masks where there are some, and every object's mask on that frame comes out.

`XMemGroupTracker` carries many hypotheses about one video; `XMemTracker` is the case of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .config import XMemConfig
from .memory import XMemMemory
from .network import ImageFeatures, XMem
from .reading import at_least_float32, soft_aggregate

STRIDE = 16


class XMemGroupTracker:
    """Carries the objects of G hypotheses through one video in one pass; each gets what a tracker of its own would give it.

    What does not depend on masks (image features, keys, similarity, the choice and the counting of memory elements) is
    computed once. Values, sensory memory and decoder run over all objects of all hypotheses as one batch; only the soft
    aggregation, in which objects compete, stays within a hypothesis. This needs one rhythm: masks come on the same frames for all.

    network: on the device on which to run. Several trackers share its prepared form if they are given `network.for_inference()`.
    Not thread-safe.
    """

    def __init__(self, network: XMem, config: XMemConfig | None = None) -> None:
        self.config = config or XMemConfig()
        self.network = network.for_inference()
        weight = self.network.decoder.pred.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.objects_per_batch = self.config.objects_per_batch or (1 if self.device.type == "cpu" else 16)
        self.clear_memory()

    def clear_memory(self) -> None:
        """Forget the video, ready for the next one."""
        self.frame = -1
        self.last_memory_frame = 0
        self.last_deep_update = -max(0, self.config.deep_update_every)
        self.memory = XMemMemory(self.config)
        self.hidden_OChw: torch.Tensor | None = None
        self.places: list[torch.Tensor] = []
        """For each hypothesis, where its objects stand among all: those are in the order of arrival."""
        self.image_hw: tuple[int, int] | None = None

    @torch.no_grad()
    def step(
        self,
        image_3HW: torch.Tensor,
        masks: Sequence[torch.Tensor] | None = None,
        labels: Sequence[Sequence[int] | None] | None = None,
        end: bool = False,
    ) -> list[torch.Tensor]:
        """The next frame: probabilities (1 + n_g, H, W), background first, for each hypothesis g; they sum to 1.

        image_3HW: RGB, normalised by ImageNet's mean and deviation, of one size throughout a video. The first frame needs masks.
        masks: for each hypothesis (n_g, H, W) in [0, 1], one channel for every object known from now on: the objects known
        before, in their order, and then new ones. labels: for each hypothesis the objects (1 is the first) for which its mask
        is to be believed, None for all; known objects left out keep what was predicted, outside of the mask. end: the last
        frame, which need not be remembered. Raises ValueError, before anything is changed, where an argument does not fit.
        """
        masks, labels, whole = self._check(image_3HW, masks, labels)
        config, time = self.config, self.frame + 1
        is_memory_frame = (masks is not None or time - self.last_memory_frame >= config.mem_every) and not end
        segment = time > 0 and not whole
        if config.deep_update_every < 0:
            deep = is_memory_frame
        else:
            deep = not end and time - self.last_deep_update >= config.deep_update_every
        light = not end and (config.deep_update_every >= 0 or not deep)

        image_13HW = self._pad(image_3HW.to(self.device, self.dtype))[None]
        features = self.network.encode_image(image_13HW)
        probs = self._segment(features, light) if segment else None
        if masks is not None:
            probs = self._merge(masks, labels, probs)
            self._make_room([len(mask) for mask in masks], features)
        if is_memory_frame:
            self._remember(image_13HW, features, probs, deep)
            self.last_memory_frame = time
            if deep:
                self.last_deep_update = time
        self.frame, self.image_hw = time, tuple(image_3HW.shape[1:])
        left, _, top, _ = _margins(self.image_hw)
        height, width = self.image_hw
        return [p[:, top : top + height, left : left + width] for p in probs]

    def _segment(self, features: ImageFeatures, light: bool) -> list[torch.Tensor]:
        """Predict all objects from memory. Updates the sensory memory if `light`."""
        with torch.autocast(self.device.type, enabled=False):
            readout_OVhw = self.memory.read(features.key, features.selection)
        shared_parts = self.network.decoder.shared_parts(features)
        logits, hidden = [], []
        for readout, h in zip(self._batches(readout_OVhw), self._batches(self.hidden_OChw)):
            logits_N1hw, h = self.network.decoder(shared_parts, readout, h, light)
            logits.append(logits_N1hw)
            hidden.append(h)
        logits_O1hw = torch.cat(logits)
        self.hidden_OChw = torch.cat(hidden)
        probs = []
        for places in self.places:
            # Resolution first, then the sigmoid, then the competition: the other orders give other masks.
            full = F.interpolate(logits_O1hw[places], scale_factor=4, mode="bilinear", align_corners=False)
            probs.append(soft_aggregate(full[:, 0].sigmoid_()))
        return probs

    def _merge(self, masks: list[torch.Tensor], labels: list[set[int] | None], predicted: list[torch.Tensor] | None) -> list[torch.Tensor]:
        """Probabilities from given masks, and from predictions for the known objects whose masks are not to be believed."""
        probs = []
        for g, (mask, believed) in enumerate(zip(masks, labels)):
            mask_NHW = self._pad(mask.to(self.device, self.dtype))
            if predicted is not None and believed is not None:
                taken_HW = mask_NHW.sum(0) > 0.5
                mask_NHW = mask_NHW.clone()
                for o in range(len(self.places[g])):
                    if o + 1 not in believed:
                        mask_NHW[o] = predicted[g][o + 1].masked_fill(taken_HW, 0)
            probs.append(soft_aggregate(mask_NHW))
        return probs

    def _make_room(self, counts: list[int], features: ImageFeatures) -> None:
        """Number new objects after all known ones, with an empty sensory memory."""
        known = total = sum(map(len, self.places))
        self.places = self.places or [torch.empty(0, dtype=torch.long, device=self.device) for _ in counts]
        for g, count in enumerate(counts):
            new = count - len(self.places[g])
            self.places[g] = torch.cat([self.places[g], torch.arange(total, total + new, device=self.device)])
            total += new
        empty = features.key.new_zeros((total - known, self.network.dims.hidden, *features.key.shape[2:]))
        self.hidden_OChw = empty if self.hidden_OChw is None else torch.cat([self.hidden_OChw, empty])

    def _remember(self, image_13HW: torch.Tensor, features: ImageFeatures, probs: list[torch.Tensor], deep: bool) -> None:
        """Encode all objects' masks and write the frame to memory. Updates the sensory memory if `deep`."""
        masks_O2HW = image_13HW.new_empty((len(self.hidden_OChw), 2, *image_13HW.shape[2:]))
        for places, p in zip(self.places, probs):
            masks_O2HW[places, 0] = p[1:]
            masks_O2HW[places, 1] = p[1:].sum(0) - p[1:]
        shared_parts = self.network.value_encoder.shared_parts(image_13HW, features.f16)
        values, hidden = [], []
        for masks, h in zip(self._batches(masks_O2HW), self._batches(self.hidden_OChw)):
            value_NVhw, h = self.network.value_encoder(shared_parts, masks, h, deep)
            values.append(value_NVhw)
            hidden.append(h)
        self.hidden_OChw = torch.cat(hidden)
        with torch.autocast(self.device.type, enabled=False):
            self.memory.write(features.key, features.shrinkage, features.selection, at_least_float32(torch.cat(values)))

    def _batches(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.split(self.objects_per_batch)

    def _pad(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, _margins(x.shape[-2:]))

    def _check(self, image, masks, labels) -> tuple[list[torch.Tensor] | None, list[set[int] | None] | None, bool]:
        """Masks as tensors, labels as sets, and whether these masks leave nothing to predict."""
        if not isinstance(image, torch.Tensor) or not image.is_floating_point() or image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ValueError(f"an image is a normalised float tensor (3, H, W); got {_kind(image)}")
        hw = tuple(image.shape[1:])
        if self.image_hw not in (None, hw):
            raise ValueError(f"all frames of a video have one size; got {hw} after {self.image_hw}. Call clear_memory() before another video")
        if masks is None:
            if labels is not None:
                raise ValueError(f"labels say which masks to believe, and there are none; got labels {labels}")
            if self.frame < 0:
                raise ValueError("the first frame needs the masks of the objects to track; got none")
            if self.memory.objects < sum(map(len, self.places)):
                raise ValueError("the frame that brought the masks was given with end=True, so nothing of it is remembered; call clear_memory() and start again")
            return None, None, False
        masks = list(masks)
        labels = [None] * len(masks) if labels is None else list(labels)
        if not masks or len(labels) != len(masks) or (self.places and len(masks) != len(self.places)):
            known = f" of {len(self.places)}" if self.places else ""
            raise ValueError(f"each hypothesis{known} has masks and, if any is given, labels; got {len(masks)} masks and {len(labels)} labels")
        for g, mask in enumerate(masks):
            known = len(self.places[g]) if self.places else 1
            if not isinstance(mask, torch.Tensor) or mask.ndim != 3 or tuple(mask.shape[1:]) != hw:
                raise ValueError(f"a mask is a tensor (objects, H, W) of the image's size {hw}; got {_kind(mask)}")
            if len(mask) < known:
                raise ValueError(f"a mask needs a channel for each of at least {known} objects, the known ones included; got {len(mask)}")
            if mask.is_floating_point() and not (mask.min() >= 0 and mask.max() <= 1):
                raise ValueError(f"a mask lies between 0 and 1; got values from {float(mask.min()):g} to {float(mask.max()):g}")
            if not mask.is_floating_point():
                masks[g] = mask != 0
            if labels[g] is not None:
                labels[g] = {int(label) for label in labels[g]}
                strange = sorted(label for label in labels[g] if not 1 <= label <= len(mask))
                if strange:
                    raise ValueError(f"labels are numbers of objects, 1 to {len(mask)} here; got {strange}")
        whole = {believed is not None and len(believed) == len(mask) for mask, believed in zip(masks, labels)}
        if len(whole) > 1 and self.frame >= 0:
            raise ValueError("labels name all objects of some hypotheses and not of others, which then would count the use of memory differently; track them apart")
        return masks, labels, whole == {True}


class XMemTracker:
    """Carries the objects of one hypothesis through a video: `XMemGroupTracker` with G = 1."""

    def __init__(self, network: XMem, config: XMemConfig | None = None) -> None:
        self.group = XMemGroupTracker(network, config)

    @property
    def memory(self) -> XMemMemory:
        return self.group.memory

    def clear_memory(self) -> None:
        """Forget the video, ready for the next one."""
        self.group.clear_memory()

    def step(self, image: torch.Tensor, mask: torch.Tensor | None = None, labels: Sequence[int] | None = None, end: bool = False) -> torch.Tensor:
        """The next frame: probabilities (1 + n, H, W), background first; the best channel is the mask's index.

        image: normalised RGB (3, H, W). mask: (n, H, W) in [0, 1] with a channel for each object known from now on. labels: the
        objects (1 to n) for which the mask is to be believed, None for all. More, and the errors, under `XMemGroupTracker.step`.
        """
        return self.group.step(image, None if mask is None else [mask], None if labels is None else [labels], end)[0]


def _margins(hw: Sequence[int]) -> tuple[int, int, int, int]:
    """Zeros to put left, right, above and below, so that both sides are multiples of 16; the odd one goes right or below."""
    height, width = (-side % STRIDE for side in hw)
    return width // 2, width - width // 2, height // 2, height - height // 2


def _kind(x) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
