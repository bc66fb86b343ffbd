"""A SAM2 small enough to run in milliseconds, with random weights, in the layout of the official checkpoints."""

import json
from pathlib import Path

TINY_SIZE = 64


def tiny_sam2_values(image_size: int = TINY_SIZE, width: int = 32) -> dict:
    widths = [8, 16, 32, 64]
    return dict(
        vision_config=dict(
            backbone_config=dict(
                hidden_size=widths[0],
                image_size=[image_size, image_size],
                embed_dim_per_stage=widths,
                num_attention_heads_per_stage=[1, 2, 4, 8],
                blocks_per_stage=[1, 1, 2, 1],
                window_size_per_stage=[8, 4, 4, 2],
                global_attention_blocks=[3],
                window_positional_embedding_background_size=[4, 4],
            ),
            backbone_channel_list=widths[::-1],
            backbone_feature_sizes=[[image_size // s] * 2 for s in (4, 8, 16)],
            fpn_hidden_size=width,
        ),
        prompt_encoder_config=dict(hidden_size=width, image_size=image_size, patch_size=16),
        mask_decoder_config=dict(hidden_size=width, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=16),
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
    from transformers import Sam2Config, Sam2ImageProcessor, Sam2Model

    torch.manual_seed(0)
    model = tiny_video_model(image_size) if video else Sam2Model(Sam2Config(**tiny_sam2_values(image_size)))
    randomise(model)
    if video:
        look_at_the_past(model)
    model.save_pretrained(folder)
    Sam2ImageProcessor(size={"height": image_size, "width": image_size}).save_pretrained(folder)
    return folder


def tiny_video_model(image_size: int):
    """An untrained SAM2 for videos. Memory has 64 channels whatever the configuration says, and pointers must be wider."""
    from transformers import Sam2VideoConfig, Sam2VideoModel
    from transformers.models.sam2_video import Sam2VideoMaskDecoderConfig

    width = 128
    values = tiny_sam2_values(image_size, width)
    # As an object: transformers 5.19 makes a prompt encoder's configuration of a dictionary here.
    values["mask_decoder_config"] = Sam2VideoMaskDecoderConfig(**values["mask_decoder_config"])
    return Sam2VideoModel(
        Sam2VideoConfig(
            **values,
            image_size=image_size,
            num_maskmem=4,
            max_object_pointers_in_encoder=6,
            memory_attention_hidden_size=width,
            memory_attention_num_layers=2,
            memory_attention_feed_forward_hidden_size=64,
            memory_attention_rope_feat_sizes=[image_size // 16] * 2,
            memory_encoder_hidden_size=width,
            mask_downsampler_embed_dim=width,
            memory_fuser_embed_dim=width,
            memory_fuser_intermediate_dim=64,
        )
    )


def look_at_the_past(model) -> None:
    """Random weights draw what the image says; these draw what the memory says too, so that every object gets masks of its own."""
    import torch

    with torch.no_grad():
        for layer in model.memory_encoder.memory_fuser.layers:
            layer.scale.fill_(1)
        model.memory_encoder.mask_downsampler.final_conv.weight *= 20
        model.memory_encoder.projection.weight *= 0.05
        for layer in model.memory_attention.layers:
            layer.cross_attn_image.q_proj.weight *= 4
        model.mask_decoder.conv_s0.weight *= 0.1
        model.mask_decoder.conv_s1.weight *= 0.1
        model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(3)


def edit_json(path: Path, **changes) -> None:
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps(values))
