"""A finished generator in other people's formats.

graph     the generator as a graph of any batch size, and how far a graph is from PyTorch
onnx      for onnxruntime: float32, or weights in float16 or int8
program   for torch.export
web       a page that draws images in anybody's browser, with its graphs (web_parts) and onnxruntime-web (web_runtime) inside
folder    for diffusers: what `PagodaPipeline.from_pretrained` reads, with nothing else of the run
push      that folder in a repository of the hub
card      a model card, filled from what the run knows
facts     what each of them says about itself
"""

from pagoda.export.card import model_card
from pagoda.export.facts import FACTS, Exported, class_names_of, export_facts
from pagoda.export.folder import export_folder
from pagoda.export.graph import ImageMaker, largest_difference, trace
from pagoda.export.onnx import ONNX_TOLERANCE, export_onnx, read_onnx_facts, run_graph
from pagoda.export.program import PROGRAM_TOLERANCE, export_program
from pagoda.export.push import Pushed, push_run
from pagoda.export.web import export_web
from pagoda.export.web_runtime import WebRuntime, find_runtime

__all__ = [
    "FACTS",
    "ONNX_TOLERANCE",
    "PROGRAM_TOLERANCE",
    "Exported",
    "ImageMaker",
    "Pushed",
    "WebRuntime",
    "class_names_of",
    "export_facts",
    "export_folder",
    "export_onnx",
    "export_program",
    "export_web",
    "find_runtime",
    "largest_difference",
    "model_card",
    "push_run",
    "read_onnx_facts",
    "run_graph",
    "trace",
]
