"""Loaded first: models.clip lets torchvision be imported beside a torch without CUDA, which diffusers' modules want."""

import models.clip  # noqa: F401
