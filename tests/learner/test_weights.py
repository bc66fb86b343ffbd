"""Weights out: bucket sizes, bytes, checksums, and the names of published checkpoints."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_learner import tiny_model

from learner.gpu_sync import Sender
from learner.weights import checkpoint_names, plan_buckets, weight_buckets, weight_metadata


@settings(max_examples=100, deadline=None)
@given(shapes=st.lists(st.lists(st.integers(1, 9), max_size=3), max_size=20), limit=st.integers(1, 500))
def test_buckets_are_bounded_and_in_order(shapes, limit):
    tensors = [(f"t{i}", torch.bfloat16 if i % 3 else torch.float32, tuple(shape)) for i, shape in enumerate(shapes)]
    plan = plan_buckets(tensors, limit)
    assert [(e.name, e.dtype, e.shape) for entries, _ in plan for e in entries] == [(n, str(d)[6:], s) for n, d, s in tensors]
    for entries, nbytes in plan:
        end = 0
        for e in entries:
            assert e.offset == end and e.offset % 16 == 0
            end += -(-int(np.prod(e.shape, dtype=int)) * getattr(torch, e.dtype).itemsize // 16) * 16
        assert nbytes == end
        assert nbytes - 16 < limit or len(entries) == 1


def test_bytes_arrive_as_they_are():
    model = tiny_model().to(torch.bfloat16)
    buckets = list(weight_buckets(model, 30_000))
    assert len(buckets) > 3 and all(hashlib.sha256(b.data).hexdigest() == b.sha256 for b in buckets)
    found = dict(pair for bucket in buckets for pair in bucket.tensors())
    names = checkpoint_names(model)
    assert len(found) == len(names)
    for name, parameter in model.named_parameters():
        assert torch.equal(found[names[name]], parameter) and found[names[name]].dtype == torch.bfloat16
    assert all(b.data is None and b.sha256 is None for b in weight_buckets(model, 30_000, rank=1))
    with pytest.raises(ValueError, match="max_bytes = 0"):
        next(weight_buckets(model, 0))


def test_hashes_of_what_is_sent_from_gpu_to_gpu():
    model, sent = tiny_model().to(torch.bfloat16), {}
    sender = Sender(model, 30_000)
    sender.engine = SimpleNamespace(send_weights=lambda: sent.update(sender.weights()))
    assert sender.send_weights() == {} and len(sent) == len(checkpoint_names(model))
    assert sender.send_weights(hashed=True) == {name: hashlib.sha256(tensor.view(torch.uint8).numpy()).hexdigest() for name, tensor in sent.items()}


def test_names_of_an_official_size():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config=dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2, vocab_size=151936),
        vision_config=dict(hidden_size=1280, out_hidden_size=2048), tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    metadata = {name: shape for name, _, shape in weight_metadata(model)}
    assert len(metadata) == 824 and "lm_head.weight" not in metadata
    assert metadata["model.layers.35.self_attn.k_proj.bias"] == (256,) and metadata["visual.blocks.31.attn.qkv.weight"] == (3840, 1280)
    assert metadata["model.embed_tokens.weight"] == (151936, 2048) and metadata["visual.merger.mlp.2.weight"] == (2048, 5120)


def test_names_of_qwen3_vl_4b():
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = Qwen3VLConfig(
        text_config=dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151936),
        vision_config=dict(depth=24, hidden_size=1024, intermediate_size=4096, out_hidden_size=2560, deepstack_visual_indexes=[5, 11, 17]),
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config)
    metadata = {name: shape for name, _, shape in weight_metadata(model)}
    assert len(metadata) == 713 and "lm_head.weight" not in metadata
    assert metadata["model.language_model.layers.35.self_attn.k_norm.weight"] == (128,)
    assert metadata["model.visual.pos_embed.weight"] == (2304, 1024) and metadata["model.visual.deepstack_merger_list.2.linear_fc2.weight"] == (2560, 4096)
