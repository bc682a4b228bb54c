"""The pretraining of the packaged CLIP, behind `scripts/pretrain_small_clip.py`."""
