"""How images are prepared equals what timm, transformers and OpenCLIP do, for all that they have published."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

import convert
import jaxvit
from benchmarks.architectures import PREPARATION, tags_of
from convert.preparation import META, PROCESSORS, of_open_clip, of_timm, of_transformers
from convert.published import architectures
from convert.timm import architecture_hints
from experiments import embedded
from jaxvit import Preprocess

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")


DATA = Path(__file__).parents[1] / embedded.DATA


def photographs():
    """Real photographs, tall and wide, and noise of odd sizes, where every margin has half pixels."""
    wide, tall, *_ = (jaxvit.decode(path) for path in jaxvit.find_images(embedded.photographs(DATA)))
    rng = np.random.default_rng(0)
    noise = [
        rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in [(97, 310), (333, 121), (301, 424), (60, 60)]
    ]
    return [wide, np.rot90(tall[:-70]).copy(), *noise]


PHOTOGRAPHS = photographs()


def assert_prepared(preprocess, transform, atol=3e-6, photographs=PHOTOGRAPHS):
    for pixels in photographs:
        expected = np.asarray(transform(Image.fromarray(pixels))).transpose(1, 2, 0)
        found = np.asarray(jaxvit.prepare(pixels, preprocess))[0]
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def applied(processor):
    return lambda image: processor(image, return_tensors="np")["pixel_values"][0]


# timm -----------------------------------------------------------------------------------------------------------------

NAMES = [name for name, facts in architectures().items() if "refused" not in facts]


def test_every_tag_of_timm_has_its_own_preparation():
    found, kinds = 0, {}
    for name in NAMES:
        for tag, cfg in tags_of(name).items():
            expected = resolve_data_config(pretrained_cfg=cfg)
            hints = architecture_hints(f"{name}.{tag}" if tag else name)
            assert hints["preprocess"] == of_timm(expected), f"{name}.{tag}"
            assert not hints.get("unsure") or not tag
            kinds[json.dumps({key: expected[key] for key in PREPARATION})] = (hints["preprocess"], expected)
            found += 1
    assert found > 300 and len(kinds) > 30
    # Each kind once, on pictures: all tags of a kind have the very same transform.
    for preprocess, expected in kinds.values():
        assert_prepared(preprocess, create_transform(**expected), photographs=PHOTOGRAPHS[:1] + PHOTOGRAPHS[2:4])


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(3, 224, 224), (3, 32, 128), (3, 31, 45)])
def test_timm_modes_sizes_and_filters(mode, size):
    for ratio, interpolation in [(1.0, "bilinear"), (0.9, "bicubic"), (0.875, "lanczos"), (0.95, "nearest")]:
        cfg = dict(input_size=size, crop_pct=ratio, crop_mode=mode, interpolation=interpolation)
        cfg |= dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
        assert_prepared(of_timm(cfg), create_transform(**cfg))


def test_timm_defaults():
    assert_prepared(of_timm({}), create_transform(**resolve_data_config(pretrained_cfg={"a": 1})))


def test_a_name_without_a_tag_says_that_its_weights_differ():
    hints = architecture_hints("vit_base_patch16_224")
    assert hints["preprocess"].mean == (0.5, 0.5, 0.5)
    (why,) = hints["unsure"].values()
    assert "augreg2_in21k_ft_in1k" in why and "dino" in why
    assert architecture_hints("vit_base_patch16_224.dino")["preprocess"].mean == META.mean
    with pytest.raises(convert.ConversionError, match=r"no weights vit_base_patch16_224.mine; it has augreg2"):
        architecture_hints("vit_base_patch16_224.mine")
    with pytest.raises(convert.ConversionError, match=r"crops images in the mode 'tile'.*--set preprocess"):
        of_timm({"crop_mode": "tile"})


# OpenCLIP -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("size", [(32, 32), (28, 42)])
def test_open_clip(mode, size):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    for interpolation in ("bicubic", "bilinear"):
        cfg = dict(mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.25], interpolation=interpolation, resize_mode=mode)
        assert_prepared(of_open_clip(cfg, size), image_transform_v2(PreprocessCfg(size=size, **cfg), is_train=False))
    assert_prepared(of_open_clip({}, size), image_transform_v2(PreprocessCfg(size=size), is_train=False))


def test_open_clip_refuses_by_name():
    for cfg, words in [
        ({"resize_mode": "tile"}, "'tile'"),
        ({"resize_mode": "longest", "fill_color": 9}, "fills with 9"),
    ]:
        with pytest.raises(convert.ConversionError, match=words):
            of_open_clip(cfg, (32, 32))


# transformers ---------------------------------------------------------------------------------------------------------

ON_PILLOW = {"Bit": "bit", "CLIP": "clip", "ChineseCLIP": "chinese_clip", "ViT": "vit", "DeiT": "deit"}
SQUARE = {"height": 40, "width": 40}
CHANGES = {
    "its defaults": {},
    "a short side": dict(size={"shortest_edge": 41}, crop_size={"height": 32, "width": 30}, do_center_crop=True),
    "a crop that pads": dict(size={"shortest_edge": 30}, crop_size={"height": 33, "width": 33}, do_center_crop=True),
    "both sides": dict(size={"height": 33, "width": 45}, do_center_crop=False, resample=1),
    "whole numbers": dict(size=40, crop_size=35, do_center_crop=True, resample=0),
    "no resize": dict(do_resize=False, do_center_crop=True, crop_size={"height": 99, "width": 80}),
    "no normalisation": dict(size=SQUARE, do_normalize=False, do_center_crop=False),
    "no rescaling": dict(size=SQUARE, do_rescale=False, do_center_crop=False, image_mean=[9.0, 8.0, 7.0]),
    "neither": dict(size=SQUARE, do_rescale=False, do_normalize=False, do_center_crop=False),
    "another factor": dict(size=SQUARE, rescale_factor=1 / 127.5, do_center_crop=False),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ON_PILLOW)
def test_transformers(name, change):
    module = __import__(f"transformers.models.{ON_PILLOW[name]}.image_processing_pil_{ON_PILLOW[name]}", fromlist=["_"])
    processor = getattr(module, f"{name}ImageProcessorPil")(**CHANGES[change])
    preprocess = of_transformers(json.loads(json.dumps(processor.to_dict())))
    largest = 255 if "no rescaling" in change or change == "neither" else 1
    assert_prepared(
        preprocess,
        applied(processor),
        atol=4e-6 * largest / min(preprocess.std[0] * largest, 0.25),
    )
    # The file may leave out what equals the defaults, and be of an older version.
    said = {"feature_extractor_type": f"{name}FeatureExtractor"} | CHANGES[change]
    assert of_transformers(said) == preprocess


def test_dinov3_resizes_without_rounding():
    from transformers.models.dinov3_vit.image_processing_dinov3_vit import DINOv3ViTImageProcessor

    satellite = dict(image_mean=[0.43, 0.411, 0.296], image_std=[0.213, 0.156, 0.143])
    for changes in ({}, dict(size={"height": 48, "width": 32}) | satellite):
        processor = DINOv3ViTImageProcessor(**changes)
        preprocess = of_transformers(processor.to_dict())
        assert_prepared(preprocess, applied(processor), atol=1e-4)  # 0.005 grey levels: PyTorch weighs in float32
        assert preprocess.fit == "stretch" and not preprocess.whole


@pytest.mark.parametrize("name", ON_PILLOW)
def test_processors_on_torchvision_differ_by_a_grey_level(name):
    """transformers 5 prefers them. They round otherwise; and of tall pictures they always shrink the width first, which
    Pillow 13 does not, and which moves noise by up to 18 levels."""
    processor = getattr(transformers, f"{name}ImageProcessor")()
    preprocess = of_transformers(processor.to_dict())
    assert_prepared(
        preprocess, applied(processor), 1.01 / 255 / min(preprocess.std), [*PHOTOGRAPHS[:1], *PHOTOGRAPHS[4:]]
    )


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"image_processor_type": "FlavaImageProcessor"}, "is for FlavaImageProcessor, which is not known"),
        ({"size": 224}, "names no image processor"),
        ({"image_processor_type": "BitImageProcessor", "do_center_crop": False}, "keeps the aspect ratio"),
        ({"image_processor_type": "ViTImageProcessor", "size": {"longest_edge": 9}}, "resizes by longest_edge"),
        ({"image_processor_type": "ViTImageProcessor", "do_pad": True}, "pads images"),
        ({"image_processor_type": "ViTImageProcessor", "resample": 9}, "makes no sense"),
        ({"image_processor_type": "ViTImageProcessor", "image_std": [0, 1, 1]}, "makes no sense"),
        ({"image_processor_type": "ViTImageProcessor", "size": {"height": 9}}, "resizes by height"),
    ],
)
def test_transformers_refuses_by_name(said, words):
    with pytest.raises(convert.ConversionError, match=words):
        of_transformers(said)


def test_a_file_without_a_processor_that_says_all_is_taken():
    said = dict(size={"height": 33, "width": 45}, do_center_crop=False, resample=2, image_mean=0.5, image_std=0.25)
    assert of_transformers(said) == Preprocess((33, 45), (33, 45), (0.5,) * 3, (0.25,) * 3, "stretch", "bilinear")


def test_every_processor_of_a_family_is_tested():
    assert set(PROCESSORS) == {*ON_PILLOW, "DINOv3ViT"}
    assert timm.__version__  # the table of tags is timm's of this version


# Fine-tuned at another size ------------------------------------------------------------------------------------------


def small_timm(**given):
    timm = pytest.importorskip("timm")
    sizes = dict(depth=1, embed_dim=64, num_heads=1, num_classes=3)
    return timm.create_model("vit_small_patch14_reg4_dinov2", pretrained=False, **sizes, **given)


def test_a_model_of_one_size_is_prepared_for_it():
    """timm keeps the preparation for 518 pixels beside a model that it lets take 224 alone."""
    model, provenance = convert.load_described(small_timm(img_size=224))
    assert model.config.preprocess.size == (224, 224) and model.config.grid == (16, 16)
    assert any("518x518" in line and "takes 224x224 alone" in line for line in provenance.assumptions)
    with pytest.raises(AssertionError):  # the original
        small_timm(img_size=224)(torch.zeros(1, 3, 518, 518))


@pytest.mark.parametrize("given", [dict(img_size=224, dynamic_img_size=True), {}])
def test_a_model_that_takes_it_keeps_its_preparation(given):
    model, provenance = convert.load_described(small_timm(**given))
    assert model.config.preprocess.size == (518, 518) and not provenance.assumptions


def test_a_file_with_an_architecture_is_prepared_for_its_own_grid(tmp_path):
    sizes = {"depth": 1, "width": 64, "heads": 1}
    torch.save(small_timm(img_size=224).state_dict(), tmp_path / "tuned.pth")
    known = dict(architecture="vit_small_patch14_reg4_dinov2")
    model, provenance = convert.load_described(tmp_path / "tuned.pth", config=sizes, **known)
    assert model.config.preprocess.size == (224, 224)
    assert any("takes 224x224 alone" in line for line in provenance.assumptions)
    own = sizes | {"preprocess": {"resize": 518, "crop": 518}}
    assert convert.load(tmp_path / "tuned.pth", config=own, **known).config.preprocess.size == (518, 518)


def test_what_else_is_unsure_of_the_preparation_is_told_too(tmp_path):
    """Other weights of this architecture have another mean."""
    sizes = dict(depth=1, embed_dim=64, num_heads=1, num_classes=3)
    torch.save(timm.create_model("vit_base_patch16_224", img_size=96, **sizes).state_dict(), tmp_path / "tuned.pth")
    known = dict(architecture="vit_base_patch16_224", config={"depth": 1, "width": 64, "heads": 1})
    _, provenance = convert.load_described(tmp_path / "tuned.pth", **known)
    (told,) = (line for line in provenance.assumptions if line.startswith("preprocess"))
    assert "takes 96x96 alone" in told and "have another" in told


def test_a_folder_of_timm_says_whether_it_takes_other_sizes(tmp_path):
    from safetensors.torch import save_file

    model = small_timm(img_size=224)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    arguments = dict(img_size=224, depth=1, embed_dim=64, num_heads=1)
    content = dict(architecture="vit_small_patch14_reg4_dinov2", num_classes=3, model_args=arguments)
    for fixed, size in ((True, 224), (False, 518)):
        content["pretrained_cfg"] = dict(input_size=[3, 518, 518], crop_pct=1.0, fixed_input_size=fixed)
        (tmp_path / "config.json").write_text(json.dumps(content))
        found, provenance = convert.load_described(tmp_path)
        assert found.config.preprocess.size == (size, size)
        assert any("takes 224x224 alone" in line for line in provenance.assumptions) == fixed
