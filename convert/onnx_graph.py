"""The weights of a transformers DINOv2 inside an ONNX export, under the names of the published files.

PyTorch's exporter keeps the names of biases, norms and tokens, but folds constants: the matrix of each linear layer
becomes an anonymous, transposed initialiser, and the position embeddings are split into two. The nodes that use them
still carry the path of the module they came from, and that gives the names back.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .engine import ConversionError

# The exported module interpolates positions even at the native size, so these two nodes are always there.
CLASS_POSITION, PATCH_POSITIONS = "/embeddings/Concat_6", "/embeddings/Reshape_1"


def read_onnx(path: Path) -> dict[str, np.ndarray]:
    """Name -> array of all initialisers, those of linear layers as [out, in].

    Raises:
      ConversionError: not an ONNX file, no `onnx` package to read it, or an initialiser whose name cannot be told.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise ConversionError(f"reading {path} needs the package onnx: pip install 'jaxvit[convert]'") from None
    try:
        graph = onnx.load(path).graph
    except Exception as error:  # protobuf raises its own DecodeError, which is no subclass of anything else
        raise ConversionError(f"{path} is not a complete ONNX file: {error}") from error
    tensors = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    names: dict[str, str] = {}
    for node in graph.node:
        for name in set(node.input) & tensors.keys():
            if not name.startswith("onnx::"):
                names[name] = name
            elif node.op_type == "MatMul":
                names[name] = node.name.removesuffix("/MatMul").removeprefix("/").replace("/", ".") + ".weight"
            else:
                names[name] = node.name
    if unknown := sorted(tensors.keys() - names.keys()):
        raise ConversionError(f"{path}: no node uses {', '.join(unknown)}")
    if len(set(names.values())) != len(names):
        raise ConversionError(f"{path}: one matrix is used under several names; is it a DINOv2 export?")
    named = {names[name]: a.T if name.startswith("onnx::MatMul") else a for name, a in tensors.items()}
    for start in [name.removesuffix(CLASS_POSITION) for name in named if name.endswith(CLASS_POSITION)]:
        if start + PATCH_POSITIONS in named:
            parts = [named.pop(start + CLASS_POSITION), named.pop(start + PATCH_POSITIONS)]
            named[start.removeprefix("/").replace("/", ".") + ".embeddings.position_embeddings"] = np.concatenate(
                parts, 1
            )
    return named
