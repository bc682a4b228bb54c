"""Checkpoints of open_clip, OpenAI and transformers, and the configurations that they are read with."""
