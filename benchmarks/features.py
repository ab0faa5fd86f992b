"""The pipeline of `jaxvit features`: from files of photographs to features on disk.

    python -m benchmarks features                      images a second, beside PyTorch's DataLoader with timm
    python -m benchmarks features --rows 1000000       memory over a million rows of [CLS] of a toy model
    python -m benchmarks features --killed 10000       a run over so many images, killed five times, byte for byte

The first runs a DINOv2 ViT-S/14 with random weights on JPEGs of 640x480 pixels, resized and cropped to 224, in float32,
in batches of 32, with as many workers as cores: threads here, processes there. Both sides write [CLS] to a file. They
take turns; the table gives medians.
"""

from __future__ import annotations

import hashlib
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import convert
import jaxvit
from benchmarks.originals import random_original
from benchmarks.speed import device_name
from benchmarks.timing import take_turns
from experiments.models.subjects import random_weights
from jaxvit import Preprocess, ViTConfig
from jaxvit.model.params import from_params, to_params

IMAGES, BATCH = 256, 32
TOY = ViTConfig(depth=1, width=16, heads=2, hidden=16, patch=16, grid=(2, 2), preprocess=Preprocess(32, 32))


def main(rows: int | None, killed: int | None, seconds: float) -> None:
    print(f"on {device_name()}")
    with tempfile.TemporaryDirectory() as folder:
        if rows:
            many_rows(rows, Path(folder))
        elif killed:
            kills(killed, Path(folder))
        else:
            pipeline(Path(folder), seconds)


# Images a second ------------------------------------------------------------------------------------------------------


def jpegs(folder: Path, n: int, shape: tuple[int, int]) -> list[Path]:
    """Smooth noise, which takes as long to decode as a photograph of its size."""
    folder.mkdir()
    rng, paths = np.random.default_rng(0), []
    for i in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (shape[0] // 16, shape[1] // 16, 3), dtype=np.uint8))
        picture = np.asarray(coarse.resize(shape[::-1], Image.Resampling.BICUBIC)).astype(int)
        pixels = np.clip(picture + rng.integers(-12, 13, picture.shape), 0, 255).astype(np.uint8)
        paths.append(folder / f"{i:05}.jpg")
        Image.fromarray(pixels).save(paths[-1], quality=90)
    return paths


class Files(torch.utils.data.Dataset):
    """JPEGs, prepared as timm's own transforms do."""

    def __init__(self, paths: list[Path], transform: Any):
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.transform(Image.open(self.paths[i]).convert("RGB"))


def pipeline(folder: Path, seconds: float) -> None:
    import timm

    paths = jpegs(folder / "images", IMAGES, (480, 640))
    module = random_original(ViTConfig.dinov2("small", 4, grid=(16, 16)), "timm")
    model = convert.load(module)
    data = timm.data.resolve_model_data_config(module) | {"input_size": (3, 224, 224), "crop_pct": 0.875}
    preprocess = Preprocess(256, 224, mean=tuple(data["mean"]), std=tuple(data["std"]))
    model = from_params(replace(model.config, preprocess=preprocess), to_params(model))
    workers = torch.get_num_threads()
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)  # JAX's, of DataLoader's processes

    def ours() -> None:
        jaxvit.features(model, paths, "cls", out=folder / "ours.npz", batch_size=BATCH, overwrite=True)

    def decoding() -> None:
        for batch in jaxvit.stream(paths, model.config, BATCH):
            batch.images.block_until_ready()

    transform = timm.data.create_transform(**data, is_training=False)
    files = Files(paths, transform)
    loader = torch.utils.data.DataLoader(files, BATCH, num_workers=workers, persistent_workers=True)

    def theirs() -> None:
        with torch.inference_mode():
            found = [module.forward_features(batch)[:, 0].numpy() for batch in loader]
        np.savez(folder / "theirs.npz", cls=np.concatenate(found))

    timed = take_turns(
        {"jaxvit features": ours, "DataLoader + timm": theirs, "decoding alone": decoding}, seconds, (3, 20)
    )
    a, b = jaxvit.read_features(folder / "ours.npz")["cls"], np.load(folder / "theirs.npz")["cls"]
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    print(f"{IMAGES} JPEGs of 640x480, DINOv2 S with 4 registers, 224 px, batches of {BATCH}, {workers} workers")
    for name in timed.seconds:
        print(f"  {name:18s} {IMAGES / timed.median(name):7.1f} images a second")
    ratios = timed.seconds["DataLoader + timm"] / timed.seconds["jaxvit features"]
    spread = f"{ratios.min():.2f} to {ratios.max():.2f} in {len(ratios)} rounds"
    print(f"  jaxvit is {np.median(ratios):.2f} times as fast, {spread}")
    print(f"  least cosine of [CLS] with timm's: {cosine.min():.6f}")


# A million rows -------------------------------------------------------------------------------------------------------


def many_rows(n: int, folder: Path) -> None:
    """Pictures of one colour, made as they are asked for."""
    peaks: dict[int, float] = {}

    def pictures() -> Iterator[np.ndarray]:
        for i in range(n):
            if i % max(n // 10, 1) == 0:
                peaks[i] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            yield np.full((32, 32, 3), i % 256, np.uint8)

    start = time.perf_counter()
    jaxvit.features(random_weights(TOY), pictures(), "cls", out=folder / "cls.zarr", batch_size=1024)
    took = time.perf_counter() - start
    found = jaxvit.read_features(folder / "cls.zarr")
    assert found["cls"].shape == (n, TOY.width) and found.names[-1] == f"image {n - 1}"
    rows = found["cls"][n - n % 256 - 256 : n - n % 256]
    assert np.array_equal(rows, found["cls"][:256]), "rows have shifted"
    print(f"{n} rows of [CLS] in {took:.0f} s; memory at most, after so many images:")
    print("  " + ", ".join(f"{i}: {peak:.2f} GB" for i, peak in peaks.items()))


# Killed ---------------------------------------------------------------------------------------------------------------


def kills(n: int, folder: Path) -> None:
    """Kill -9 at random moments; the bytes are those of a run that nothing happened to."""
    jpegs(folder / "images", min(n, 200), (48, 64))
    for i in range(200, n):
        (folder / "images" / f"{i:05}.jpg").symlink_to(folder / "images" / f"{i % 200:05}.jpg")
    jaxvit.save(random_weights(TOY), folder / "toy")
    words = ["features", folder / "toy", folder / "images", "--take", "cls", "tokens@all", "--batch-size", "16"]
    command = [sys.executable, "-m", "jaxvit", *map(str, words), "--out"]
    subprocess.run([*command, str(folder / "whole.zarr")], check=True, stdout=subprocess.DEVNULL)
    noted, killed = folder / "f.zarr.partial" / "progress.json", []
    for target in sorted(random.Random(0).sample(range(n), 5)):
        process = subprocess.Popen([*command, str(folder / "f.zarr"), "--resume"], stdout=subprocess.DEVNULL)
        while process.poll() is None and progress(noted) < target:
            time.sleep(0.003)
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed.append(progress(noted))
    subprocess.run([*command, str(folder / "f.zarr"), "--resume"], check=True, stdout=subprocess.DEVNULL)
    same = tree(folder / "whole.zarr") == tree(folder / "f.zarr")
    print(
        f"{n} images, killed after {', '.join(map(str, killed))} of them: the bytes are {'equal' if same else 'OTHERS'}"
    )
    shutil.rmtree(folder / "f.zarr")
    if not same:
        sys.exit(1)


def progress(noted: Path) -> int:
    return json.loads(noted.read_text())["next"] if noted.exists() else 0


def tree(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
