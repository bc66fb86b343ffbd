"""Prompts: token counts known beforehand, images at the sizes asked for, and errors instead of cut prompts."""

import numpy as np
import pytest

from rollout.prompts import IMAGE_PAD, PromptBuilder, PromptConfig, PromptError, expand_pads, fingerprint
from tests.rollout.tiny_policy import build_tiny_policy

SMALL = dict(template="{query} {frames}| {target}", frame_label="{index},{seconds:.1f},{order} ", reference_frames=2, reference_size=[28, 56], target_size=[56, 84])


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return build_tiny_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def frames():
    rng = np.random.default_rng(0)
    return {t: rng.integers(0, 256, (48, 64, 3), np.uint8) for t in range(10)}


def test_a_prompt_shows_the_frames_in_order(policy, frames):
    builder = PromptBuilder(policy, PromptConfig(**SMALL))
    prompt = builder.build("e", "the red circle", frames, [0, 8], 4, fps=2.0)
    assert prompt.text.count(IMAGE_PAD) == 3
    assert [image.shape for image in prompt.images] == [(28, 56, 3), (28, 56, 3), (56, 84, 3)]
    assert prompt.grid_thw.tolist() == [[1, 2, 4], [1, 2, 4], [1, 4, 6]]
    assert (prompt.token_ids == builder.image_pad_id).sum() == 2 + 2 + 6  # patches / 4
    assert prompt.vllm_token_ids.count(builder.image_pad_id) == 3
    assert "the red circle 0,0.0,1 <|vision_start|>" in prompt.text and "8,4.0,2 " in prompt.text and "| 4,2.0,3 " in prompt.text
    assert (prompt.policy_hw, prompt.frame_hw, prompt.units) == ((56, 84), (48, 64), "pixels")
    assert prompt.frame_ids == (0, 8) and prompt.target_frame == 4


def test_the_fingerprint_sees_one_pixel_and_one_token(policy, frames):
    prompt = PromptBuilder(policy, PromptConfig(**SMALL)).build("e", "a", frames, [0, 8], 4)
    assert fingerprint(prompt.token_ids, prompt.images) == prompt.fingerprint
    other = [image.copy() for image in prompt.images]
    other[1][3, 3, 1] ^= 1
    assert fingerprint(prompt.token_ids, other) != prompt.fingerprint
    ids = prompt.token_ids.copy()
    ids[0] += 1
    assert fingerprint(ids, prompt.images) != prompt.fingerprint


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(target_size=[56, 85]), r"prompt.target_size = \[56, 85\]: two positive multiples of 28"),
        (dict(reference_size=[0, 28]), "prompt.reference_size"),
    ],
)
def test_sizes_that_the_processor_would_change_are_refused(policy, change, message):
    with pytest.raises(PromptError, match=message):
        PromptBuilder(policy, PromptConfig(**SMALL | change))


def test_a_long_prompt_is_an_error_never_cut(policy, frames):
    builder = PromptBuilder(policy, PromptConfig(**SMALL, max_tokens=30))
    with pytest.raises(PromptError, match="episode long: the prompt has .* more than prompt.max_tokens = 30"):
        builder.build("long", "the red circle" * 10, frames, [0, 8], 4)


def test_a_query_cannot_smuggle_in_an_image(policy, frames):
    with pytest.raises(PromptError, match="media token"):
        PromptBuilder(policy, PromptConfig(**SMALL)).build("e", f"the {IMAGE_PAD} circle", frames, [0], 4)


def test_pads_expand_where_they_stand():
    assert expand_pads([5, 9, 6, 9], 9, [2, 3]).tolist() == [5, 9, 9, 6, 9, 9, 9]
    with pytest.raises(PromptError, match="1 image pads for 2 images"):
        expand_pads([5, 9], 9, [1, 1])


def test_pixels_equal_those_of_the_family_s_processor(policy, frames):
    """With resizing off, the processor finds the same grid that the prompt counted with."""
    from transformers import AutoImageProcessor

    prompt = PromptBuilder(policy, PromptConfig(**SMALL)).build("e", "a", frames, [0, 8], 4)
    out = AutoImageProcessor.from_pretrained(policy)(images=list(prompt.images), do_resize=False, return_tensors="np")
    assert out["image_grid_thw"].tolist() == prompt.grid_thw.tolist()
