"""A SAM2 of transformers' layout rewritten as a `.pt` file of Meta's, with its architecture in YAML: the same model for the other program."""

import re
from pathlib import Path

import torch
from omegaconf import OmegaConf
from sam2.modeling.memory_encoder import CXBlock
from sam2.modeling.sam.mask_decoder import MaskDecoder
from sam2.modeling.sam.transformer import TwoWayTransformer
from sam2.modeling.sam2_base import SAM2Base

RENAMED = [
    # whole weights
    (r"^no_memory_embedding$", "no_mem_embed"),
    (r"^no_memory_positional_encoding$", "no_mem_pos_enc"),
    (r"^no_object_pointer$", "no_obj_ptr"),
    (r"^occlusion_spatial_embedding_parameter$", "no_obj_embed_spatial"),
    (r"^memory_temporal_positional_encoding$", "maskmem_tpos_enc"),
    (r"^shared_image_embedding\.positional_embedding$", "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    # parts
    (r"^vision_encoder\.backbone\.", "image_encoder.trunk."),
    (r"^vision_encoder\.neck\.convs\.(\d)\.", r"image_encoder.neck.convs.\1.conv."),
    (r"^prompt_encoder\.mask_embed\.", "sam_prompt_encoder.mask_downscaling."),
    (r"^prompt_encoder\.", "sam_prompt_encoder."),
    (r"^mask_decoder\.", "sam_mask_decoder."),
    (r"^object_pointer_proj\.", "obj_ptr_proj."),
    (r"^temporal_positional_encoding_projection_layer\.", "obj_ptr_tpos_proj."),
    # layers
    (r"(trunk\.patch_embed)\.projection\.", r"\1.proj."),
    (r"\.o_proj\.", ".out_proj."),
    (r"\.layer_norm_final_attn\.", ".norm_final_attn."),
    (r"^memory_attention\.layer_norm\.", "memory_attention.norm."),
    (r"(trunk\.blocks\.\d+|transformer\.layers\.\d+|memory_attention\.layers\.\d+)\.layer_norm(\d)\.", r"\1.norm\2."),
    (r"mask_downscaling\.conv1\.", "mask_downscaling.0."),
    (r"mask_downscaling\.layer_norm1\.", "mask_downscaling.1."),
    (r"mask_downscaling\.conv2\.", "mask_downscaling.3."),
    (r"mask_downscaling\.layer_norm2\.", "mask_downscaling.4."),
    (r"mask_downscaling\.conv3\.", "mask_downscaling.6."),
    (r"sam_mask_decoder\.upscale_conv1\.", "sam_mask_decoder.output_upscaling.0."),
    (r"sam_mask_decoder\.upscale_layer_norm\.", "sam_mask_decoder.output_upscaling.1."),
    (r"sam_mask_decoder\.upscale_conv2\.", "sam_mask_decoder.output_upscaling.3."),
    (r"^memory_encoder\.feature_projection\.", "memory_encoder.pix_feat_proj."),
    (r"^memory_encoder\.projection\.", "memory_encoder.out_proj."),
    (r"^memory_encoder\.memory_fuser\.layers\.(\d)\.scale$", r"memory_encoder.fuser.layers.\1.gamma"),
    (r"^memory_encoder\.memory_fuser\.layers\.(\d)\.depthwise_conv\.", r"memory_encoder.fuser.layers.\1.dwconv."),
    (r"^memory_encoder\.memory_fuser\.layers\.(\d)\.pointwise_conv", r"memory_encoder.fuser.layers.\1.pwconv"),
    (r"^memory_encoder\.memory_fuser\.layers\.(\d)\.layer_norm\.", r"memory_encoder.fuser.layers.\1.norm."),
    (r"mask_downsampler\.final_conv\.", "mask_downsampler.encoder.12."),
]
THREE_LAYERS = ("output_hypernetworks_mlps", "iou_prediction_head", "pred_obj_score_head", "obj_ptr_proj")


class NarrowSam2(SAM2Base):
    """Meta's model with a mask decoder of any width: its own is of the published width whatever the configuration says."""

    def __init__(self, decoder, **others):
        self.decoder = decoder
        super().__init__(**others)

    def _build_sam_heads(self):
        super()._build_sam_heads()
        width = self.sam_prompt_embed_dim
        self.sam_mask_decoder = MaskDecoder(
            transformer_dim=width,
            transformer=TwoWayTransformer(depth=2, embedding_dim=width, mlp_dim=self.decoder["mlp_dim"], num_heads=self.decoder["num_heads"]),
            iou_head_hidden_dim=self.decoder["iou_head_hidden_dim"],
            use_high_res_features=True,
            iou_prediction_use_sigmoid=True,
            pred_obj_scores=True,
            pred_obj_scores_mlp=True,
            use_multimask_token_for_obj_ptr=True,
            **self.sam_mask_decoder_extra_args,
        )


class NarrowBlock(CXBlock):
    """As above, for the memory encoder's layers."""

    def __init__(self, inner, **others):
        super().__init__(**others)
        self.pwconv1, self.pwconv2 = torch.nn.Linear(others["dim"], inner), torch.nn.Linear(inner, others["dim"])


def meta_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for key, tensor in weights.items():
        if key == "prompt_encoder.shared_embedding.positional_embedding":  # the same as the image's
            continue
        for pattern, name in RENAMED:
            key = re.sub(pattern, name, key)
        key = re.sub(r"mask_downsampler\.layers\.(\d)\.conv\.", lambda m: f"mask_downsampler.encoder.{3 * int(m[1])}.", key)
        key = re.sub(r"mask_downsampler\.layers\.(\d)\.layer_norm\.", lambda m: f"mask_downsampler.encoder.{3 * int(m[1]) + 1}.", key)
        three = any(part in key for part in THREE_LAYERS)
        if three:
            key = re.sub(r"\.layers\.0\.", ".layers.1.", key)
        key = key.replace(".proj_in.", ".layers.0.").replace(".proj_out.", ".layers.2." if three else ".layers.1.")
        if key.endswith(".point_embed.weight"):
            found |= {f"sam_prompt_encoder.point_embeddings.{i}.weight": row[None].clone() for i, row in enumerate(tensor)}
        else:
            found[key] = tensor.clone()
    return found


def meta_config(config, video: bool) -> dict:
    """The YAML of Meta's, for the configuration of a `Sam2Model` or `Sam2VideoModel`. Memory of an image model is of no use, and minimal."""
    backbone, width = config.vision_config.backbone_config, config.vision_config.fpn_hidden_size
    decoder, size = config.mask_decoder_config, config.prompt_encoder_config.image_size
    modules = "sam2.modeling"
    attention = dict(
        _target_=f"{modules}.sam.transformer.RoPEAttention",
        rope_theta=10000.0,
        feat_sizes=[size // 16] * 2,
        embedding_dim=width,
        num_heads=1,
        downsample_rate=1,
        dropout=0.1,
    )

    def positions(features):
        return dict(_target_=f"{modules}.position_encoding.PositionEmbeddingSine", num_pos_feats=features, normalize=True, scale=None, temperature=10000)

    memory = dict(
        memory_attention=dict(
            _target_=f"{modules}.memory_attention.MemoryAttention",
            d_model=width,
            pos_enc_at_input=True,
            num_layers=config.memory_attention_num_layers,
            layer=dict(
                _target_=f"{modules}.memory_attention.MemoryAttentionLayer",
                activation="relu",
                dim_feedforward=config.memory_attention_feed_forward_hidden_size,
                dropout=0.1,
                pos_enc_at_attn=False,
                d_model=width,
                pos_enc_at_cross_attn_keys=True,
                pos_enc_at_cross_attn_queries=False,
                self_attention=attention,
                cross_attention=attention | dict(rope_k_repeat=True, kv_in_dim=64),
            ),
        ),
        memory_encoder=dict(
            _target_=f"{modules}.memory_encoder.MemoryEncoder",
            in_dim=width,
            out_dim=64,
            position_encoding=positions(64),
            mask_downsampler=dict(_target_=f"{modules}.memory_encoder.MaskDownSampler", embed_dim=width, kernel_size=3, stride=2, padding=1),
            fuser=dict(
                _target_=f"{modules}.memory_encoder.Fuser",
                num_layers=2,
                layer=dict(_target_="meta_sam2.NarrowBlock", dim=width, inner=config.memory_fuser_intermediate_dim, kernel_size=7, padding=3),
            ),
        ),
        num_maskmem=config.num_maskmem,
        max_obj_ptrs_in_encoder=config.max_object_pointers_in_encoder,
    ) if video else dict(memory_attention=None, memory_encoder=None, num_maskmem=0)
    return dict(
        _target_="meta_sam2.NarrowSam2",
        decoder=dict(mlp_dim=decoder.mlp_dim, num_heads=decoder.num_attention_heads, iou_head_hidden_dim=decoder.iou_head_hidden_dim),
        image_encoder=dict(
            _target_=f"{modules}.backbones.image_encoder.ImageEncoder",
            scalp=1,
            trunk=dict(
                _target_=f"{modules}.backbones.hieradet.Hiera",
                embed_dim=backbone.hidden_size,
                num_heads=backbone.num_attention_heads_per_stage[0],
                stages=list(backbone.blocks_per_stage),
                global_att_blocks=list(backbone.global_attention_blocks),
                window_pos_embed_bkg_spatial_size=list(backbone.window_positional_embedding_background_size),
                window_spec=list(backbone.window_size_per_stage),
            ),
            neck=dict(
                _target_=f"{modules}.backbones.image_encoder.FpnNeck",
                position_encoding=positions(width),
                d_model=width,
                backbone_channel_list=list(config.vision_config.backbone_channel_list),
                fpn_top_down_levels=[2, 3],
                fpn_interp_model="nearest",
            ),
        ),
        **memory,
        image_size=size,
        sigmoid_scale_for_mem_enc=20.0,
        sigmoid_bias_for_mem_enc=-10.0,
        use_mask_input_as_output_without_sam=True,
        directly_add_no_mem_embed=True,
        no_obj_embed_spatial=video,
        use_high_res_features_in_sam=True,
        multimask_output_in_sam=True,
        iou_prediction_use_sigmoid=True,
        use_obj_ptrs_in_encoder=video,
        add_tpos_enc_to_obj_ptrs=video,
        proj_tpos_enc_in_obj_ptrs=video,
        use_signed_tpos_enc_to_obj_ptrs=True,
        only_obj_ptrs_in_the_past_for_eval=True,
        pred_obj_scores=True,
        pred_obj_scores_mlp=True,
        fixed_no_obj_ptr=video,
        multimask_output_for_tracking=True,
        use_multimask_token_for_obj_ptr=True,
        multimask_min_pt_num=0,
        multimask_max_pt_num=1,
        use_mlp_for_obj_ptr_proj=True,
        sam_mask_decoder_extra_args=dict(dynamic_multimask_via_stability=decoder.dynamic_multimask_via_stability),
    )


def save_as_meta(model, folder: Path) -> tuple[str, str]:
    """The names of a `.pt` file with the weights of a `Sam2Model` or `Sam2VideoModel`, and of its YAML file."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, config = folder / "model.pt", folder / "model.yaml"
    video, weights = hasattr(model, "memory_encoder"), meta_weights(model.state_dict())
    if not video:  # Meta's program has these in any case
        width = model.config.vision_config.fpn_hidden_size
        weights |= dict(maskmem_tpos_enc=torch.zeros(0, 1, 1, width), no_mem_pos_enc=torch.zeros(1, 1, width))
    OmegaConf.save({"model": meta_config(model.config, video)}, config)
    torch.save({"model": weights}, checkpoint)
    return str(checkpoint), str(config)
