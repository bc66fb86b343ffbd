"""Reward functions for other RL stacks, ready to run or to name in their settings."""
