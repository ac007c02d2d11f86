"""rlvla: reinforcement-learning fine-tuning for flow-matching vision-language-action policies."""

__version__ = "0.1.0"
