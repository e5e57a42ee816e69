"""Images in, tensors out: sources, the check before a run, the one downsampler, the prepared set, the store of latents.

source = open_source("photos/", options=SourceConfig())
check_source(source, size=256).raise_if_bad()
data = prepare_images(source, sizes=(32, 64, 128, 256), downsampler=Downsampler(), cache_dir="run/images")
batch = data.images(batch_indices(seed=0, step=0, batch_size=64, n=len(data)), size=32)   # (64, C, 32, 32) in [-1, 1]
"""

from pagoda.data.archive import ZipSource
from pagoda.data.bad_images import BadImage
from pagoda.data.check import CheckReport, check_source, move_bad
from pagoda.data.coded import CodedDataset, prepare_latents
from pagoda.data.dataset import ImageDataset, prepare_images
from pagoda.data.downsample import Downsampler, DownsamplerKind
from pagoda.data.folder import FolderSource
from pagoda.data.held_out import Part, PartSource, held_out_rows
from pagoda.data.hub import HubSource
from pagoda.data.idx import IdxSource
from pagoda.data.latents import LatentStore, refuse_pickles
from pagoda.data.moments import LatentMoments
from pagoda.data.order import batch_indices, epoch_order
from pagoda.data.protocol import BadImageError, ImageSource, SourceConfig
from pagoda.data.shapes import ShapeFactors, ShapesSource
from pagoda.data.sources import open_source
from pagoda.data.views import ViewedSource, without_views

__all__ = [
    "BadImage",
    "BadImageError",
    "CheckReport",
    "CodedDataset",
    "Downsampler",
    "DownsamplerKind",
    "FolderSource",
    "HubSource",
    "IdxSource",
    "ImageDataset",
    "ImageSource",
    "LatentMoments",
    "LatentStore",
    "Part",
    "PartSource",
    "ShapeFactors",
    "ShapesSource",
    "SourceConfig",
    "ViewedSource",
    "ZipSource",
    "batch_indices",
    "check_source",
    "epoch_order",
    "held_out_rows",
    "move_bad",
    "open_source",
    "prepare_images",
    "prepare_latents",
    "refuse_pickles",
    "without_views",
]
