"""Prompts of both families: token counts known beforehand, images at the sizes asked for, and errors instead of cut prompts."""

import copy
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rollout.prompts import IMAGE_PAD, PromptBuilder, PromptConfig, PromptError, PromptTooLong, expand_pads, fingerprint, smart_size
from segmentation_service.geometry import from_policy_units, to_policy_units
from tests.rollout.tiny_policy import FAMILIES, build_tiny_policy, image_processor

SMALL = dict(template="{query} {frames}| {target}", frame_label="{index},{seconds:.1f},{order} ", reference_frames=2, reference_size=[28, 56], target_size=[56, 84])


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    return {family: build_tiny_policy(tmp_path_factory.mktemp(family), family=family) for family in FAMILIES}


@pytest.fixture(scope="module")
def policy(policies):
    return policies["qwen2_5_vl"]


@pytest.fixture(scope="module", params=FAMILIES)
def builder(policies, request):
    """A builder of each family; images of 2 x 3 and 4 x 6 tokens, or so many pixels in other proportions."""
    step = {"qwen2_5_vl": 28, "qwen3_vl": 32}[request.param]
    sizes = dict(reference_size=[2 * step, 3 * step], target_size=[4 * step, 6 * step])
    return PromptBuilder(policies[request.param], PromptConfig(**SMALL | sizes, keep_aspect=True))


@pytest.fixture(scope="module")
def processor(builder):
    """The real processor of the builder's family."""
    from transformers import AutoConfig, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    family = AutoConfig.from_pretrained(builder.model_path).model_type
    kind, video = {"qwen2_5_vl": (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor), "qwen3_vl": (Qwen3VLProcessor, Qwen3VLVideoProcessor)}[family]
    return kind(image_processor=image_processor(family), tokenizer=builder.tokenizer, video_processor=video())


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
        (dict(target_size=[56, 85]), r"prompt.target_size = \[56, 85\]: two positive multiples of 28 .*, such as \[56, 84\]"),
        (dict(reference_size=[0, 28]), "prompt.reference_size"),
        (dict(template="<|vision_start|><|video_pad|><|vision_end|>{query}"), "prompt.template holds a media token"),
    ],
)
def test_sizes_and_words_that_the_processor_would_change_are_refused(policy, change, message):
    with pytest.raises(PromptError, match=message):
        PromptBuilder(policy, PromptConfig(**SMALL | change))


def test_the_default_sizes_are_qwen2_5_vl_s(policies):
    """840 is no multiple of 32: the error names the nearest one for Qwen3-VL."""
    PromptBuilder(policies["qwen2_5_vl"], PromptConfig())
    with pytest.raises(PromptError, match=r"multiples of 32 .*, such as \[832, 832\]"):
        PromptBuilder(policies["qwen3_vl"], PromptConfig())


def test_a_template_that_begins_the_answer_is_refused(policies, tmp_path):
    """As the Thinking checkpoints of Qwen3-VL do."""
    folder = shutil.copytree(policies["qwen3_vl"], tmp_path / "thinking")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"))
    with pytest.raises(PromptError, match="writes <think> itself.*use the Instruct checkpoint"):
        PromptBuilder(str(folder), PromptConfig(reference_size=[64, 64], target_size=[64, 64]))


sides = st.integers(1, 500)


