"""Images as a short sequence of latents, for an expert that generates images: what a VAE is in the papers.

The papers take the pretrained autoencoder of the model they start from. None can be had here, so the one below is
fixed and has no weights. Another is a class with the same members and a line in `IMAGE_TOKENIZERS`; weights it has are
stored with the policy and never trained.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(kw_only=True)
class LatentConfig:
    """How images become latents."""

    name: str = "pixels"
    """pixels: averaged pixels of a patch side by side, without weights. The papers' VAE is not here."""
    stride: int = 8
    """Pixels to a token along each side; must divide the images."""
    pool: int = 2
    """Pixels averaged into one along each side first: 3 (stride / pool)^2 channels. 1 keeps every pixel."""

    def __post_init__(self) -> None:
        if self.name not in IMAGE_TOKENIZERS:
            raise ValueError(
                f"policy.latents.name is {self.name!r}; it must be one of {', '.join(IMAGE_TOKENIZERS)}. Another "
                "image tokenizer is a class and a line in rlvla/policies/latents.py."
            )
        if self.stride < 1 or self.pool < 1 or self.stride % self.pool:
            raise ValueError(
                f"policy.latents.stride is {self.stride} and pool is {self.pool}; both must be at least 1, and pool "
                "must divide stride."
            )


class ImageTokenizer(nn.Module):
    """Deterministic latents of images: equal images have equal latents, in SFT, rollouts and updates."""

    channels: int
    """C of a latent."""

    def forward(self, images: UInt8[Tensor, "B h w 3"]) -> Float[Tensor, "B N C"]:
        """N = (h / stride) (w / stride) latents, row by row, of about unit range."""
        raise NotImplementedError


class PixelLatents(ImageTokenizer):
    """Mean pixels of small squares in [-1, 1], those of one patch side by side. Nothing of an image is lost but detail
    finer than ``pool``, so that a velocity of latents is a velocity of pixels."""

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        self.pool, self.side = config.pool, config.stride // config.pool
        self.channels = 3 * self.side**2

    def forward(self, images: UInt8[Tensor, "B h w 3"]) -> Float[Tensor, "B N C"]:
        pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        patches = F.pixel_unshuffle(F.avg_pool2d(pixels, self.pool), self.side)
        return torch.flatten(patches, 2).transpose(1, 2)


IMAGE_TOKENIZERS: dict[str, Callable[[LatentConfig], ImageTokenizer]] = {"pixels": PixelLatents}
"""Every image tokenizer by name."""
