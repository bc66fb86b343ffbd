"""The rollout engine on a tiny random policy: one real vLLM engine on the CPU for the whole file."""

import asyncio
import dataclasses
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from parity import load_policy, mean_difference, transformers_distribution, transformers_logprobs
from tiny_policy import tiny_prompt

from rollout.banned_tokens import banned_token_ids, holds_banned
from rollout.config import RolloutConfig, SamplingConfig, resolve_dtype, resolve_weight_sync
from rollout import vllm_options
from rollout.engine import EngineBroken, PromptRejected, RolloutEngine
from rollout.fingerprints import policy_fingerprints

SAMPLING = SamplingConfig(temperature=1.0, max_response_tokens=16, ignore_eos=True)


def same(left, right):
    return all(np.array_equal(a.token_ids, b.token_ids) and np.array_equal(a.logprobs, b.logprobs) for a, b in zip(left, right, strict=True))


# ---- without vLLM ----


def test_weight_sync_follows_the_device():
    assert resolve_weight_sync("auto", "cpu") == "object_store"
    assert resolve_weight_sync("auto", "cuda") == "ipc"
    assert resolve_weight_sync("auto", "cuda", shares_gpu_with_learner=False) == "nccl"
    assert resolve_dtype("auto", "cpu") == "float32" and resolve_dtype("auto", "cuda") == "bfloat16"
    with pytest.raises(ValueError, match="needs CUDA"):
        resolve_weight_sync("ipc", "cpu")
    with pytest.raises(ValueError, match="every GPU of an engine"):
        resolve_weight_sync("ipc", "cuda", shares_gpu_with_learner=False)
    with pytest.raises(ValueError, match="use one of auto"):
        resolve_weight_sync("rsync", "cpu")


def test_the_same_config_on_a_gpu(monkeypatch):
    """What a CUDA machine would be asked for, with no edit of the configuration."""
    monkeypatch.setattr("rollout.engine.resolve_device", lambda device: "cuda")
    engine = RolloutEngine("policy", RolloutConfig())
    options = vllm_options.engine_options("policy", engine.config, engine.device, engine.dtype, 0, engine.weight_sync, (1, 2))
    assert options["dtype"] == "bfloat16" and options["weight_transfer_config"] == {"backend": "ipc"}
    assert not options["enforce_eager"] and options["gpu_memory_utilization"] == RolloutConfig().gpu_memory_utilization
    assert "kv_cache_memory_bytes" not in options
    assert vllm_options.environment(engine.config, engine.device, engine.weight_sync, 1)["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "1"


def test_a_block_size_that_the_cpu_lacks():
    with pytest.raises(ValueError, match="multiple of 32"):
        vllm_options.engine_options("policy", RolloutConfig(block_size=16), "cpu", "float32", 0, "object_store", ())


def test_a_missing_or_wrong_checkpoint_is_said_at_once(tmp_path):
    loop = asyncio.new_event_loop()
    with pytest.raises(FileNotFoundError, match="nowhere.*is not a folder"):
        loop.run_until_complete(RolloutEngine(tmp_path / "nowhere", device="cpu").ready())
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match="'qwen2' model without images"):
        loop.run_until_complete(RolloutEngine(tmp_path, device="cpu").ready())
    with pytest.raises(RuntimeError, match="await ready"):
        loop.run_until_complete(RolloutEngine(tmp_path, device="cpu").weight_version())
    loop.close()


def test_media_tokens_and_the_padded_vocabulary_are_banned(tiny_folder):
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    banned = banned_token_ids(tokenizer, AutoConfig.from_pretrained(tiny_folder))
    names = [token for token, i in tokenizer.get_vocab().items() if i in banned]
    assert sorted(names) == sorted(["<|image_pad|>", "<|video_pad|>", "<|vision_pad|>", "<|vision_start|>", "<|vision_end|>"])
    assert set(range(264, 288)) <= set(banned) and len(banned) == 24 + 5
    assert holds_banned([5, 262], banned) and not holds_banned([5, 258], banned)


