"""Where the tags of a completion stand: the published regular expressions, rewritten to run in linear time.

The published patterns backtrack quadratically (some cubically) on long runs of spaces or braces; a policy in training
writes such text. Each function here says which pattern it equals. What is left of patterns has possessive quantifiers
(`*+`), which never backtrack; everything else goes through `_find`, so that a test can count the characters looked at.
"""

import re

THINK, END_THINK, ANSWER, END_ANSWER = "<think>", "</think>", "<answer>", "</answer>"
_THINK_THEN_ANSWER = re.compile(r"</think>\s*+<answer>")
_ANSWER_WITH_BRACE = re.compile(r"<answer>\s*+\{")
_BRACE_AT_END = re.compile(r"\}\s*+</answer>")


def _find(text: str, what: str, start: int = 0) -> int:
    return text.find(what, start)


def _answer_after_think(text: str, start: int = 0) -> int:
    """Index just after the first `</think>\\s*<answer>` found from `start` on, or -1."""
    match = _THINK_THEN_ANSWER.search(text, start)
    return match.end() if match else -1


def has_think_format(text: str) -> bool:
    """True when the whole text is a think block, optional white space and an answer block.

    Equals `re.fullmatch(r"<think>.*?</think>\\s*<answer>.*?</answer>", text, re.DOTALL)` of Seg-Zero, VisionReasoner,
    PixelThink and Veason-R1: no leading or trailing white space; the blocks may contain anything, tags included.
    """
    if not (text.startswith(THINK) and text.endswith(END_ANSWER)):
        return False
    answer = _answer_after_think(text, len(THINK))
    return 0 <= answer <= len(text) - len(END_ANSWER)


def first_answer(text: str) -> str | None:
    """Content of the first answer block without surrounding white space, or None.

    Equals group 1 of `re.search(r"<answer>\\s*(.*?)\\s*</answer>", text, re.DOTALL)` (VisionReasoner, Veason-R1).
    """
    start = _find(text, ANSWER)
    end = _find(text, END_ANSWER, start + len(ANSWER)) if start >= 0 else -1
    return text[start + len(ANSWER) : end].strip() if end >= 0 else None


def first_answer_object(text: str) -> str | None:
    """`{...}` of the first answer block that opens with a brace, up to the first `}` that closes a block, or None.

    Equals group 1 of `re.search(r"<answer>\\s*(\\{.*?\\})\\s*</answer>", text, re.DOTALL)` (Veason-R1's format term).
    """
    opening = _ANSWER_WITH_BRACE.search(text)
    closing = _BRACE_AT_END.search(text, opening.end()) if opening else None
    return text[opening.end() - 1 : closing.start() + 1] if closing else None


def first_braces(text: str) -> str | None:
    """First `{...}` that holds at least one character and no `}`, or None.

    Equals `re.search(r"{[^}]+}", text)` (Seg-Zero, PixelThink): looks at the whole text, so a brace in the think block
    comes first, and nested objects are cut at the first `}`.
    """
    start = _find(text, "{")
    while start >= 0:
        end = _find(text, "}", start + 1)
        if end < 0:
            return None
        if end > start + 1:
            return text[start : end + 1]
        start = _find(text, "{", end)
    return None


def answer_region(text: str) -> tuple[int, int, bool]:
    """(start, end, closed) of the answer of `videoseg_r1`, in characters; (-1, -1, False) without an answer tag.

    The block that directly follows a `</think>` is taken if there is one, so that a think block may speak of the tags;
    otherwise the first `<answer>`. It ends at the first `</answer>`; without one it runs to the end and is not closed.
    """
    start = _answer_after_think(text)
    if start < 0:
        start = _find(text, ANSWER)
        if start < 0:
            return -1, -1, False
        start += len(ANSWER)
    end = _find(text, END_ANSWER, start)
    return (start, end, True) if end >= 0 else (start, len(text), False)


def think_span(text: str) -> tuple[int, int]:
    """(start, end) characters of the reasoning, for counting think tokens; (0, 0) when there is none.

    From after the first `<think>` (or from 0 where a chat template has opened the block and only `</think>` was written)
    to the first `</think>` after it, else to the first `<answer>`, else to the end: reasoning that was cut off still
    costs its length (PixelThink counts it as 0, which rewards never closing the block).
    """
    opened = _find(text, THINK)
    start = opened + len(THINK) if opened >= 0 else 0
    end = _find(text, END_THINK, start)
    if end >= 0:
        return start, end
    if opened < 0:
        return 0, 0
    end = _find(text, ANSWER, start)
    return start, end if end >= 0 else len(text)


def think_text(text: str) -> str:
    """The reasoning itself, `text[start:end]` of `think_span`."""
    start, end = think_span(text)
    return text[start:end]
