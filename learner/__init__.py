"""The learner: group advantages, policy losses, micro-batches and DeepSpeed. Import from its modules; nothing is imported here."""
