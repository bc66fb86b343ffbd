"""Who rates: a model behind an OpenAI-compatible endpoint, or one that vLLM runs on this machine for as long as the command lasts.

Both answer a chat (messages of the OpenAI protocol, frames as data URLs) with a text, and are asked to keep it to a JSON schema.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import httpx

from cluster import paths
from cluster.difficulty_ratings import BadReply
from cluster.errors import UserError

MAX_TOKENS = 1024  # of a reply; ratings alone take about 60, an endpoint that knows no schemas may think first
TOO_LONG = "over the context length"
_RETRIED = (408, 409, 429)  # and every 5xx


class Unrated(Exception):
    """An episode that will not be rated however often it is asked. `reason` is one of a few phrases, for the summary."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class TryAgain(Exception):
    """A failure that may pass."""


class Rater(Protocol):
    async def reply(self, messages: Sequence[dict], temperature: float) -> str:
        """Raises TryAgain, BadReply (no text in the answer), Unrated, or UserError if every other question will fail too."""

    async def close(self) -> None: ...


class EndpointRater:
    """A model behind `url`, which ends in /v1. The schema is asked for as `response_format` until the server refuses it."""

    def __init__(self, url: str, model: str, schema: Mapping, api_key: str = "", timeout_seconds: float = 120.0):
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.url, self.model = url, model
        self._client = httpx.AsyncClient(base_url=url.rstrip("/"), headers=headers, timeout=timeout_seconds)
        self._format = {"response_format": {"type": "json_schema", "json_schema": {"name": "ratings", "strict": True, "schema": schema}}}

    async def reply(self, messages: Sequence[dict], temperature: float) -> str:
        body = {"model": self.model, "messages": messages, "temperature": temperature, "max_tokens": MAX_TOKENS}
        form = self._format
        response = await self._post(body | form)
        if form and response.status_code in (400, 422):
            response = await self._post(body)
            if response.status_code == 200:
                self._format = {}
        status, what = response.status_code, f"status {response.status_code}: {response.text[:300]}"
        if status in (401, 403, 404):
            raise UserError(f"{self.url} answers {status}: {response.text[:300]}", "check --endpoint, --model and the key in --api-key-env")
        if status >= 500 or status in _RETRIED:
            raise TryAgain(what)
        if status != 200:
            raise Unrated(TOO_LONG if "context length" in response.text else "refused", what)
        return _content(response)

    async def _post(self, body: dict) -> httpx.Response:
        try:
            return await self._client.post("/chat/completions", json=body)
        except httpx.HTTPError as error:
            raise TryAgain(f"{type(error).__name__}: {error}") from error

    async def close(self) -> None:
        await self._client.aclose()


def _content(response: httpx.Response) -> str:
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise BadReply(f"not a chat completion: {response.text[:200]!r}", "check --endpoint") from error
    if not isinstance(content, str):
        raise BadReply(f"a chat completion whose content is {content!r}", "use a model that answers in text")
    return content


class VllmRater:
    """A checkpoint folder or hub id in vLLM, on the GPU if there is one, else on the CPU.

    All questions in flight are one continuous batch, and questions about the same frames share them by prefix caching. vLLM starts
    with the first question, so that a command whose ratings are all cached loads no model. `options` are arguments of vLLM's
    `AsyncEngineArgs` and come before ours.
    """

    def __init__(self, model: str, schema: Mapping, images: int, options: Mapping[str, Any]):
        self.model = paths.resolve_path(model, "--model", allow_hub=True)
        self.schema, self.images, self.options = schema, images, dict(options)
        self._llm = None
        self._numbers = itertools.count()

    async def reply(self, messages: Sequence[dict], temperature: float) -> str:
        if self._llm is None:
            self._start()
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.renderers.params import ChatParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
        from vllm.v1.engine.exceptions import EngineDeadError

        renderer = self._llm.renderer
        chat = ChatParams(chat_template_kwargs={"add_generation_prompt": True})
        tokens = renderer.default_chat_tok_params.with_kwargs(add_special_tokens=False)  # the chat template writes them
        sampling = SamplingParams(
            temperature=temperature, max_tokens=MAX_TOKENS, structured_outputs=StructuredOutputsParams(json=dict(self.schema)), output_kind=RequestOutputKind.FINAL_ONLY
        )
        try:
            _, (prompt,) = await renderer.render_chat_async([list(messages)], chat, tokens)
            async for output in self._llm.generate(prompt, sampling, str(next(self._numbers))):
                pass
        except EngineDeadError as error:
            raise UserError("vLLM's engine process died; its own log above says why", "mend the cause and run the command again: it goes on where it was") from error
        except (VLLMClientError, ValueError) as error:
            raise Unrated(TOO_LONG if "context length" in str(error) or "max_model_len" in str(error) else "refused", str(error)) from error
        done = output.outputs[0]
        if done.finish_reason not in ("stop", "length"):
            raise TryAgain(f"vLLM ended the reply after {len(done.token_ids)} tokens: {done.finish_reason}")
        return done.text

    def _start(self) -> None:
        from rollout import vllm_options
        from rollout.config import RolloutConfig, resolve_device

        self.device = resolve_device()
        options = {
            "model": self.model,
            "max_model_len": -1,  # the model's own, or as much as fits in memory
            "limit_mm_per_prompt": {"image": self.images, "video": 0},
            "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},  # else a reply may be white space for ever
            "disable_log_stats": True,
        }
        if self.device == "cpu":
            options |= {"enforce_eager": True, "distributed_executor_backend": "uni", "kv_cache_memory_bytes": 2**30, "skip_mm_profiling": True}
        options |= self.options
        like = RolloutConfig(tensor_parallel=options.get("tensor_parallel_size", 1))
        threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
        try:
            with vllm_options.applied(vllm_options.environment(like, self.device, "", threads)):
                import vllm
                from vllm.v1.engine.async_llm import AsyncLLM

                config = vllm.AsyncEngineArgs(**options).create_engine_config()
                if not config.model_config.is_multimodal_model:
                    raise UserError(f"--model {self.model}: a {config.model_config.hf_config.model_type!r} model without images", "give a vision-language model")
                self._llm = AsyncLLM.from_vllm_config(config)
        except (TypeError, ValueError, RuntimeError, OSError) as error:
            raise UserError(f"vLLM cannot run {self.model}: {error}", "see its log above; --vllm KEY=VALUE changes its arguments") from error

    async def close(self) -> None:
        if self._llm is not None:
            if self._llm.output_handler is not None:
                self._llm.output_handler.cancel()  # else it logs the end of the engine's process as a failure
            # On a CPU nothing is worth the seconds of an orderly exit; on a GPU the process should free its memory itself.
            self._llm.shutdown(timeout=0.2 if self.device == "cpu" else 10.0)
