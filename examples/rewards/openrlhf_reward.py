"""A reward for OpenRLHF: --reward.remote_url examples/rewards/openrlhf_reward.py, with --data.label_key naming the JSON of a target.

VIDEOSEG_REWARD_URL names a reward service; without it, scores here.
"""

import os

from reward_service.adapters.openrlhf import openrlhf_reward_func

reward_func = openrlhf_reward_func(url=os.environ.get("VIDEOSEG_REWARD_URL"), preset="vision_reasoner")
