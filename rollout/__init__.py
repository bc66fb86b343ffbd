"""What the policy sees and says: episodes, frames, prompts, and the vLLM engine that answers them."""
