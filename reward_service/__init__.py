"""Rewards for reasoning video object segmentation, for any RL stack: `from reward_service import RewardConfig, Target, score`.

Names are imported on first use, so that importing the package costs nothing and pulls in no torch, vLLM or Ray.
"""

_HOME = {
    "Answer": "answer",
    "AnswerObject": "answer",
    "FrameTarget": "target",
    "LengthConfig": "config",
    "MissingInput": "target",
    "RewardConfig": "config",
    "Score": "scoring",
    "Target": "target",
    "TermWeights": "config",
    "maximum": "scoring",
    "parse_answer": "parsing",
    "score": "scoring",
    "score_group": "scoring",
    "think_span": "tags",
    "think_text": "tags",
}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'reward_service' has no attribute {name!r}; it offers {', '.join(__all__)}")
    from importlib import import_module

    value = getattr(import_module(f"reward_service.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return __all__
