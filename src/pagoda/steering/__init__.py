"""Steering a trained model: edits of images by an encoder, a one-step generator, and what is done to the latent in between.

Editor              reconstruct, transfer, interpolate, inpaint, upscale, restore; on tensors of the model's own sizes
operators           what was measured of an image: masks, reductions, blurs, projections, with their pseudo-inverses
read_picture, ...   a user's image of any size onto the model's square, and back
"""

from pagoda.steering.drawing import draw_hole, most_typical
from pagoda.steering.editor import Editor, HoleDrawer, ImageEncoder
from pagoda.steering.fitting import (
    Box,
    Fit,
    ImageLike,
    Picture,
    Square,
    choose_square,
    composite,
    cut_square,
    fit_picture,
    load_image,
    read_picture,
    resize_square,
    to_image,
    to_tensor,
)
from pagoda.steering.holes import fill_hole, split_hole
from pagoda.steering.masks import MASK_IS, MaskIs, check_mask_settings, fill_picture, fit_mask, paint_mask, read_mask
from pagoda.steering.mixing import interpolate_latents, mix_latents, mixed_condition
from pagoda.steering.operators import (
    LinearOperator,
    MaskOperator,
    Projections,
    SeparableOperator,
    box_blur,
    downsampling,
    least_squares,
)
from pagoda.steering.restoration import Guess, alternate, back_project, optimise_latents
from pagoda.steering.settings import METHODS, Filling, Method, filling_settings, method_settings, restoring

__all__ = [
    "MASK_IS",
    "METHODS",
    "Box",
    "Editor",
    "Filling",
    "Fit",
    "Guess",
    "HoleDrawer",
    "ImageEncoder",
    "ImageLike",
    "LinearOperator",
    "MaskIs",
    "MaskOperator",
    "Method",
    "Picture",
    "Projections",
    "SeparableOperator",
    "Square",
    "alternate",
    "back_project",
    "box_blur",
    "check_mask_settings",
    "choose_square",
    "composite",
    "cut_square",
    "downsampling",
    "draw_hole",
    "fill_hole",
    "fill_picture",
    "filling_settings",
    "fit_mask",
    "fit_picture",
    "interpolate_latents",
    "least_squares",
    "load_image",
    "method_settings",
    "mix_latents",
    "mixed_condition",
    "most_typical",
    "optimise_latents",
    "paint_mask",
    "read_mask",
    "read_picture",
    "resize_square",
    "restoring",
    "split_hole",
    "to_image",
    "to_tensor",
]
