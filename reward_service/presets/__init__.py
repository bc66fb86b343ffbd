"""One file a published system: its settings (CONFIG), the terms it has (MAXIMA), and how it computes them (group_terms).

Each module offers
    CONFIG: values of RewardConfig that differ from the defaults; "weights" lists the terms that are on.
    SETTINGS: names of the RewardConfig fields its formula reads (None: all of them).
    MAXIMA: term -> greatest value before weighting.
    group_terms(answers, target, config, predicted_masks) -> one (terms, diagnostics) pair of dicts an answer.
"""
