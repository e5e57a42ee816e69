"""Texts: what reads captions, what keeps them, and the small encoder that is trained on the user's own.

encoders     any text model of transformers as tokens and a pooled vector
embeddings   the captions of a data set, embedded once
two_tower    a small encoder of images and captions, trained by InfoNCE; `tokenizer` is its own
training     how it is trained; `config` has the settings
captioner    captions from an image-to-text model
pictures     images with their captions under them
image_text   images and texts in one space, and the distance between them
"""

from pagoda.text.captioner import Captioner, caption_source
from pagoda.text.config import TEACHERS, TWO_TOWER, TextConfig, TwoTowerConfig
from pagoda.text.embeddings import CaptionTable, TextEmbeddings, unique_captions
from pagoda.text.encoders import TextEncoder, TransformersTextEncoder
from pagoda.text.image_text import ImageTextEncoder, TransformersImageTextEncoder, spherical_distance
from pagoda.text.pictures import draw_captions
from pagoda.text.tokenizer import train_tokenizer
from pagoda.text.training import contrastive_objective, measure_retrieval, train_two_tower
from pagoda.text.two_tower import ContrastiveObjective, build_two_tower, contrastive_loss, save_two_tower

__all__ = [
    "TEACHERS",
    "TWO_TOWER",
    "CaptionTable",
    "Captioner",
    "ContrastiveObjective",
    "ImageTextEncoder",
    "TextConfig",
    "TextEmbeddings",
    "TextEncoder",
    "TransformersImageTextEncoder",
    "TransformersTextEncoder",
    "TwoTowerConfig",
    "build_two_tower",
    "caption_source",
    "contrastive_loss",
    "contrastive_objective",
    "draw_captions",
    "measure_retrieval",
    "save_two_tower",
    "spherical_distance",
    "train_tokenizer",
    "train_two_tower",
    "unique_captions",
]