@settings(max_examples=60, deadline=None)
@given(hw=st.tuples(sides, sides), tokens=st.integers(1, 40))
def test_frames_get_the_size_that_the_real_processor_gives_them(builder, processor, hw, tokens):
    size = (builder.step, tokens * builder.step)  # only its area counts
    area = size[0] * size[1]
    resized = lambda: processor.image_processor(images=[Image.new("RGB", hw[::-1])], size={"shortest_edge": min(builder.min_pixels, area), "longest_edge": area}, return_tensors="np")
    if max(hw) > 200 * min(hw):
        with pytest.raises(ValueError, match="aspect ratio"):
            resized()
        with pytest.raises(PromptError, match="200:1"):
            builder.size_of(hw, size)
        return
    assert [side // builder.patch for side in builder.size_of(hw, size)] == resized()["image_grid_thw"][0, 1:].tolist()


@settings(max_examples=200, deadline=None)
@given(hw=st.tuples(st.integers(20, 4000), st.integers(20, 4000)), limits=st.tuples(st.integers(28 * 28, 10**6), st.integers(28 * 28, 10**7)))
def test_sizes_at_real_limits_are_those_of_smart_resize(builder, hw, limits):
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    low, high = sorted(limits)
    assert smart_size(hw, builder.step, low, high) == smart_resize(*hw, factor=builder.step, min_pixels=low, max_pixels=high)


queries = st.text(min_size=1, max_size=60).filter(lambda query: "<|" not in query)


@settings(max_examples=30, deadline=None)
@given(query=queries, hw=st.tuples(st.integers(8, 200), st.integers(8, 200)), shown=st.lists(st.integers(0, 9), max_size=4, unique=True))
def test_token_ids_are_known_beforehand_and_are_those_of_the_real_processor(builder, processor, query, hw, shown):
    frames = {t: np.full((*hw, 3), 20 * t, np.uint8) for t in range(10)}
    plan = builder.plan("e", query, hw, shown, 4, fps=3.0)
    prompt = builder.build("e", query, frames, shown, 4, fps=3.0)
    np.testing.assert_array_equal(plan.token_ids, prompt.token_ids)
    assert [image.shape[:2] for image in prompt.images] == list(plan.sizes_hw) and prompt.policy_hw == plan.sizes_hw[-1]
    real = processor(text=[prompt.text], images=list(prompt.images), do_resize=False, return_tensors="np")
    np.testing.assert_array_equal(real["input_ids"][0], plan.token_ids)
    np.testing.assert_array_equal(real["image_grid_thw"], plan.grid_thw)


@settings(max_examples=60, deadline=None)
@given(hw=st.tuples(st.integers(8, 200), st.integers(8, 200)), count=st.integers(0, 6), limit=st.integers(60, 140), least=st.integers(1, 6))
def test_a_long_prompt_is_refused_or_its_reference_frames_shrink(builder, hw, count, limit, least):
    free = builder.plan("e", "a query", hw, range(count), 9)
    tight = copy.copy(builder)
    tight.config = replace(builder.config, max_tokens=limit, min_reference_tokens=least)
    tokens = lambda plan: plan.grid_thw.prod(1) // 4
    try:
        plan = tight.plan("e", "a query", hw, range(count), 9)
    except PromptTooLong:
        assert len(free.token_ids) > limit
        return
    assert len(plan.token_ids) <= limit and plan.text == free.text
    assert tokens(plan)[-1] == tokens(free)[-1] and len(plan.grid_thw) == count + 1
    assert (tokens(plan) >= np.minimum(tokens(free), least)).all()
    if len(free.token_ids) <= limit:
        np.testing.assert_array_equal(plan.token_ids, free.token_ids)


def test_how_far_reference_frames_shrink(builder):
    """Four frames of 16 tokens and 10 tokens too many: 13 tokens are left for each frame, so a square one gets 3 x 3."""
    tight = copy.copy(builder)
    tight.config = replace(builder.config, reference_size=[4 * builder.step] * 2, target_size=[4 * builder.step] * 2)
    square = (4 * builder.step, 4 * builder.step)
    free = tight.plan("e", "a", square, range(4), 9)
    tight.config = replace(tight.config, max_tokens=len(free.token_ids) - 10, min_reference_tokens=9)
    plan = tight.plan("e", "a", square, range(4), 9)
    assert (plan.grid_thw.prod(1) // 4).tolist() == [9, 9, 9, 9, 16] and len(plan.token_ids) == len(free.token_ids) - 28
    for least in (10, None):
        tight.config = replace(tight.config, min_reference_tokens=least)
        with pytest.raises(PromptTooLong):
            tight.plan("e", "a", square, range(4), 9)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), hw=st.tuples(st.integers(8, 300), st.integers(8, 300)))
def test_answers_in_the_family_s_units_come_back(builder, data, hw):
    """Exactly as floats, and within half a unit where they are written as whole numbers."""
    policy_hw = builder.size_of(hw, builder.config.target_size)
    box = np.array([data.draw(st.integers(0, limit)) for limit in (hw[1], hw[0], hw[1], hw[0])])
    answer = to_policy_units(box, builder.units, policy_hw, hw)
    np.testing.assert_allclose(from_policy_units(answer, builder.units, policy_hw, hw), box, rtol=1e-12, atol=1e-9)
    unit = np.array(hw)[[1, 0, 1, 0]] / (np.array(policy_hw)[[1, 0, 1, 0]] if builder.units == "pixels" else 1000)
    assert (np.abs(from_policy_units(np.round(answer), builder.units, policy_hw, hw) - box) <= unit / 2 + 1e-9).all()


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
