"""A tiny XMem with the recipe's weights, for tests of everything but numbers."""

import torch

import xmem_recipe as recipe
from segmentation_service.xmem import XMem, XMemDims

TINY = XMemDims(key=8, value=16, hidden=4, key_planes=(4, 4, 8), key_blocks=(1, 1, 1), value_planes=(4, 4, 8), value_blocks=(1, 1, 1), decoder=(16, 8, 8), update=8)


def tiny_state_dict(dims: XMemDims = TINY, seed: int = 3) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        shapes = {key: tuple(tensor.shape) for key, tensor in XMem(dims).state_dict().items()}
    return recipe.fill(shapes, seed)
