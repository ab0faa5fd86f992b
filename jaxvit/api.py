"""The public names of `jaxvit`, each of which is also an attribute of the package."""

from jaxvit.analysis import decompose, similarity
from jaxvit.analysis.features import features
from jaxvit.analysis.look import look
from jaxvit.analysis.named import NamedArray
from jaxvit.analysis.outliers import outliers
from jaxvit.analysis.over_images import over_images
from jaxvit.analysis.readouts import read_out
from jaxvit.analysis.windows import Windows, read_windows
from jaxvit.interventions import grids
from jaxvit.interventions.constructors import (
    Registers,
    TokenIndices,
    ablate,
    amplify,
    freeze_attention,
    knockout,
    patch,
    remove_registers,
    replace_by_mean,
    replace_by_noise,
    replace_by_shuffle,
    scale_skip,
    steer,
    zero_attention,
)
from jaxvit.interventions.grids import Grid
from jaxvit.interventions.registers import Neurons, add_registers, find_register_neurons, test_time_registers
from jaxvit.interventions.statistics import ActivationStats
from jaxvit.interventions.sweeps import attribute, cls_cosine, sweep
from jaxvit.io import parallel
from jaxvit.io.checkpoint import CheckpointError, describe, load, read_config, save
from jaxvit.io.images import Batch, ImageError, decode, denormalize, find_images, prepare, stream
from jaxvit.io.provenance import Provenance
from jaxvit.io.resize import resize
from jaxvit.io.rows import Features, FeaturesError, read_features
from jaxvit.model.config import Preprocess, ViTConfig
from jaxvit.model.edits import Edit, Knockout, Relocate, Shuffle, merge, one_of
from jaxvit.model.params import cast, functional
from jaxvit.model.run import each_layer
from jaxvit.model.sites import SITES, Take
from jaxvit.model.tokens import TokenLayout
from jaxvit.model.vit import Output, PrefixOutput, ViT

__all__ = [
    "SITES",
    "ActivationStats",
    "Batch",
    "CheckpointError",
    "Edit",
    "Features",
    "FeaturesError",
    "Grid",
    "ImageError",
    "Knockout",
    "NamedArray",
    "Neurons",
    "Output",
    "PrefixOutput",
    "Preprocess",
    "Provenance",
    "Registers",
    "Relocate",
    "Shuffle",
    "Take",
    "TokenIndices",
    "TokenLayout",
    "ViT",
    "ViTConfig",
    "Windows",
    "ablate",
    "add_registers",
    "amplify",
    "attribute",
    "cast",
    "cls_cosine",
    "decode",
    "decompose",
    "denormalize",
    "describe",
    "each_layer",
    "features",
    "find_images",
    "find_register_neurons",
    "freeze_attention",
    "functional",
    "grids",
    "knockout",
    "load",
    "look",
    "merge",
    "one_of",
    "outliers",
    "over_images",
    "parallel",
    "patch",
    "prepare",
    "read_config",
    "read_features",
    "read_out",
    "read_windows",
    "remove_registers",
    "replace_by_mean",
    "replace_by_noise",
    "replace_by_shuffle",
    "resize",
    "save",
    "scale_skip",
    "similarity",
    "steer",
    "stream",
    "sweep",
    "test_time_registers",
    "zero_attention",
]
