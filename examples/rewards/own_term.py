"""A reward term of your own: one function of a parsed answer and its target, named in the configuration.

    python -m examples.rewards.own_term
    PYTHONPATH=. videoseg train reward.own_terms='[{function: examples.rewards.own_term:right_count, weight: 0.5}]'

Training logs it as reward/term/right_count. It works with every preset, and with `videoseg serve reward`; only the function has to be importable there.
"""

from __future__ import annotations

from examples.rewards.score_completions import COMPLETIONS, target
from reward_service import Answer, RewardConfig, Target, score_group
from reward_service.own_terms import OwnTerm


def right_count(answer: Answer, target: Target) -> float:
    """1 for as many objects as there are, less for each that is missing or too many."""
    return 1 / (1 + abs(len(answer.objects) - len(target)))


def main() -> None:
    own = OwnTerm("examples.rewards.own_term:right_count", weight=0.5)
    texts = list(COMPLETIONS.values())
    lengths = [len(text.split()) for text in texts]
    before, after = (score_group(texts, target(), RewardConfig(own_terms=terms), difficulty=4.0, lengths=lengths) for terms in ([], [own]))
    print(f"{'':16}{'without':>10}{'with':>10}{own.name:>16}")
    for kind, a, b in zip(COMPLETIONS, before, after):
        print(f"{kind:16}{a.total:10.2f}{b.total:10.2f}{b.terms[own.name]:16.2f}")


if __name__ == "__main__":
    main()
