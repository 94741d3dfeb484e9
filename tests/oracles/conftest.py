"""Loaded first: it lets torchvision be imported beside a torch without CUDA, which diffusers' modules want."""

import pipeline.clip.library  # noqa: F401
