"""Engine and learner see the same prompt, for both policy families: real vLLM against the learner's own code, on tiny random policies."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import RunningEngine
from tiny_policy import FAMILIES, build_tiny_policy

from learner.batch import Sample, collate
from learner.patchify import PatchSpec, patchify
from learner.policy import PolicyModel, load_model
from learner.policy_check import check_policy
from learner.weights import weight_buckets
from rollout.config import SamplingConfig
from rollout.prompts import PromptBuilder, PromptConfig

TEMPERATURE = 0.7
SAMPLING = SamplingConfig(temperature=TEMPERATURE, max_response_tokens=16, ignore_eos=True)


class Side:
    """One family's engine, prompt builder and learner, all made from one checkpoint folder."""

    def __init__(self, engine):
        self.engine, self.folder = engine, engine.folder
        step = PatchSpec.from_policy(self.folder).patch * 2
        self.builder = PromptBuilder(self.folder, PromptConfig(template="{frames}Target: {target}\n{query}", reference_size=[step, 2 * step], target_size=[3 * step, 2 * step]))
        self.banned = engine.run(engine.fingerprints())["banned_token_ids"]
        self.policy, self.spec = self.load(self.folder), PatchSpec.from_policy(self.folder)

    def load(self, folder):
        check_policy(folder)
        return PolicyModel(load_model(folder, torch.float32), self.banned, TEMPERATURE, 64)

    def prompt(self, references, seed=0):
        """A prompt of so many reference frames and the target frame, of random pixels."""
        rng = np.random.default_rng(seed)
        frames = {t: rng.integers(0, 256, (90, 70, 3), np.uint8) for t in range(references + 1)}
        return self.builder.build(f"e{seed}", "the red circle", frames, range(references), references, fps=2.0)

    def answers(self, prompts, count=3):
        return [self.engine.run(self.engine.generate(prompt, count, SAMPLING, range(count))) for prompt in prompts]

    def difference(self, prompts, answers, policy):
        """Mean |rollout log-prob - learner's| over all tokens; the learner computes all groups as one packed micro-batch."""
        samples = [
            Sample(p.token_ids, c.token_ids, c.logprobs, p.images, p.grid_thw, group, p.fingerprint)
            for group, (p, completions) in enumerate(zip(prompts, answers, strict=True))
            for c in completions
        ]
        batch = collate(samples, range(len(samples)), self.spec, policy.rope_index)
        with torch.no_grad():
            found, _ = policy(batch)
        return float((found - batch.rollout_logprobs).abs().mean())


@pytest.fixture(scope="module")
def qwen3_engine(tmp_path_factory, engine_loop):
    folder = build_tiny_policy(tmp_path_factory.mktemp("tiny") / "qwen3", family="qwen3_vl")
    engine = RunningEngine(folder, engine_loop)
    yield engine
    engine.run(engine.shutdown())


@pytest.fixture(scope="module", params=FAMILIES)
def side(request):
    return Side(request.getfixturevalue({"qwen2_5_vl": "tiny_engine", "qwen3_vl": "qwen3_engine"}[request.param]))


def vllm_positions(side, processed):
    """M-RoPE positions (3, P) by the code of vLLM's own model class, from what its processor made of a prompt."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.multimodal.inputs import MultiModalFeatureSpec

    config = side.engine._llm.model_config
    model_class, _ = ModelRegistry.resolve_model_cls(config.architectures, config)
    model = model_class.__new__(model_class)  # its positions need nothing but the configuration
    torch.nn.Module.__init__(model)
    model.config = config.hf_config
    images = zip(processed["mm_kwargs"]["image"], processed["mm_placeholders"]["image"], strict=True)
    features = [MultiModalFeatureSpec(data, "image", str(i), place) for i, (data, place) in enumerate(images)]
    positions, _ = model.get_mrope_input_positions(list(processed["prompt_token_ids"]), features)
    return positions.numpy()


@pytest.mark.parametrize("references", [0, 3])
def test_vllm_and_learner_are_given_the_same(side, references):
    """One image and several: token ids, grids, pixels, M-RoPE positions."""
    prompt = side.prompt(references)
    processed = side.engine.run(side.engine._render(prompt))
    np.testing.assert_array_equal(processed["prompt_token_ids"], prompt.token_ids)
    # vLLM normalises in the model, so what it is given are patches of bytes: the learner's without normalisation.
    rows, grid = patchify(prompt.images, replace(side.spec, mean=(0.0,) * 3, std=(1.0,) * 3, rescale=1.0))
    items = [item.get_data() for item in processed["mm_kwargs"]["image"]]
    assert [item["image_grid_thw"].tolist() for item in items] == prompt.grid_thw.tolist() == grid.tolist()
    assert torch.equal(torch.cat([item["pixel_values"] for item in items]).float(), rows)
    positions = side.policy.rope_index(prompt.token_ids, prompt.grid_thw)
    np.testing.assert_array_equal(vllm_positions(side, processed), positions)
    assert (positions[1] != positions[2]).any() and positions.max() + 1 < len(prompt.token_ids)


def test_logprobs_of_sampled_answers_agree(side):
    """Prompts of one, two and four images packed into one micro-batch; other images change the numbers, so it means something."""
    prompts = [side.prompt(references, seed=references) for references in (0, 1, 3)]
    answers = side.answers(prompts)
    assert side.difference(prompts, answers, side.policy) < 1e-4
    foreign = [side.prompt(references, seed=9) for references in (0, 1, 3)]
    assert side.difference(foreign, answers, side.policy) > 1e-2


def test_qwen3_vl_weights_arrive_under_the_learner_s_names(qwen3_engine, tmp_path):
    """After a sync the engine answers by the learner's new weights, vision tower, deepstack and tied head included."""
    side = Side(qwen3_engine)
    other = side.load(build_tiny_policy(tmp_path / "other", family="qwen3_vl", seed=1))

    async def sync(policy, version):
        await qwen3_engine.begin_weight_sync()
        for bucket in weight_buckets(policy.model, 10**6):
            index = [(e.name, e.dtype, e.shape, e.offset) for e in bucket.entries]
            assert await qwen3_engine.receive_weights({"data": bucket.data, "index": index}) == bucket.sha256
        await qwen3_engine.finish_weight_sync(version)

    prompts = [side.prompt(3)]
    for version, served, not_served in (("1", other, side.policy), ("2", side.policy, other)):
        qwen3_engine.run(sync(served, version))
        answers = side.answers(prompts)
        assert side.difference(prompts, answers, served) < 1e-4
        assert side.difference(prompts, answers, not_served) > 1e-2
