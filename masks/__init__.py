"""Masks: layouts, windows, dense reference, analytic BlockMask, cost. Depends only on torch.

>>> from flexclear.masks import Layout, Disc, block_mask, cost
>>> layout = Layout(height=85, width=48)                  # 1360 x 768 px
>>> mask = block_mask(layout, Disc(16))                   # for torch.nn.attention.flex_attention
"""

from flexclear.masks.blocks import BlockPairs, block_mask, block_pairs
from flexclear.masks.cost import Cost, cost
from flexclear.masks.dense import dense_mask
from flexclear.masks.downsampled import Downsampled
from flexclear.masks.factories import disc, full, neighborhood, square, strided, swin, with_downsampled
from flexclear.masks.layout import Layout, PackedLayout
from flexclear.masks.neighborhoods import Neighborhood, Square
from flexclear.masks.padding import with_text_mask
from flexclear.masks.shapes import Disc, Full, Strided, Swin
from flexclear.masks.suiting import suited
from flexclear.masks.tiles import Anchors, TileWindow
from flexclear.masks.tubes import Tube, all_frames, ball, cylinder, radial
from flexclear.masks.windows import Both, Either, MaskMod, Window

__all__ = [
    "Anchors",
    "BlockPairs",
    "Both",
    "Cost",
    "Disc",
    "Downsampled",
    "Either",
    "Full",
    "Layout",
    "MaskMod",
    "Neighborhood",
    "PackedLayout",
    "Square",
    "Strided",
    "Swin",
    "TileWindow",
    "Tube",
    "Window",
    "all_frames",
    "ball",
    "block_mask",
    "block_pairs",
    "cost",
    "cylinder",
    "dense_mask",
    "disc",
    "full",
    "neighborhood",
    "radial",
    "square",
    "strided",
    "suited",
    "swin",
    "with_downsampled",
    "with_text_mask",
]
