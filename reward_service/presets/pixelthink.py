"""PixelThink: Seg-Zero's strict terms times a soft length penalty (songw-zju/PixelThink, seg_pixelthink.py, length.py).

As published: the length is the white-space word count of the whole response (length.unit=think_tokens is its other
mode), medium difficulty has no limit, the bonus for staying under the budget is clamped away, an unknown uncertainty
counts as 0 and an unknown difficulty as 3.0 (easy).
"""

from reward_service.presets import seg_zero

CONFIG = seg_zero.CONFIG | {
    "length": {
        "penalty": True,
        "unit": "words",
        "beta": 1 / 500,
        "easy_budget": 96.0,
        "medium_budget": None,
        "hard_budget": 256.0,
        "easy_below": 3.5,
        "hard_from": 5.0,
        "uncertainty_scale": 25.0,
        "default_difficulty": 3.0,
        "clamp": True,
        "floor": 0.0,
    },
}
SETTINGS = seg_zero.SETTINGS
MAXIMA = seg_zero.MAXIMA
group_terms = seg_zero.group_terms
