"""Models of published sizes with random weights, and what they are shown: nothing is downloaded. At toy size, the trained toys of examples/toy/models.

Weights are drawn so that numbers stay in range from layer to layer; what comes out means nothing, but depends on what goes in.
"""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from cluster.policy_size import PUBLISHED, published_config
from rollout.toy_data import ToyDataConfig, write_toy_data
from rollout.toy_world import WorldConfig

TOY = Path(__file__).resolve().parents[2] / "examples/toy/models"
POLICIES = {"3b": "Qwen/Qwen2.5-VL-3B-Instruct", "7b": "Qwen/Qwen2.5-VL-7B-Instruct"}
HW = {"toy": (96, 128), "full": (480, 854)}
"""Height and width of the videos."""
# sam2.1_hiera_l.yaml of Meta's package, where it differs from the defaults of transformers
SAM2_LARGE = dict(
    backbone_config=dict(
        hidden_size=144, num_attention_heads=2, blocks_per_stage=[2, 6, 36, 4], embed_dim_per_stage=[144, 288, 576, 1152], num_attention_heads_per_stage=[2, 4, 8, 16],
        window_size_per_stage=[8, 4, 16, 8], global_attention_blocks=[23, 33, 43], window_positional_embedding_background_size=[7, 7],
    ),
    backbone_channel_list=[1152, 576, 288, 144],
)  # fmt: skip


def policy(size: str, name: str, folder: Path, device: str) -> Path:
    """A folder in bfloat16, made where it is missing. Tokenizer, template and image processor are the toy's, all other sizes the published ones: words that the tokenizer
    does not have are never sampled."""
    if size == "toy":
        return TOY / "policy"

    def save(out: Path) -> None:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # which takes its memory of the GPU with it
            pool.submit(_save_policy, name, out, device).result()

    return _made(folder / f"policy-{name}", save)


def _save_policy(name: str, out: Path, device: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    toy, config = AutoConfig.from_pretrained(TOY / "policy"), published_config(PUBLISHED[POLICIES[name]])
    for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(config, key, getattr(toy, key))
    text = dict(rms_norm_eps=1e-6, max_position_embeddings=128_000, rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]})
    for key, value in (text | {key: getattr(toy.text_config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}).items():
        setattr(config.text_config, key, value)
    config.vision_config.tokens_per_second = 2
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    shutil.copytree(TOY / "policy", out, ignore=shutil.ignore_patterns("model.safetensors", "config.json", "training.json"))
    model.save_pretrained(out)


def sam2(size: str):
    """(`Sam2Model` in float32 on the CPU, its image processor)."""
    from segmentation_service.sam2_transformers import load_strictly

    if size == "toy":
        return load_strictly(str(TOY / "sam2"))
    import torch
    from transformers import Sam2Config, Sam2ImageProcessor, Sam2Model

    torch.manual_seed(0)
    model = Sam2Model(Sam2Config(vision_config=SAM2_LARGE))
    _draw(model, 1.0)
    model.prompt_encoder.shared_embedding.load_state_dict(model.shared_image_embedding.state_dict())  # one and the same in what is published
    return model, Sam2ImageProcessor()


def sam2_folder(size: str, folder: Path) -> Path:
    """As `sam2`, made where it is missing."""

    def save(out: Path) -> None:
        for part in sam2(size):
            part.save_pretrained(out)

    return TOY / "sam2" if size == "toy" else _made(folder / "sam2", save)


def xmem(size: str):
    """An `XMem` in float32 on the CPU."""
    import torch

    from segmentation_service.xmem import XMem, load_xmem

    if size == "toy":
        return load_xmem(TOY / "xmem")
    torch.manual_seed(0)
    network = XMem().eval().requires_grad_(False)
    _draw(network, 0.8)
    return network


def episodes(size: str, folder: Path) -> Path:
    """A few videos of the toy world at this size, with `train` and `valid_u`; made where they are missing."""
    world = WorldConfig() if size == "toy" else WorldConfig(*HW["full"], frames=(8, 16), radius=(40, 110))
    config = ToyDataConfig(train=16, valid_u=2, valid=1, world=world)
    return _made(folder / "data", lambda out: write_toy_data(out, config, progress=lambda line: None))


def _draw(network, gain: float) -> None:
    """Normal weights of variance gain^2 over the number of inputs, so that a layer's outputs are about as large as what goes in."""
    import torch

    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, gain / max(1, parameter[0].numel()) ** 0.5)


def _made(out: Path, make) -> Path:
    """`out`, whole: whoever made a part of it and was ended has left another name."""
    if not out.exists():
        partial = out.with_name(f"{out.name}.{os.getpid()}")
        make(partial)
        partial.rename(out)
    return out
