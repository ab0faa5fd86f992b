"""Vision Transformers as JAX values: every internal token and attention weight can be read.

model = jaxvit.load(folder)
out = model(jaxvit.prepare("photo.jpg", model.config), record=("pattern",))
out.cls, out.registers, out.patches, out.trace["pattern"]
"""

from jaxvit import decompose, similarity
from jaxvit.checkpoint import CheckpointError, load, read_config, save
from jaxvit.config import Preprocess, ViTConfig
from jaxvit.images import Batch, ImageError, decode, find_images, prepare, resize, stream
from jaxvit.params import cast, functional
from jaxvit.sites import SITES, Take
from jaxvit.tokens import TokenLayout
from jaxvit.vit import Output, ViT

__all__ = [
    "SITES",
    "Batch",
    "CheckpointError",
    "ImageError",
    "Output",
    "Preprocess",
    "Take",
    "TokenLayout",
    "ViT",
    "ViTConfig",
    "cast",
    "decode",
    "decompose",
    "find_images",
    "functional",
    "load",
    "prepare",
    "read_config",
    "resize",
    "save",
    "similarity",
    "stream",
]
