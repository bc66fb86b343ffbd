"""Settings of XMem: the run-time options under their published names, and the network's dimensions. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class XMemDims:
    """Channels and depths of the network; the defaults are those of the published checkpoints.

    A checkpoint's own dimensions are read from its weights, so this is needed only to make a network of another size.
    """

    key: int = field(default=64, metadata={"help": "Channels of keys and selections.", "min": 1})
    value: int = field(default=512, metadata={"help": "Channels of values.", "min": 1})
    hidden: int = field(default=64, metadata={"help": "Channels of the sensory memory; 0 leaves it out.", "min": 0})
    key_planes: tuple[int, int, int] = field(
        default=(64, 128, 256),
        metadata={"help": "Inner channels of the key encoder's stages (outputs have 4 times as many); the first is the stem's too."},
    )
    key_blocks: tuple[int, int, int] = field(default=(3, 4, 6), metadata={"help": "Bottleneck blocks in each stage of the key encoder."})
    value_planes: tuple[int, int, int] = field(default=(64, 128, 256), metadata={"help": "Channels of the value encoder's stages; the first is the stem's too."})
    value_blocks: tuple[int, int, int] = field(default=(2, 2, 2), metadata={"help": "Basic blocks in each stage of the value encoder."})
    decoder: tuple[int, int, int] = field(default=(512, 256, 256), metadata={"help": "Channels of the decoder at strides 16, 8 and 4."})
    update: int = field(default=256, metadata={"help": "Channels in which the decoder's scales meet before a light update.", "min": 1})

    def __post_init__(self) -> None:
        for name, least in (("key", 1), ("value", 1), ("hidden", 0), ("update", 1)):
            _at_least(f"xmem.dims.{name}", getattr(self, name), least)
        for name in ("key_planes", "key_blocks", "value_planes", "value_blocks", "decoder"):
            triple = tuple(getattr(self, name))
            if len(triple) != 3:
                raise ValueError(f"xmem.dims.{name} needs three numbers, one a scale; got {triple}")
            for number in triple:
                _at_least(f"xmem.dims.{name}", number, 1)
            object.__setattr__(self, name, triple)


@dataclass
class XMemConfig:
    """What the tracker does with a network. Names and defaults are those of XMem's evaluation program.

    Raises ValueError where a value is out of its range, naming it and the range.
    """

    mem_every: int = field(default=5, metadata={"help": "Every so many frames one enters the memory.", "min": 1})
    deep_update_every: int = field(default=-1, metadata={"help": "Frames between deep updates of the sensory memory; below 0: exactly on memory frames."})
    top_k: int = field(default=30, metadata={"help": "Memory elements that each position reads.", "min": 1})
    enable_long_term: bool = field(default=True, metadata={"help": "Consolidate the working memory; without it memory grows with the video."})
    enable_long_term_count_usage: bool = field(default=True, metadata={"help": "Count how much long-term elements are read, which eviction needs."})
    max_mid_term_frames: int = field(default=10, metadata={"help": "Frames in working memory at which it is consolidated.", "min": 3})
    min_mid_term_frames: int = field(default=5, metadata={"help": "Frames in working memory after consolidation.", "min": 2})
    num_prototypes: int = field(default=128, metadata={"help": "Elements that a consolidation adds to long-term memory.", "min": 1})
    max_long_term_elements: int = field(default=10000, metadata={"help": "Most elements in long-term memory.", "min": 1})
    compatible: bool = field(
        default=True,
        metadata={"help": "Pair keys and values of objects that arrive late as the published program does; false gives each arrival keys of its own."},
    )
    objects_per_batch: int = field(
        default=0,
        metadata={"help": "Most objects that run through the networks at a time, which bounds activations; 0: 16, or 1 on a CPU, whose cache holds no more.", "min": 0},
    )
    dims: XMemDims | None = field(default=None, metadata={"help": "Dimensions that a checkpoint must have; none: whatever its weights have."})

    def __post_init__(self) -> None:
        least_of = dict(mem_every=1, top_k=1, min_mid_term_frames=2, num_prototypes=1, max_long_term_elements=1, objects_per_batch=0)
        for name, least in least_of.items():
            _at_least(f"xmem.{name}", getattr(self, name), least)
        if self.max_mid_term_frames <= self.min_mid_term_frames:
            raise ValueError(f"xmem.max_mid_term_frames must be above xmem.min_mid_term_frames ({self.min_mid_term_frames}); got {self.max_mid_term_frames}")
        if self.max_long_term_elements < self.num_prototypes:
            raise ValueError(f"xmem.max_long_term_elements must be at least xmem.num_prototypes ({self.num_prototypes}); got {self.max_long_term_elements}")


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}")
