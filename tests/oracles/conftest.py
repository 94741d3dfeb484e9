"""Loaded first: pipeline.clip lets torchvision be imported beside a torch without CUDA, which diffusers' modules want."""

import pipeline.clip  # noqa: F401
