"""Weights into a running engine: exactly those that were sent, or a clear error and an engine that refuses to go on."""

import asyncio
import dataclasses
import hashlib

import numpy as np
import pytest
from conftest import RunningEngine
from parity import load_policy, transformers_logprobs
from tiny_policy import build_tiny_policy, tiny_prompt

from rollout.config import SamplingConfig
from rollout.engine import EngineBroken
from rollout.weight_transfer import BucketError, bucket_digest, check_bucket, check_shapes, checkpoint_shapes, pack_bucket

GREEDY = SamplingConfig(temperature=0.0, max_response_tokens=24, ignore_eos=True)


def named_parameters(folder):
    """The policy's weights under the names that a learner has in memory (transformers 5), tied ones once."""
    return {name: parameter.detach().numpy() for name, parameter in load_policy(folder).named_parameters()}


def checkpoint(folder):
    """The same under the names of the checkpoint's file."""
    from safetensors.numpy import load_file

    return load_file(f"{folder}/model.safetensors")


def buckets(weights, count):
    """`weights` dealt into `count` flat buckets in an order that splits layers and fused parameters."""
    names = list(weights)
    return [pack_bucket({name: weights[name] for name in names[i::count]}) for i in range(count)]


async def sync(engine, weights, version, count=3):
    await engine.begin_weight_sync()
    for bucket in buckets(weights, count):
        assert await engine.receive_weights(bucket) == bucket_digest(bucket)
    assert await engine.finish_weight_sync(version) == version


def greedy(engine):
    prompts = [tiny_prompt(engine.folder, text=f"thing {i}", seed=i) for i in range(3)]
    return [engine.run(engine.generate(prompt, 1, GREEDY))[0] for prompt in prompts]


def assert_equal(left, right):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_array_equal(a.logprobs, b.logprobs)


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory):
    return build_tiny_policy(tmp_path_factory.mktemp("tiny") / "b", seed=1)


@pytest.fixture(scope="module")
def fresh_engine(other_folder, engine_loop):
    """An engine started from the other weights; the last tests of this file break it."""
    engine = RunningEngine(other_folder, engine_loop)
    yield engine
    engine.run(engine.shutdown())


def test_buckets_hold_what_was_packed():
    weights = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((1,), np.float16), "c": np.float32([[7.0]])}
    bucket = pack_bucket(weights)
    assert [(name, dtype, shape, offset) for name, dtype, shape, offset in bucket["index"]] == [
        ("a", "float32", (2, 3), 0),
        ("b", "float16", (1,), 64),
        ("c", "float32", (1, 1), 128),
    ]
    for name, dtype, shape, offset in bucket["index"]:
        size = weights[name].nbytes
        np.testing.assert_array_equal(bucket["data"][offset : offset + size].view(dtype).reshape(shape), weights[name])
    check_bucket(bucket)
    assert bucket_digest(bucket) != bucket_digest(pack_bucket({**weights, "b": np.zeros((1,), np.float16)}))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([("a", "float32", (3, 3), 0)], "'a' needs bytes 0 to 36, but its bucket has 32"),
        ([("a", "float33", (1,), 0)], "dtype 'float33'"),
        ([], "holds no tensor"),
    ],
)
def test_a_bucket_whose_index_lies_is_refused(index, message):
    with pytest.raises(BucketError, match=message):
        check_bucket({"data": np.zeros(32, np.uint8), "index": index})


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.1.self_attn.k_proj.weight", (128, 128), r"has shape \(128, 128\), but the policy's is \(64, 128\)"),
        ("model.language_model.norm.weight", (64,), r"but the policy's is \(128,\)"),
        ("model.visual.blocks.0.mlp.gate.weight", (1,), "the nearest is 'visual.blocks.0.mlp.gate_proj.weight'"),
    ],
)
def test_a_weight_that_the_policy_does_not_have_is_named(tiny_folder, name, shape, message):
    shapes = checkpoint_shapes(tiny_folder)
    check_shapes(pack_bucket(named_parameters(tiny_folder)), shapes)
    with pytest.raises(BucketError, match=message):
        check_shapes(pack_bucket({name: np.zeros(shape, np.float32)}), shapes)


def test_after_a_sync_the_engine_equals_one_started_afresh(tiny_engine, fresh_engine, other_folder):
    """Tied embeddings, fused qkv and gate_up, packed weights: greedy tokens and log-probs equal exactly, under both naming schemes."""
    before, wanted = greedy(tiny_engine), greedy(fresh_engine)
    assert not np.array_equal(before[0].logprobs, wanted[0].logprobs)
    tiny_engine.run(sync(tiny_engine, named_parameters(other_folder), "7"))
    after = greedy(tiny_engine)
    assert_equal(after, wanted)
    assert all(completion.weight_versions == (("7", 24),) for completion in after)
    tiny_engine.run(sync(tiny_engine, checkpoint(tiny_engine.folder), "8", count=1))
    assert_equal(greedy(tiny_engine), before)
    assert tiny_engine.run(tiny_engine.weight_version()) == "8"


def test_tensors_are_hashed_as_the_model_gets_them(tiny_engine):
    """What ipc and nccl are checked by, here behind the object store."""
    weights = checkpoint(tiny_engine.folder)
    tiny_engine.run(tiny_engine.hash_weights())
    tiny_engine.run(sync(tiny_engine, weights, "9"))
    assert tiny_engine.run(tiny_engine.hashed_weights()) == [{name: hashlib.sha256(weight.tobytes()).hexdigest() for name, weight in weights.items()}]
    tiny_engine.run(sync(tiny_engine, weights, "10"))


