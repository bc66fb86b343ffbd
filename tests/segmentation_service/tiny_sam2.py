"""A SAM2 small enough to run in milliseconds, with random weights, in the layout of the official checkpoints."""

import json
from pathlib import Path

TINY_SIZE = 64


def tiny_sam2_values(image_size: int = TINY_SIZE) -> dict:
    widths = [8, 16, 32, 64]
    return dict(
        vision_config=dict(
            backbone_config=dict(
                hidden_size=widths[0],
                image_size=[image_size, image_size],
                embed_dim_per_stage=widths,
                num_attention_heads_per_stage=[1, 1, 2, 2],
                blocks_per_stage=[1, 1, 2, 1],
                window_size_per_stage=[8, 4, 4, 2],
                global_attention_blocks=[3],
                window_positional_embedding_background_size=[4, 4],
            ),
            backbone_channel_list=widths[::-1],
            backbone_feature_sizes=[[image_size // s] * 2 for s in (4, 8, 16)],
            fpn_hidden_size=32,
        ),
        prompt_encoder_config=dict(hidden_size=32, image_size=image_size, patch_size=16),
        mask_decoder_config=dict(hidden_size=32, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=16),
    )


def randomise(model, seed: int = 0) -> None:
    """Weights large enough that masks have holes and edges and depend on the prompts."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 / max(parameter[0].numel(), 1) ** 0.5, generator=generator)
        model.prompt_encoder.shared_embedding.positional_embedding.copy_(model.shared_image_embedding.positional_embedding)


def save_tiny_sam2(folder: Path, image_size: int = TINY_SIZE, video: bool = False) -> Path:
    import torch
    from transformers import Sam2Config, Sam2ImageProcessor, Sam2Model, Sam2VideoConfig, Sam2VideoModel
    from transformers.models.sam2_video import Sam2VideoMaskDecoderConfig

    torch.manual_seed(0)
    values = tiny_sam2_values(image_size)
    if video:
        # As an object: transformers 5.19 makes a prompt encoder's configuration of a dictionary here.
        values["mask_decoder_config"] = Sam2VideoMaskDecoderConfig(**values["mask_decoder_config"])
        values |= dict(memory_attention_hidden_size=32, memory_encoder_hidden_size=32, memory_encoder_output_channels=16, image_size=image_size)
        model = Sam2VideoModel(Sam2VideoConfig(**values))
    else:
        model = Sam2Model(Sam2Config(**values))
    randomise(model)
    model.save_pretrained(folder)
    Sam2ImageProcessor(size={"height": image_size, "width": image_size}).save_pretrained(folder)
    return folder


def edit_json(path: Path, **changes) -> None:
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps(values))
