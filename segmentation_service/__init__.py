"""Frozen SAM2 (and later XMem): prompts on a frame in, masks out. Imports nothing heavy by itself."""
