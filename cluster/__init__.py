"""The controller: configuration, the training loop, placement, weight sync, checkpoints, metrics, command line."""

__version__ = "0.1.0"
