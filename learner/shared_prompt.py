"""Attention over packed rows in which the G completions of a group share one copy of their prompt.

A micro-batch is one row of tokens without padding: all its prompts, then all its completions. Every layer but attention
works on that row token by token. Attention sees two padded views of it: prompts (causal among themselves), and completions,
each of which attends to its group's prompt and to itself. That is what G separate rows [prompt, completion] compute, but
the prompt's share of the work (and its vision tokens) is done once, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ATTENTION = "shared_prompt"


@dataclass(frozen=True)
class SharedPromptLayout:
    """Where each padded position of the two views comes from. T tokens, B prompts of up to P, N completions of up to R.

    padded_to_packed (B * P + N * R,): packed position of each padded one, 0 where there is padding.
    packed_to_padded (T,): the inverse. padding (padded positions without a token).
    group_of_response (N,): which prompt a completion follows.
    mask (N, 1, R, P + R): 0 where a completion's token may look, -inf elsewhere; None where N = 0.
    """

    prompts: tuple[int, int]
    responses: tuple[int, int]
    padded_to_packed: Tensor
    packed_to_padded: Tensor
    padding: Tensor
    group_of_response: Tensor
    mask: Tensor | None


def shared_prompt_layout(
    prompt_lengths: Sequence[int], response_lengths: Sequence[int], group_of_response: Sequence[int],
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
) -> SharedPromptLayout:
    """Layout of a row that holds all prompts, one after the other, then all responses (lengths may be 0 for responses).

    `group_of_response[i]` is the index of the prompt that response i continues; `dtype` is that of queries and keys.
    """
    prompt_lengths, response_lengths = np.asarray(prompt_lengths, np.int64), np.asarray(response_lengths, np.int64)
    group_of_response = np.asarray(group_of_response, np.int64)
    # Responses of length 0 have no token in the row and no query.
    kept = response_lengths > 0
    response_lengths, group_of_response = response_lengths[kept], group_of_response[kept]
    P, R = int(prompt_lengths.max()), int(response_lengths.max(initial=0))
    B, N = len(prompt_lengths), len(response_lengths)
    valid = np.concatenate(
        [(np.arange(P) < prompt_lengths[:, None]).reshape(-1), (np.arange(R) < response_lengths[:, None]).reshape(-1)]
    )
    packed_to_padded = np.flatnonzero(valid)
    padded_to_packed = np.where(valid, np.cumsum(valid) - 1, 0)
    tensor = lambda array: torch.from_numpy(array).to(device)
    mask = None
    if N:
        # Made where it is used: it is the largest thing here, and the same for all layers.
        position, own = torch.arange(P + R, device=device), P + torch.arange(R, device=device)
        to_prompt = position < tensor(prompt_lengths[group_of_response])[:, None, None]
        to_itself = (position >= P) & (position <= own[:, None])
        mask = torch.zeros(N, 1, R, P + R, device=device, dtype=dtype).masked_fill_(~(to_prompt | to_itself)[:, None], float("-inf"))
    return SharedPromptLayout(
        (B, P), (N, R), tensor(padded_to_packed), tensor(packed_to_padded), tensor(np.flatnonzero(~valid)), tensor(group_of_response), mask
    )


class _Unpack(torch.autograd.Function):
    """Packed rows (T, ...) -> padded rows. The gather is one to one apart from padding, so its backward is a gather too."""

    @staticmethod
    def forward(ctx, packed: Tensor, layout: SharedPromptLayout) -> Tensor:
        ctx.layout = layout
        return packed.index_select(0, layout.padded_to_packed)

    @staticmethod
    def backward(ctx, grad: Tensor):
        # Padding is dropped: no query looks at padded keys and no padded query's output is read, so nothing flows there.
        return grad.index_select(0, ctx.layout.packed_to_padded), None


class _Pack(torch.autograd.Function):
    """Padded rows -> packed rows (T, ...); padding gets zero gradient."""

    @staticmethod
    def forward(ctx, padded: Tensor, layout: SharedPromptLayout) -> Tensor:
        ctx.layout = layout
        return padded.index_select(0, layout.packed_to_padded)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.index_select(0, ctx.layout.padded_to_packed)
        return grad.index_fill_(0, ctx.layout.padding, 0.0) if len(ctx.layout.padding) else grad, None


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    """Tensors (rows, length, heads, width); causal if there is no mask."""
    grouped = key.shape[2] != query.shape[2]
    if grouped and query.is_cuda and mask is not None:
        # With a mask, CUDA's fused kernels do not take fewer key heads than query heads.
        repeats, grouped = query.shape[2] // key.shape[2], False
        key, value = key.repeat_interleave(repeats, 2), value.repeat_interleave(repeats, 2)
    out = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
        attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped,
    )
    return out.transpose(1, 2)


def shared_prompt_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, *, scaling, shared_prompt_layout=None, **kwargs):
    """transformers' attention interface: query (1, heads, T, width), key and value (1, key heads, T, width) -> (1, T, heads, width).

    `shared_prompt_layout`: an argument of the model's forward pass. Without it (generation, plain batches) this is the usual SDPA.
    """
    layout = shared_prompt_layout
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if kwargs.get("dropout"):
        raise ValueError(f"attention dropout {kwargs['dropout']} is not supported with shared prompts; set it to 0 in the policy's config")
    (B, P), (N, R) = layout.prompts, layout.responses
    q, k, v = (_Unpack.apply(x[0].transpose(0, 1), layout) for x in (query, key, value))
    split = lambda x: (x[: B * P].view(B, P, *x.shape[1:]), x[B * P :].view(N, R, *x.shape[1:]))
    (q_prompt, q_response), (k_prompt, k_response), (v_prompt, v_response) = split(q), split(k), split(v)
    outputs = [_attend(q_prompt, k_prompt, v_prompt, scaling, None).reshape(B * P, *q.shape[1:])]
    if N:
        k_all = torch.cat([k_prompt.index_select(0, layout.group_of_response), k_response], 1)
        v_all = torch.cat([v_prompt.index_select(0, layout.group_of_response), v_response], 1)
        outputs.append(_attend(q_response, k_all, v_all, scaling, layout.mask).reshape(N * R, *q.shape[1:]))
    return _Pack.apply(torch.cat(outputs), layout)[None], None


def register() -> None:
    """Make `attn_implementation="shared_prompt"` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, shared_prompt_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
