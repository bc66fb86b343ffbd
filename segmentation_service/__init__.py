"""Frozen SAM2 and XMem: prompts on a frame in, masks of it and of the whole video out. Imports nothing heavy by itself."""
