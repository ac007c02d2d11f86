"""From observations to the tensors of a Qwen VLM, without torchvision.

transformers' own Qwen3-VL processor needs torchvision for videos we do not have; this one does the image
part with torch on whatever device the model is on, and a test pins it to `Qwen2VLImageProcessorPil`.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from rlvla.policies.prompt import CHAT_TEMPLATE

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def train_tokenizer(prompts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE on these prompts, in the classes and with the special tokens of Qwen's.

    Merges may cross spaces: the embodiment prompt is mostly constant, and a small policy on a CPU should
    not spend forty tokens on saying so. Any other text still encodes, in more and smaller pieces.

    Returns:
        A transformers `PreTrainedTokenizerFast`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(prompts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
        },
    )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer files of a policy folder, or of any Hugging Face checkpoint."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def patchify(
    image: UInt8[Tensor, "B h w 3"], patch_size: int, merge_size: int, temporal_patch_size: int
) -> Float[Tensor, "P Q"]:
    """Images as rows of normalised patches, in the order Qwen's vision tower merges them.

    Pixels are scaled to [-1, 1] (mean and standard deviation 0.5). Every block of merge_size x merge_size
    patches is contiguous, and the one frame is repeated to fill a temporal patch.

    Returns:
        P = B (h / patch) (w / patch) rows of Q = 3 temporal patch^2 values.

    Raises:
        ValueError: an image that does not divide into merged patches.
    """
    batch, height, width, _ = image.shape
    unit = patch_size * merge_size
    if height % unit or width % unit:
        raise ValueError(
            f"images are {height} x {width}; both must be multiples of patch x merge = {unit}. "
            "Change suite.image_size or policy.vlm.patch_size."
        )
    pixels = image.float() / 127.5 - 1
    rows, columns = height // unit, width // unit
    blocks = pixels.reshape(batch, rows, merge_size, patch_size, columns, merge_size, patch_size, 3)
    #                        B     gh    m           p           gw       m           p           c
    ordered = blocks.permute(0, 1, 4, 2, 5, 7, 3, 6)  # B gh gw m m c p p
    repeated = ordered.unsqueeze(6).expand(*ordered.shape[:6], temporal_patch_size, *ordered.shape[6:])
    return repeated.reshape(-1, 3 * temporal_patch_size * patch_size**2)


def resize(image: UInt8[Tensor, "B h w 3"], side: int) -> UInt8[Tensor, "B side side 3"]:
    """Images as squares in eight bits, by PIL's default filter: bicubic, averaged where it shrinks.

    Torch's sums are not PIL's to the last bit: a few values are another by one or two.
    """
    if image.shape[1:3] == (side, side):
        return image
    pixels = image.permute(0, 3, 1, 2).float()
    # Rows, then columns, as PIL does it: cut to eight bits in between, at edges that overshoot the result is another.
    for size in ((image.shape[1], side), (side, side)):
        pixels = F.interpolate(pixels, size=size, mode="bicubic", align_corners=False, antialias=True)
        pixels = pixels.round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1)
