"""vLLM as a rollout engine: completions with log-probs and weight versions, pausing, weight updates, caches, fingerprints.

`RolloutEngine` is a plain async class round vLLM's `AsyncLLM`; `rollout.actor` makes a Ray actor of it. vLLM is imported when
the engine starts, so this module is cheap to import.
"""

import asyncio
import itertools
import os
import shutil
import time
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from rollout import vllm_options, weight_transfer
from rollout.banned_tokens import banned_token_ids
from rollout.completion import Completion
from rollout.config import RolloutConfig, SamplingConfig, resolve_device, resolve_dtype, resolve_weight_sync
from rollout.fingerprints import policy_fingerprints, sha256_of


class EngineBroken(RuntimeError):
    """The engine must not be used any more (a weight update failed half-way, or vLLM's process died): kill it and start another."""


class PromptRejected(ValueError):
    """A prompt that the engine cannot answer as it stands: too long, too many images, or expanded differently by vLLM."""


class RolloutEngine:
    """One vLLM engine for one policy.

    `model` is a checkpoint folder or hub id; `dtype` "auto|float32|bfloat16"; `device` "auto|cpu|cuda". Nothing starts before
    `ready()`. All methods are coroutines of one event loop.
    """

    def __init__(
        self,
        model: str,
        config: RolloutConfig | None = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
        seed: int = 0,
        shares_gpu_with_learner: bool = True,
    ):
        self.model = str(model)
        self.config = config or RolloutConfig()
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self.weight_sync = resolve_weight_sync(self.config.weight_sync, self.device, shares_gpu_with_learner=shares_gpu_with_learner)
        self.seed = seed
        self._llm = None
        self._broken: str | None = None
        self._labels = itertools.count()
        self._in_flight: dict[str, set[str]] = {}
        self._updating = False
        self._asleep = False
        self._in_order = False
        self._report: dict = {}
        self._shapes: dict | None = None
        self._auto_threads = 1  # small matrices gain nothing from threads, which spin while they wait: ten times slower on busy cores
        self._stats = {"prompts": 0, "completions": 0, "prompt_tokens": 0, "response_tokens": 0, "weight_updates": 0, "weight_update_seconds": 0.0}

    # ---- life ----

    async def ready(self) -> dict:
        """Start vLLM if it is not running; `{"model", "device", "dtype", "weight_sync", "versions", "seconds", ...}`."""
        if self._llm is None:
            self._start()
            await self._call("starting", self._llm.update_weight_version("initial"))
        self._check()
        return self._report

    def _start(self) -> None:
        started = time.perf_counter()
        from transformers import AutoConfig, AutoTokenizer

        local = os.path.isdir(self.model)
        if not local and (os.path.isabs(self.model) or self.model.startswith(".") or self.model.count("/") != 1):
            raise FileNotFoundError(f"policy {self.model!r} is not a folder; give the path of a checkpoint or a hub id like Qwen/Qwen2.5-VL-7B-Instruct")
        model_config = AutoConfig.from_pretrained(self.model)
        if getattr(model_config, "image_token_id", None) is None or getattr(model_config, "vision_config", None) is None:
            raise ValueError(f"policy {self.model!r} is a {model_config.model_type!r} model without images; use a Qwen2.5-VL or Qwen3-VL checkpoint")
        self._tokenizer = AutoTokenizer.from_pretrained(self.model)
        self._banned = banned_token_ids(self._tokenizer, model_config)
        if model_config.get_text_config().hidden_size >= 1024:
            self._auto_threads = max(1, len(os.sched_getaffinity(0)) // 2)
        threads = self.config.cpu_threads or self._auto_threads
        with vllm_options.applied(vllm_options.environment(self.config, self.device, self.weight_sync, threads)):
            import vllm
            from vllm.v1.engine.async_llm import AsyncLLM

            vllm_options.check_plugin()
            if self.device == "cpu":
                vllm_options.register_classes(model_config.architectures or ())
            options = vllm_options.engine_options(self.model, self.config, self.device, self.dtype, self.seed, self.weight_sync, self._banned)
            vllm_config = vllm.AsyncEngineArgs(**options).create_engine_config()
            if self.device == "cpu":
                # Room for the images of every prompt that a step may take, so that none is taken in part (see below).
                vllm_config.scheduler_config.max_num_encoder_input_tokens *= 2
                vllm_config.scheduler_config.encoder_cache_size *= 2
            self._llm = AsyncLLM.from_vllm_config(vllm_config, disable_log_stats=True)
        self._report = {
            "model": self.model,
            "device": self.device,
            "dtype": self.dtype,
            "weight_sync": self.weight_sync,
            "versions": {name: vllm_options.version_of(name) for name in ("vllm", "torch", "transformers")},
            "max_sequences": vllm_config.scheduler_config.max_num_seqs,
            "kv_cache_tokens": (vllm_config.cache_config.num_gpu_blocks or 0) * vllm_config.cache_config.block_size,
            "seconds": time.perf_counter() - started,
        }

    async def shutdown(self, orderly: bool = False) -> None:
        """Stop vLLM and its processes; the engine cannot be started again. On a CPU nothing is worth the seconds of an orderly exit, unless
        somebody reads what Python says of semaphores that were left behind; on a GPU the process always frees its memory itself."""
        llm, self._llm = self._llm, None
        self._broken = self._broken or "it was shut down"
        if llm is not None:
            if llm.output_handler is not None:
                llm.output_handler.cancel()  # else it logs the end of the engine's process as a failure
            llm.shutdown(timeout=0.2 if self.device == "cpu" and not orderly else 10.0)

    def _check(self) -> None:
        if self._broken:
            raise EngineBroken(f"this rollout engine must not be used any more: {self._broken}; kill it and start another")
        if self._llm is None:
            raise RuntimeError("this rollout engine has not started; await ready() first")

    async def _call(self, what: str, call: Awaitable):
        """A call to vLLM's process, within `sync_timeout_seconds` (vLLM itself waits for ever, even for a dead process)."""
        llm, task = self._llm, asyncio.ensure_future(call)
        deadline = time.monotonic() + self.config.sync_timeout_seconds
        try:
            while not task.done():
                await asyncio.wait([task], timeout=1.0)
                if not task.done() and llm.errored:
                    raise self._died(f"while {what}")
                if not task.done() and time.monotonic() > deadline:
                    self._broken = f"vLLM did not answer in {self.config.sync_timeout_seconds:g} s while {what}"
                    raise EngineBroken(self._broken)
            return task.result()
        finally:
            task.cancel()

    def _died(self, when: str) -> EngineBroken:
        self._broken = self._broken or f"vLLM's engine process died {when}; its own log says why"
        return EngineBroken(self._broken)

    # ---- generation ----

    async def generate(
        self, prompt, n: int, sampling: SamplingConfig, seeds: Sequence[int] | None = None, label: str | None = None
    ) -> list[Completion]:
        """`n` completions of one prompt (`rollout.prompts.Prompt`), the i-th drawn with `seeds[i]`.

        The prompt is processed once (images too); each completion is a vLLM request of its own that shares the prompt's KV by
        prefix caching. vLLM's own n > 1 would make the same requests, but with the seeds s, s+1, …, which neighbouring
        prompts would share. Raises PromptRejected or EngineBroken. `label` names the requests for `abort`.
        """
        if self._in_order:
            raise RuntimeError("generate was called during generate_in_order, whose order it would spoil; wait for that to end")
        (completions,) = await self._run([(prompt, n, sampling, seeds, label)])
        return completions

    async def generate_in_order(self, requests: Sequence[tuple]) -> list[list[Completion]]:
        """Deterministic mode: all `(prompt, n, sampling, seeds)` of a step, enqueued in this order before the first token is drawn.

        The engine must be idle. Caches are reset first, so the result does not depend on what the engine did before.
        """
        self._check()
        if self._in_flight or self._in_order:
            raise RuntimeError(f"generate_in_order needs an idle engine, but {len(self._in_flight)} groups are in flight")
        self._in_order = True
        try:
            await self._call("pausing", self._llm.pause_generation(mode="keep", clear_cache=True))
            return await self._run([(*request, None) for request in requests], resume=True)
        finally:
            self._in_order = False
            if self._llm is not None and not self._llm.errored:
                await self._llm.resume_generation()

    async def _run(self, groups: Sequence[tuple], resume: bool = False) -> list[list[Completion]]:
        self._check()
        labels, collectors = [], []
        try:
            for prompt, n, sampling, seeds, label in groups:
                params = self._sampling_params(prompt, n, sampling, seeds)
                engine_input = await self._render(prompt)
                label = f"{label or prompt.episode_id}#{next(self._labels)}"
                labels.append(label)
                requests = self._in_flight.setdefault(label, set())
                for i, one in enumerate(params):
                    collector = await self._llm.add_request(f"{label}/{i}", engine_input, one)
                    requests.add(collector.request_id)
                    collectors.append(collector)
            if resume:
                await self._llm.resume_generation()
            outputs = [await _final(collector) for collector in collectors]
        except BaseException as error:
            # Cancelled or failed half-way: none of these requests may go on unseen.
            pending = [request for label in labels for request in self._in_flight[label]]
            if pending and self._llm is not None and not self._llm.errored:
                await self._llm.abort(pending, internal=True)
            if self._llm is not None and self._llm.errored:
                raise self._died("while generating") from error
            raise
        finally:
            for label in labels:
                self._in_flight.pop(label, None)
        outputs = iter(outputs)
        return [self._completions(prompt, n, sampling, seeds, outputs) for prompt, n, sampling, seeds, _ in groups]

    def _completions(self, prompt, n: int, sampling: SamplingConfig, seeds, outputs: Iterator) -> list[Completion]:
        completions = [self._completion(next(outputs), sampling, seed) for seed in (seeds if seeds is not None else [None] * n)]
        self._stats["prompts"] += 1
        self._stats["prompt_tokens"] += len(prompt.token_ids)
        self._stats["completions"] += n
        self._stats["response_tokens"] += sum(len(completion.token_ids) for completion in completions)
        return completions

    def _completion(self, output, sampling: SamplingConfig, seed: int | None) -> Completion:
        token_ids = np.asarray(output.token_ids, np.int32)
        logprobs = np.asarray(output.logprobs.logprobs if output.logprobs is not None else (), np.float32)
        logprobs = logprobs.reshape(-1, 1 + sampling.top_logprobs)  # at each position the sampled token, then the most likely ones
        stopped_by_token = output.finish_reason == "stop" and not isinstance(output.stop_reason, str)
        text_ids = token_ids[:-1] if stopped_by_token else token_ids
        spans = tuple((span.version, span.end - span.start) for span in output.weight_versions or ())
        return Completion(
            token_ids=token_ids,
            logprobs=np.ascontiguousarray(logprobs[:, 0]),
            text=self._tokenizer.decode(text_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False),
            finish_reason=output.finish_reason,
            weight_versions=spans,
            seed=seed,
            top_logprobs=logprobs[:, 1:] if sampling.top_logprobs else None,
        )

    def _sampling_params(self, prompt, n: int, sampling: SamplingConfig, seeds: Sequence[int] | None) -> list:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if n < 1 or (seeds is not None and len(seeds) != n):
            raise ValueError(f"generate got n = {n} and {'no' if seeds is None else len(seeds)} seeds; give n >= 1 and one seed for each completion")
        if seeds is not None and any(not 0 <= seed < 2**63 for seed in seeds):
            raise ValueError(f"seeds are {list(seeds)}; each must be at least 0 and below 2^63")
        room = self.config.max_model_len - len(prompt.token_ids)
        if room < sampling.max_response_tokens:
            raise PromptRejected(
                f"episode {prompt.episode_id}: a prompt of {len(prompt.token_ids)} tokens and up to {sampling.max_response_tokens} response tokens "
                f"do not fit rollout.max_model_len = {self.config.max_model_len}; raise it, or show fewer or smaller frames"
            )
        if len(prompt.images) > self.config.max_images:
            raise PromptRejected(f"episode {prompt.episode_id}: {len(prompt.images)} images, more than rollout.max_images = {self.config.max_images}")
        return [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_response_tokens,
                seed=None if sampling.temperature == 0 else seed,
                stop=list(sampling.stop),
                stop_token_ids=list(sampling.stop_token_ids),
                include_stop_str_in_output=True,
                ignore_eos=sampling.ignore_eos,
                logprobs=sampling.top_logprobs,  # besides the sampled token's
                flat_logprobs=True,
                detokenize=bool(sampling.stop),  # decoded once at the end instead; stop strings need it in each step
                skip_special_tokens=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            for seed in (seeds if seeds is not None else [None] * n)
        ]

    async def _render(self, prompt):
        """Token ids and processed images, once for all completions of a group. Images are not resized (they are at size)."""
        from PIL import Image
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        raw = {
            "prompt_token_ids": [int(token) for token in prompt.vllm_token_ids],
            "multi_modal_data": {"image": [Image.fromarray(image) for image in prompt.images]},
            "mm_processor_kwargs": {"do_resize": False},
        }
        (engine_input,) = await self._llm.renderer.render_cmpl_async([parse_model_prompt(self._llm.model_config, raw)])
        expanded = np.asarray(engine_input["prompt_token_ids"])
        if not np.array_equal(expanded, prompt.token_ids):
            raise PromptRejected(
                f"episode {prompt.episode_id}: vLLM expands the prompt to {len(expanded)} tokens, the prompt itself says {len(prompt.token_ids)}; "
                "patch and merge sizes, or the tokenizer, differ between engine and prompt builder"
            )
        return engine_input

    async def abort(self, label: str | None = None) -> int:
        """End all requests (or those of one label) now; their `generate` calls return what there is, with finish_reason "abort"."""
        self._check()
        pending = [request for name, requests in self._in_flight.items() if label is None or name.rpartition("#")[0] == label for request in requests]
        if pending:
            await self._llm.abort(pending, internal=True)
        return len(pending)

    async def pause(self, mode: str = "keep", clear_cache: bool = False) -> None:
        """Stop drawing tokens: "keep" freezes requests, "wait" lets them finish, "abort" ends them. New ones queue until `resume`."""
        self._check()
        await self._call("pausing", self._llm.pause_generation(mode=mode, clear_cache=clear_cache))

    async def resume(self) -> None:
        """Go on after `pause`."""
        self._check()
        await self._call("resuming", self._llm.resume_generation())

    async def reset_caches(self) -> None:
        """Forget all KV prefixes, processed images and encoder outputs; needed after each weight update (old weights made them)."""
        self._check()
        if not await self._call("resetting caches", self._llm.reset_prefix_cache()):
            raise RuntimeError("the prefix cache cannot be reset while requests run; pause the engine with clear_cache=True, or let them finish")
        await self._call("resetting caches", self._llm.reset_mm_cache())
        await self._call("resetting caches", self._llm.reset_encoder_cache())

    async def sleep(self, level: int = 1) -> bool:
        """Give GPU memory back (1: weights to host memory, 2: weights dropped, a full sync must follow). False, doing nothing, where sleep is off."""
        self._check()
        if self.device == "cpu" or not self.config.sleep:
            return False
        await self._call("going to sleep", self._llm.sleep(level=level))
        self._asleep = True
        return True

    async def wake_up(self, tags: Sequence[str] | None = None) -> bool:
        """Take the memory again: `["weights"]`, `["kv_cache"]`, or without tags all of it. False where sleep is off. A weight update does it itself."""
        self._check()
        if self.device == "cpu" or not self.config.sleep:
            return False
        self._asleep = not await self._call("waking up", self._llm.wake_up(list(tags) if tags is not None else None))
        return True

    # ---- weights ----

    async def begin_weight_sync(self, mode: str = "keep") -> None:
        """Pause (requests in flight: "keep", "wait" or "abort"), drop all caches and open the model for new weights. An engine that sleeps takes the memory of its
        weights again first, and that of its KV cache when the update is finished.

        With `object_store`, `receive_weights` follows for every bucket; with `ipc` and `nccl`, the learner's
        `send_weights()` of vLLM's trainer API drives the four methods below instead. `finish_weight_sync` ends both.
        """
        self._check()
        if self._updating:
            raise RuntimeError("a weight update is in progress already; finish it first")
        self._updating, self._update_started = True, time.perf_counter()
        if self._asleep:
            await self._step("waking up", self.wake_up(["weights"]))
        await self._step("pausing", self._llm.pause_generation(mode=mode, clear_cache=True))
        if self.weight_sync == weight_transfer.BACKEND:
            await self.start_weight_update()

    async def receive_weights(self, bucket: Mapping, complete: bool = True) -> str:
        """Load one bucket (see `rollout.weight_transfer`); the SHA-256 (hex) of the bytes that the engine's process read.

        `complete=False` allows an update that leaves whole layers as they are (frozen parts of the policy).
        """
        self._check()
        if self.weight_sync != weight_transfer.BACKEND:
            raise RuntimeError(f"receive_weights is for weight_sync object_store; this engine uses {self.weight_sync}")
        if not self._updating:
            raise RuntimeError("no weight update is in progress; call begin_weight_sync first")
        if "index" not in bucket or "data" not in bucket:
            bucket = weight_transfer.pack_bucket(bucket)
        await self._step("checking a bucket", self._check_bucket(bucket))
        names, dtypes, shapes, offsets = zip(*bucket["index"])
        path = await asyncio.to_thread(weight_transfer.write_bucket, bucket)
        try:
            info = dict(path=path, names=names, dtype_names=dtypes, shapes=[list(shape) for shape in shapes], offsets=offsets, complete=complete)
            await self._step("loading weights", self._llm.collective_rpc("update_weights", kwargs={"update_info": info}))
            (received,) = await self._step("reading digests", self._llm.collective_rpc("received_weights"))
        finally:
            os.unlink(path)
        return received["digests"][-1]

    async def _check_bucket(self, bucket: Mapping) -> None:
        weight_transfer.check_bucket(bucket)
        if self._shapes is None:
            from transformers.utils import cached_file

            self._shapes = weight_transfer.checkpoint_shapes(os.path.dirname(cached_file(self.model, "config.json")))
        if self._shapes:
            weight_transfer.check_shapes(bucket, self._shapes)

    async def finish_weight_sync(self, version: str | int) -> str:
        """Close the update, label the weights `version`, drop caches, go on generating; returns the version vLLM reports."""
        self._check()
        if not self._updating:
            raise RuntimeError("no weight update is in progress; call begin_weight_sync first")
        if self.weight_sync == weight_transfer.BACKEND:
            await self.finish_weight_update()
        await self._step("setting the version", self._llm.update_weight_version(str(version)))
        await self._step("resetting caches", self.reset_caches())
        if self._asleep:
            await self._step("waking up", self.wake_up(["kv_cache"]))
        await self._step("resuming", self._llm.resume_generation())
        self._updating = False
        self._stats["weight_updates"] += 1
        self._stats["weight_update_seconds"] += time.perf_counter() - self._update_started
        return await self._step("reading the version", self._llm.get_weight_version())

    async def _step(self, what: str, call: Awaitable):
        """One call of a weight update; any failure breaks the engine (its model is half old, half new)."""
        try:
            return await self._call(what, call)
        except EngineBroken:
            raise
        except Exception as error:
            self._broken = f"a weight update failed while {what}: {error}"
            raise EngineBroken(self._broken) from error

    async def init_weight_transfer_engine(self, request) -> None:
        """vLLM's `VLLMWeightSyncClient` protocol, part 1 of 4 (`ipc` and `nccl`): called by the learner's rank 0 through `TimedRayClient`."""
        self._check()
        await self._step("connecting to the learner", self._llm.init_weight_transfer_engine(request))

    async def start_weight_update(self) -> None:
        """Part 2 of 4: open the model for checkpoint-format weights."""
        self._check()
        await self._step("opening the model", self._llm.start_weight_update())

    async def update_weights(self, request) -> None:
        """Part 3 of 4: receive one chunk as vLLM's backend describes it."""
        self._check()
        await self._step("loading weights", self._llm.update_weights(request))

    async def finish_weight_update(self) -> None:
        """Part 4 of 4: close the model."""
        self._check()
        await self._step("closing the model", self._llm.finish_weight_update())

    async def hash_weights(self) -> None:
        """Hash the weights of the next update as they arrive, by any backend; `hashed_weights` ends it."""
        self._check()
        await self._step("beginning to hash", self._llm.collective_rpc("hash_weights"))

    async def hashed_weights(self) -> list[dict[str, str]]:
        """What each worker of the engine received since `hash_weights`: {name in the checkpoint: SHA-256 (hex) of the tensor's bytes}."""
        self._check()
        return await self._step("reading hashes", self._llm.collective_rpc("hashed_weights"))

    async def weight_version(self) -> str:
        """The label of the weights in use ("initial" before the first update)."""
        self._check()
        return await self._call("reading the version", self._llm.get_weight_version())

    async def weights_checksum(self) -> str:
        """SHA-256 (hex) over vLLM's own digests of all parameters, in its fused form. On a CPU, packed layers are not in it."""
        self._check()
        digests = await self._call("hashing weights", self._llm.compute_weight_checksums())
        return sha256_of(digests)

    # ---- what it does ----

    async def start_profile(self, passes: int) -> None:
        """Record the operators of the next `passes` forward passes, or of those until `stop_profile`, with torch.profiler."""
        self._check()
        await self._call("starting the profiler", self._llm.start_profile(max_iterations=passes))

    async def stop_profile(self) -> list[bytes]:
        """A gzipped Chrome trace of each worker."""
        self._check()
        await self._call("stopping the profiler", self._llm.stop_profile())
        folder = Path(vllm_options.profile_folder())
        traces = [file.read_bytes() for file in sorted(folder.glob("*.json.gz"))]
        shutil.rmtree(folder, ignore_errors=True)
        return traces

    # ---- what it is ----

    async def fingerprints(self) -> dict:
        """What must be equal in engine, prompt builder and learner (see `policy_fingerprints`), from the engine's own objects."""
        self._check()
        return policy_fingerprints(self.model, tokenizer=self._llm.get_tokenizer(), vocab_size=self._llm.model_config.get_vocab_size())

    async def stats(self) -> dict:
        """Counts since the start: prompts, completions, tokens, weight updates and their seconds; in-flight groups."""
        return {**self._stats, "in_flight": len(self._in_flight)}


async def _final(collector):
    """The finished output of one vLLM request (there is only one, `FINAL_ONLY`)."""
    while True:
        output = collector.get_nowait() or await collector.get()
        if output.finished:
            return output.outputs[0]
