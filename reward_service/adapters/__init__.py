"""Reward functions for other RL stacks: TRL, verl, OpenRLHF. Each scores in the process or through a server, by one argument."""