def test_fingerprints_see_a_changed_template_and_tokenizer(tiny_folder):
    from transformers import AutoTokenizer

    before = policy_fingerprints(tiny_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template += " "
    changed = policy_fingerprints(tiny_folder, tokenizer=tokenizer)
    assert {key for key in before if before[key] != changed[key]} == {"chat_template"}
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.add_tokens(["<new>"])
    changed = policy_fingerprints(tiny_folder, tokenizer=tokenizer)
    assert {key for key in before if before[key] != changed[key]} == {"tokenizer", "tokenizer_size", "banned_token_ids"}


def _parent(pids):
    child = multiprocessing.get_context("spawn").Process(target=_child, args=(pids,), daemon=True)
    child.start()
    time.sleep(600)


def _child(pids):
    from rollout import weight_transfer

    weight_transfer._exit_with_parent()
    pids.put(os.getpid())
    time.sleep(600)


def test_the_engine_core_dies_with_its_actor():
    """A killed actor (SIGKILL runs no cleanup) leaves no process behind."""
    context = multiprocessing.get_context("spawn")
    pids = context.Queue()
    parent = context.Process(target=_parent, args=(pids,))
    parent.start()
    child = pids.get(timeout=60)
    os.kill(parent.pid, signal.SIGKILL)
    parent.join(10)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{child}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child outlived its parent by 10 s")


# ---- with one vLLM engine ----


def test_ready_reports(tiny_engine):
    assert tiny_engine.report["versions"]["vllm"].startswith("0.32")
    assert tiny_engine.report["weight_sync"] == "object_store" and tiny_engine.report["dtype"] == "float32"
    assert tiny_engine.run(tiny_engine.ready()) == tiny_engine.report
    assert "LD_PRELOAD" not in os.environ and "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ


def test_engine_and_folder_have_the_same_fingerprints(tiny_engine):
    assert tiny_engine.run(tiny_engine.fingerprints()) == policy_fingerprints(tiny_engine.folder)


def test_completions(tiny_engine):
    prompt = tiny_prompt(tiny_engine.folder)
    completions = tiny_engine.run(tiny_engine.generate(prompt, 4, dataclasses.replace(SAMPLING, ignore_eos=False), [3, 4, 5, 3]))
    for completion, seed in zip(completions, [3, 4, 5, 3], strict=True):
        length = len(completion.token_ids)
        assert completion.token_ids.dtype == np.int32 and completion.logprobs.dtype == np.float32 and completion.logprobs.shape == (length,)
        assert (completion.logprobs <= 0).all() and completion.seed == seed
        assert completion.finish_reason == ("length" if length == 16 and completion.token_ids[-1] != 258 else "stop")
        assert sum(count for _, count in completion.weight_versions) == length
        assert not completion.text.endswith("<|im_end|>")
    assert same(completions[:1], completions[3:]) and not same(completions[:1], completions[1:2])


def test_images_are_processed_once_per_group(tiny_engine, monkeypatch):
    renderer, calls = tiny_engine._llm.renderer, []
    original = renderer.render_cmpl_async
    monkeypatch.setattr(renderer, "render_cmpl_async", lambda *args, **kwargs: calls.append(args) or original(*args, **kwargs))
    tiny_engine.run(tiny_engine.generate(tiny_prompt(tiny_engine.folder), 8, SAMPLING, range(8)))
    assert len(calls) == 1


def test_banned_tokens_are_never_sampled(tiny_engine):
    """Random weights give each of the 29 banned ids of 288 its share: without the ban about 100 of 1024 tokens."""
    prompt = tiny_prompt(tiny_engine.folder)
    sampling = dataclasses.replace(SAMPLING, temperature=2.0)
    completions = tiny_engine.run(tiny_engine.generate(prompt, 64, sampling, range(64)))
    banned = tiny_engine.run(tiny_engine.fingerprints())["banned_token_ids"]
    assert not any(holds_banned(completion.token_ids, banned) for completion in completions)


def test_logprobs_equal_those_of_transformers(tiny_engine):
    """Mean |difference| below 1e-3 (it is near 1e-6) on prompts with several images, at several temperatures and greedy."""
    model = load_policy(tiny_engine.folder)
    banned = tiny_engine.run(tiny_engine.fingerprints())["banned_token_ids"]
    for seed, sizes in enumerate([((56, 56), (56, 56), (168, 112)), ((112, 140), (28, 84), (56, 56), (84, 56), (140, 140))]):
        prompt = tiny_prompt(tiny_engine.folder, sizes=sizes, seed=seed)
        for temperature in (1.0, 0.6, 0.0):
            sampling = dataclasses.replace(SAMPLING, temperature=temperature)
            completions = tiny_engine.run(tiny_engine.generate(prompt, 2, sampling, [1, 2]))
            difference = mean_difference(model, tiny_engine.folder, prompt, completions, temperature or 1.0, banned)
            assert difference < 1e-4, (seed, temperature, difference)
    other = dataclasses.replace(prompt, images=tuple(255 - image for image in prompt.images))
    logprobs = transformers_logprobs(model, tiny_engine.folder, other, completions[0].token_ids, 1.0, banned)
    assert np.abs(logprobs - completions[0].logprobs).mean() > 1e-2, "the policy does not look at its images, so this test shows nothing"


def test_the_largest_logprobs_are_those_of_transformers(tiny_engine):
    """Asked for two, also of completions in a batch with others that ask for none; the completions themselves stay the same."""
    model, banned = load_policy(tiny_engine.folder), tiny_engine.run(tiny_engine.fingerprints())["banned_token_ids"]
    prompt, asking = tiny_prompt(tiny_engine.folder), dataclasses.replace(SAMPLING, top_logprobs=2)
    step = [(prompt, 2, asking, [1, 2]), (prompt, 2, SAMPLING, [1, 2])]
    with_two, without = tiny_engine.run(tiny_engine.generate_in_order(step))
    assert same(with_two, without) and all(completion.top_logprobs is None for completion in without)
    for completion in with_two:
        every = transformers_distribution(model, tiny_engine.folder, prompt, completion.token_ids, 1.0, banned)
        assert completion.top_logprobs.dtype == np.float32
        np.testing.assert_allclose(completion.top_logprobs, np.sort(every, axis=1)[:, :-3:-1], atol=1e-4)


def test_a_step_in_order_does_not_depend_on_what_was_before(tiny_engine):
    step = [(tiny_prompt(tiny_engine.folder, seed=i), 4, SAMPLING, [10 * i + j for j in range(4)]) for i in range(3)]
    first = tiny_engine.run(tiny_engine.generate_in_order(step))
    tiny_engine.run(tiny_engine.generate(step[1][0], 3, SAMPLING, [7, 8, 9]))
    second = tiny_engine.run(tiny_engine.generate_in_order(step))
    assert [len(group) for group in first] == [4, 4, 4] and all(map(same, first, second))


def test_more_prompts_than_fit_one_step(tiny_engine):
    """Seeded requests whose prompts exceed one forward pass together: vLLM must not take a prompt in parts (its CPU runner dies of it)."""

    async def scenario():
        prompts = [tiny_prompt(tiny_engine.folder, text=str(i) * 40, sizes=((84, 84),) * 3, seed=i) for i in range(12)]
        assert sum(len(prompt.token_ids) for prompt in prompts) > 2 * 512
        return await asyncio.gather(*[tiny_engine.engine.generate(prompt, 2, SAMPLING, [1, 2]) for prompt in prompts])

    assert all(len(group) == 2 for group in tiny_engine.run(scenario()))


def test_pause_holds_and_resume_goes_on(tiny_engine):
    async def scenario():
        await tiny_engine.pause("keep")
        task = asyncio.create_task(tiny_engine.engine.generate(tiny_prompt(tiny_engine.folder), 1, SAMPLING, [1]))
        done, _ = await asyncio.wait([task], timeout=0.5)
        await tiny_engine.resume()
        return bool(done), await task

    early, completions = tiny_engine.run(scenario())
    assert not early and len(completions) == 1


def test_abort_returns_what_there_is(tiny_engine):
    async def scenario():
        endless = dataclasses.replace(SAMPLING, max_response_tokens=400)
        prompt = tiny_prompt(tiny_engine.folder)
        a = asyncio.create_task(tiny_engine.engine.generate(prompt, 2, endless, [1, 2], label="a"))
        b = asyncio.create_task(tiny_engine.engine.generate(prompt, 1, SAMPLING, [1], label="b"))
        while (await tiny_engine.stats())["in_flight"] < 2:
            await asyncio.sleep(0.01)
        assert await tiny_engine.abort("a") == 2
        return await a, await b, await tiny_engine.stats()

    a, b, stats = tiny_engine.run(scenario())
    assert [completion.finish_reason for completion in a] == ["abort", "abort"] and b[0].finish_reason == "length"
    assert all(len(completion.token_ids) == len(completion.logprobs) < 400 for completion in a) and stats["in_flight"] == 0


def test_a_cancelled_call_stops_its_requests(tiny_engine):
    async def scenario():
        endless = dataclasses.replace(SAMPLING, max_response_tokens=400)
        task = asyncio.create_task(tiny_engine.engine.generate(tiny_prompt(tiny_engine.folder), 4, endless, range(4)))
        while not tiny_engine._llm.get_num_unfinished_requests():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return tiny_engine._llm.get_num_unfinished_requests(), await tiny_engine.stats()

    unfinished, stats = tiny_engine.run(scenario())
    assert unfinished == 0 and stats["in_flight"] == 0


def test_bad_requests_are_refused_and_do_no_harm(tiny_engine):
    prompt = tiny_prompt(tiny_engine.folder)
    with pytest.raises(PromptRejected, match="do not fit rollout.max_model_len = 512"):
        tiny_engine.run(tiny_engine.generate(prompt, 1, dataclasses.replace(SAMPLING, max_response_tokens=500), [1]))
    with pytest.raises(PromptRejected, match="17 images, more than rollout.max_images = 16"):
        tiny_engine.run(tiny_engine.generate(tiny_prompt(tiny_engine.folder, sizes=((28, 28),) * 17), 1, SAMPLING, [1]))
    with pytest.raises(PromptRejected, match="the prompt itself says"):
        tiny_engine.run(tiny_engine.generate(dataclasses.replace(prompt, token_ids=prompt.token_ids[1:]), 1, SAMPLING, [1]))
    with pytest.raises(ValueError, match="n = 2 and 1 seeds"):
        tiny_engine.run(tiny_engine.generate(prompt, 2, SAMPLING, [1]))
    with pytest.raises(ValueError, match="at least 0"):
        tiny_engine.run(tiny_engine.generate(prompt, 1, SAMPLING, [-1]))
    assert len(tiny_engine.run(tiny_engine.generate(prompt, 1, SAMPLING))) == 1


def test_sleep_is_nothing_on_a_cpu(tiny_engine):
    assert tiny_engine.run(tiny_engine.sleep()) is False and tiny_engine.run(tiny_engine.wake_up()) is False


def test_an_engine_that_sleeps_wakes_round_an_update(tiny_folder):
    """The order of calls that a GPU needs (no CPU sleeps): weights' memory, update, caches reset, cache's memory, and only then generation."""

    class Calls:
        errored, said = False, []

        def __getattr__(self, name):
            async def call(*arguments, **options):
                self.said.append((name, *(options.values() or arguments)))
                return arguments != (["weights"],)  # of wake_up: whether all memory is there again

            return call

    engine = RolloutEngine(str(tiny_folder), RolloutConfig(sleep=True))
    engine.device, engine.weight_sync, engine._llm = "cuda", "ipc", Calls()

    async def one_step():
        await engine.sleep(2)
        await engine.begin_weight_sync()
        await engine.finish_weight_sync("3")

    asyncio.run(one_step())
    names = [said[0] for said in Calls.said]
    assert Calls.said[:2] == [("sleep", 2), ("wake_up", ["weights"])]
    assert names[2:] == ["pause_generation", "update_weight_version", "reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache", "wake_up", "resume_generation", "get_weight_version"]
    assert ("wake_up", ["kv_cache"]) in Calls.said


def test_a_broken_engine_says_so(tiny_engine):
    tiny_engine.engine._broken = "a test broke it"
    try:
        with pytest.raises(EngineBroken, match="a test broke it; kill it"):
            tiny_engine.run(tiny_engine.generate(tiny_prompt(tiny_engine.folder), 1, SAMPLING, [1]))
    finally:
        tiny_engine.engine._broken = None


@pytest.mark.long
def test_a_dead_vllm_process_is_noticed(tiny_folder, engine_loop):
    """Killed from outside: calls in flight and later ones end with EngineBroken within seconds."""
    from conftest import RunningEngine

    engine = RunningEngine(tiny_folder, engine_loop)
    (process,) = engine._llm.engine_core.resources.engine_manager.processes

    async def scenario():
        task = asyncio.create_task(engine.engine.generate(tiny_prompt(engine.folder), 2, dataclasses.replace(SAMPLING, max_response_tokens=400), [1, 2]))
        await asyncio.sleep(1)
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(EngineBroken, match="died"):
            await asyncio.wait_for(task, 20)
        with pytest.raises(EngineBroken, match="kill it and start another"):
            await engine.weight_version()

    engine.run(scenario())
    engine.run(engine.shutdown())
