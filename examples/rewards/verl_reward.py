"""A reward for verl: reward.custom_reward_function.path=examples/rewards/verl_reward.py (name: compute_score).

The data set's reward_model.ground_truth is the JSON of a target. VIDEOSEG_REWARD_URL names a reward service; without it, scores here.
"""

import os

from reward_service.adapters.verl import verl_compute_score

compute_score = verl_compute_score(url=os.environ.get("VIDEOSEG_REWARD_URL"), preset="vision_reasoner")
