"""Features for a second Frechet distance, besides CLIP's, from any TorchScript file that a recipe names.

The usual one is the Inception of the published FID figures, as a TorchScript file (``inception-2015-12-05.pt`` of
NVIDIA's StyleGAN repositories): it takes uint8 pictures and returns 2048 features. Loading a TorchScript file runs code
of that file: name only a file that you trust.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import DataError


class FeatureExtractor:
    """Computes features of pictures.

    Args:
        path: TorchScript module: uint8 (N, 3, H, W) -> (N, F); its argument ``return_features``, if it has one, is set.
        device: Where it runs.

    Raises:
        DataError: If the file cannot be loaded.
    """

    def __init__(self, path: str, device: torch.device | str = "cpu") -> None:
        try:
            self._module: Any = torch.jit.load(path, map_location=device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise DataError(f"evaluate.features_path {path}: not a TorchScript file ({reason})") from None
        self._path = path
        self._device = torch.device(device)
        names = {argument.name for argument in self._module.forward.schema.arguments}
        self._options = {"return_features": True} if "return_features" in names else {}

    @torch.no_grad()
    def __call__(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features of pictures (N, H, W, 3), as (N, F).

        Raises:
            DataError: If the module does not take such pictures, or returns something else.
        """
        images = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).contiguous().to(self._device)
        try:
            features = self._module(images, **self._options)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise DataError(
                f"evaluate.features_path {self._path}: fails on uint8 {tuple(images.shape)}: {reason}"
            ) from None
        if features.ndim != 2 or len(features) != len(pictures):
            raise DataError(
                f"evaluate.features_path {self._path}: gives {tuple(features.shape)} for {len(pictures)} pictures; "
                "it must give one vector each"
            )
        return features.float().cpu().numpy()