def test_requests_in_flight_go_on_with_the_new_weights(tiny_engine, other_folder):
    """Mode "keep": one completion, two versions, and its later log-probs are those of the new weights on the whole context."""
    prompt = tiny_prompt(tiny_engine.folder)
    weights = named_parameters(other_folder)

    async def scenario():
        sampling = dataclasses.replace(GREEDY, max_response_tokens=400)
        task = asyncio.create_task(tiny_engine.engine.generate(prompt, 1, sampling))
        state = tiny_engine._llm.output_processor.request_states
        while not task.done() and not any(s.detokenizer.num_output_tokens() > 20 for s in state.values()):
            await asyncio.sleep(0.005)
        await sync(tiny_engine.engine, weights, "new")
        return await task

    try:
        (completion,) = tiny_engine.run(scenario())
    finally:
        tiny_engine.run(sync(tiny_engine, checkpoint(tiny_engine.folder), "old"))
    (first, old), (second, new) = completion.weight_versions
    assert second == "new" and first != "new" and old > 20 and new > 0 and old + new == 400
    banned = tiny_engine.run(tiny_engine.fingerprints())["banned_token_ids"]
    for folder, part in ((tiny_engine.folder, slice(0, old)), (other_folder, slice(old, 400))):
        logprobs = transformers_logprobs(load_policy(folder), folder, prompt, completion.token_ids, 1.0, banned)
        assert np.abs(logprobs - completion.logprobs)[part].mean() < 1e-3


def test_calls_out_of_order_are_refused(tiny_engine):
    with pytest.raises(RuntimeError, match="call begin_weight_sync first"):
        tiny_engine.run(tiny_engine.receive_weights({"a": np.zeros(1, np.float32)}))
    with pytest.raises(RuntimeError, match="call begin_weight_sync first"):
        tiny_engine.run(tiny_engine.finish_weight_sync("9"))


def test_a_partial_update_must_be_asked_for(tiny_engine, fresh_engine, other_folder):
    """`complete=False` leaves whole layers alone (a frozen vision tower); a missing third of a fused weight is never let through."""
    weights, before = named_parameters(other_folder), greedy(tiny_engine)

    async def language_only():
        await tiny_engine.begin_weight_sync()
        await tiny_engine.receive_weights({name: weight for name, weight in weights.items() if "visual" not in name}, complete=False)
        await tiny_engine.finish_weight_sync("partial")

    tiny_engine.run(language_only())
    mixed = greedy(tiny_engine)
    assert not np.array_equal(mixed[0].logprobs, before[0].logprobs) and not np.array_equal(mixed[0].logprobs, greedy(fresh_engine)[0].logprobs)
    tiny_engine.run(sync(tiny_engine, checkpoint(tiny_engine.folder), "whole"))
    assert_equal(greedy(tiny_engine), before)


# From here on `fresh_engine` is broken again and again.


def repair(engine):
    """Tests only: goes on with the update that was in progress."""
    engine.engine._broken = None


def test_a_wrong_name_breaks_the_engine(fresh_engine):
    fresh_engine.run(fresh_engine.begin_weight_sync())
    with pytest.raises(EngineBroken, match="no weight 'model.layers.0.self_attn.qq_proj.weight'; the nearest is 'model.layers.0.self_attn.q_proj.weight'"):
        fresh_engine.run(fresh_engine.receive_weights({"model.layers.0.self_attn.qq_proj.weight": np.zeros((2, 2), np.float32)}))
    for call in (fresh_engine.weight_version(), fresh_engine.generate(tiny_prompt(fresh_engine.folder), 1, GREEDY), fresh_engine.finish_weight_sync("9")):
        with pytest.raises(EngineBroken, match="kill it and start another"):
            fresh_engine.run(call)


def test_an_error_in_the_engine_process_breaks_the_engine(fresh_engine, monkeypatch):
    """What only vLLM's loaders notice, here with our own check switched off."""
    repair(fresh_engine)
    monkeypatch.setattr(fresh_engine.engine, "_shapes", {})
    with pytest.raises(EngineBroken, match="update failed while loading weights"):
        fresh_engine.run(fresh_engine.receive_weights({"model.layers.0.nothing_like_this.weight": np.zeros((2, 2), np.float32)}))


def test_a_missing_weight_breaks_the_engine(fresh_engine):
    weights = checkpoint(fresh_engine.folder)
    del weights["model.layers.2.self_attn.v_proj.weight"]
    repair(fresh_engine)
    fresh_engine.engine._updating = False
    with pytest.raises(EngineBroken, match=r"left 1 layers without.*layers\.2\.self_attn\.qkv_proj"):
        fresh_engine.run(sync(fresh_engine, weights, "9"))


@pytest.mark.long
def test_untied_weights(engine_loop, tmp_path):
    """The same with an output head of its own, as in the 7B model."""
    a, b = (build_tiny_policy(tmp_path / name, seed=seed, tie=False) for name, seed in (("a", 2), ("b", 3)))
    engine, fresh = RunningEngine(a, engine_loop), RunningEngine(b, engine_loop)
    weights = named_parameters(b)
    assert "lm_head.weight" in weights
    engine.run(sync(engine, weights, "1"))
    assert_equal(greedy(engine), greedy(fresh))
    for running in (engine, fresh):
        running.run(running.shutdown())
