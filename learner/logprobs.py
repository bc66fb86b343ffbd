"""Log-probabilities of response tokens from hidden states, a chunk of the vocabulary's logits at a time.

Full logits of 8 x 4,096 tokens over 152k words are 20 GB in float32. Here a chunk's logits live only while its log-probs (and,
in the backward pass, its gradients) are taken; they are computed twice instead of kept. Reductions are in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


WORDS = 8192  # of the vocabulary, whose gradients are computed at a time


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, banned: Tensor, chunk: int, entropy: bool, train_entropy: bool):
        ctx.temperature, ctx.chunk, ctx.train_entropy = temperature, chunk, train_entropy
        normalisers, logprobs, entropies = [], [], []
        for h, t in zip(hidden.split(chunk), targets.split(chunk)):
            logits = _logits(h, weight, temperature, banned)
            normaliser = torch.logsumexp(logits, 1)
            logprobs.append(logits.gather(1, t[:, None])[:, 0] - normaliser)
            normalisers.append(normaliser)
            if entropy:
                # H = log Z - sum p * logit; a banned word has p = 0 and logit -inf, whose product must count as 0.
                p = torch.exp(logits - normaliser[:, None])
                entropies.append(normaliser - (p * logits.index_fill_(1, banned, 0.0)).sum(1))
        entropies = torch.cat(entropies) if entropy else normalisers[0].new_empty(0)
        ctx.save_for_backward(hidden, weight, targets, banned, torch.cat(normalisers), entropies)
        if not train_entropy:
            ctx.mark_non_differentiable(entropies)
        return torch.cat(logprobs), entropies

    @staticmethod
    def backward(ctx, grad: Tensor, grad_entropy: Tensor):
        hidden, weight, targets, banned, normaliser, entropies = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=normaliser.dtype, device=weight.device) if ctx.needs_input_grad[1] else None
        start = 0
        for h in hidden.split(ctx.chunk):
            rows = slice(start, start + len(h))
            start += len(h)
            logits = _logits(h, weight, ctx.temperature, banned)
            # d logprob / d logits = onehot(target) - softmax
            g = grad[rows, None] / ctx.temperature
            log_p = logits.sub_(normaliser[rows, None])
            d_entropy = None
            if ctx.train_entropy:
                # d entropy / d logits = -p (log p + entropy), 0 for banned words
                d_entropy = log_p.exp().mul_(log_p.index_fill(1, banned, 0.0).add_(entropies[rows, None]))
                d_entropy.mul_(-grad_entropy[rows, None] / ctx.temperature)
            d_logits = log_p.exp_().mul_(-g)
            d_logits.scatter_add_(1, targets[rows, None], g)
            if d_entropy is not None:
                d_logits += d_entropy
            d_logits = d_logits.to(weight.dtype)
            grad_hidden[rows] = d_logits @ weight
            if grad_weight is not None:
                for part, d_part in zip(grad_weight.split(WORDS), d_logits.split(WORDS, 1)):
                    part += d_part.t() @ h  # of all words at once the product would be another copy of the weight's size
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, temperature: float, banned: Tensor) -> Tensor:
    """Float32 (M, V) (float64 stays), a fresh tensor: divided by the temperature, banned words at -inf, as the engine samples."""
    logits = hidden @ weight.t()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1.0:
        logits /= temperature
    return logits.index_fill_(1, banned, float("-inf"))


def chunked_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, banned: Tensor | None = None, chunk: int = 2048,
    entropy: bool = False, train_entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """log p(target) (M,) float32 and entropies (M,) float32 (empty unless `entropy`, with a gradient if `train_entropy`).

    hidden (M, D), the states that predict the targets (M,) int64; weight (V, D) of the language head. p is the softmax of
    logits / temperature with the ids `banned` (int64) at -inf: vLLM's `logprobs_mode="processed_logprobs"` with those ids
    banned from sampling. A banned target has log-prob -inf. Memory: `chunk` x V floats.
    """
    banned = torch.empty(0, dtype=torch.int64, device=hidden.device) if banned is None else banned
    return _ChunkedLogProbs.apply(hidden, weight, targets, temperature, banned, chunk, entropy or train_entropy, train_entropy)


class LogProbHead(nn.Linear):
    """The language head of a policy, which can also give log-probs without full logits.

    A subclass of Linear in Linear's place, so that parameter names stay and ZeRO-3 gathers the weight round one call of it.
    """

    @classmethod
    def replacing(cls, head: nn.Linear) -> LogProbHead:
        if head.bias is not None:
            raise ValueError("a language head with a bias is not supported")
        new = cls(head.in_features, head.out_features, bias=False, device="meta")
        new.weight = head.weight
        return new

    def forward(self, hidden: Tensor, targets: Tensor | None = None, **options):
        """Logits as any Linear; with `targets`, what `chunked_logprobs` returns."""
        return super().forward(hidden) if targets is None else chunked_logprobs(hidden, self.weight, targets, **options)
