"""Grids and labelled arrays: numbers keep their labels wherever they go, into pictures and files too."""

import io
import itertools
import sys

import numpy as np
import pytest
from conftest import FAMILIES
from matplotlib.colors import to_rgba
from PIL import Image

from jaxvit import Grid, NamedArray, grids
from jaxvit.model.params import abstract

CONTROLS = ("zero", "mean", "noise")


@pytest.fixture
def effect():
    """layer x head x control x image, of both signs."""
    axes = {"layer": (0, 1, 2, 3), "head": (0, 1, 2), "control": CONTROLS, "image": (4, 7)}
    return NamedArray(np.random.default_rng(0).normal(size=(4, 3, 3, 2)), axes, "change")


# --- grids


def test_points_are_all_combinations_and_the_last_axis_moves_fastest():
    grid = Grid(layer=range(2), strength=(0.1, 2), control=("zero", "mean"), group={"cls": 0, "patches": 5})
    assert grid.axes == {
        "layer": (0, 1), "strength": (0.1, 2.0), "control": ("zero", "mean"), "group": ("cls", "patches")
    }  # fmt: skip
    assert (len(grid), grid.shape) == (16, (2, 2, 2, 2))
    expected = itertools.product((0, 1), (0.1, 2.0), (0, 1), (0, 5))
    assert list(zip(*(column.tolist() for column in grid.points.values()), strict=True)) == list(expected)
    assert list(grid.points) == ["layer", "strength", "control", "group"]
    assert [column.dtype.kind for column in grid.points.values()] == list("ifii")
    assert repr(grid) == "Grid(layer 2, strength 2, control 2, group 2)"


def test_axes_may_be_numpy_and_generators():
    grid = Grid(layer=np.arange(3), strength=np.linspace(0, 1, 3), head=(h for h in (5, 1)))
    assert grid.axes == {"layer": (0, 1, 2), "strength": (0.0, 0.5, 1.0), "head": (5, 1)}
    assert all(type(label) in (int, float) for labels in grid.axes.values() for label in labels)
    np.testing.assert_array_equal(grid.points["head"][:4], [5, 1, 5, 1])


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({}, "a grid needs an axis"),
        ({"layer": ()}, "axis layer is empty"),
        ({"layer": (1, 2, 1)}, "axis layer has the same value twice"),
        ({"control": ("zero", "zero")}, "axis control has the same value twice"),
        ({"control": "zero"}, "axis control is 'zero'; expected several values"),
        ({"layer": (1, "two")}, "expected numbers, words, or words with numbers"),
        ({"layer": ((1, 2), (3,))}, "expected numbers, words, or words with numbers"),
        ({"layer": np.ones((2, 2))}, "expected numbers, words, or words with numbers"),
        ({"layer": (True, False)}, "expected numbers, words, or words with numbers"),
    ],
)
def test_what_is_no_grid_is_said_in_a_sentence(axes, message):
    with pytest.raises(ValueError, match=message):
        Grid(**axes)


def test_the_grids_of_a_model_name_its_layers_heads_and_groups():
    model = abstract(FAMILIES["dinov2 with registers"])
    names = ("cls", "register 0", "register 1", "register 2", "patches")
    layers = (0, 1, 2)
    assert grids.heads(model).axes == {"layer": layers, "head": (0, 1, 2, 3)}
    assert grids.layers_by_groups(model).axes == {"layer": layers, "group": names}
    assert grids.group_edges(model).axes == {"layer": layers, "query": names, "key": names}
    assert grids.group_edges(model, "prefix").axes == {"layer": layers, "query": names[:-1], "key": names}
    assert grids.registers(model).axes == {"layer": layers, "register": (0, 1, 2)}
    np.testing.assert_array_equal(grids.registers(model).points["register"], [0, 1, 2] * 3)
    np.testing.assert_array_equal(grids.layers_by_groups(model).points["group"], [0, 1, 2, 3, 4] * 3)
    assert len(grids.tokens(model)) == model.layout.tokens == 1 + 3 + 56**2
    assert len(grids.tokens(model, model.config.layout(8, 12))) == 10


def test_a_model_without_registers_has_no_grid_of_them():
    model = abstract(FAMILIES["dinov2"])
    assert grids.layers_by_groups(model).axes["group"] == ("cls", "patches")
    for grid in (grids.registers, lambda model: grids.groups(model, "registers")):
        with pytest.raises(ValueError, match="this model has no registers"):
            grid(model)


# --- labelled arrays


def test_means_and_deviations_are_numpys_over_named_axes(effect):
    mean = effect.mean("image", "head")
    np.testing.assert_array_equal(mean, effect.values.mean((1, 3)))
    assert mean.axes == {"layer": (0, 1, 2, 3), "control": CONTROLS} and mean.name == "change"
    np.testing.assert_array_equal(effect.std("control"), effect.values.std(2))
    assert effect.mean().values.shape == () and effect.mean().axes == {}
    np.testing.assert_array_equal(effect.std().values, effect.values.std())


def test_select_takes_parts_by_their_labels(effect):
    part = effect.select(image=7, layer=2)
    np.testing.assert_array_equal(part, effect.values[2, :, :, 1])
    assert list(part.axes) == ["head", "control"]
    some = effect.select(control=("noise", "zero"), head=1)
    np.testing.assert_array_equal(some, effect.values[:, 1][:, [2, 0]])
    assert some.axes == {"layer": (0, 1, 2, 3), "control": ("noise", "zero"), "image": (4, 7)}
    fine = NamedArray(np.arange(2.0), {"strength": (0.1, 0.2)})
    assert fine.select(strength=0.2).values == 1


def test_largest_names_the_places_of_the_largest_values():
    array = NamedArray(np.array([[0.5, np.nan, -3], [2, 1, 0]]), {"layer": (0, 1), "control": CONTROLS})
    assert array.largest() == [({"layer": 1, "control": "zero"}, 2)]
    assert [value for _, value in array.largest(99)] == [2, 1, 0.5, 0, -3]
    assert [value for _, value in array.smallest(99)] == [-3, 0, 0.5, 1, 2]
    first, second = array.largest(2, magnitude=True)
    assert first == ({"layer": 0, "control": "noise"}, -3) and second[1] == 2


def test_it_is_an_array_to_numpy(effect):
    assert np.asarray(effect) is effect.values
    assert np.array(effect, np.float32).dtype == np.float32
    copied = np.array(effect)
    copied[:] = 0
    assert effect.values.any()
    assert repr(effect) == "NamedArray('change', [layer 4, head 3, control 3, image 2])"


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64, bool])
def test_a_file_holds_every_bit_and_label(dtype, effect, tmp_path):
    array = NamedArray((effect.values * 3).astype(dtype), {**effect.axes, "head": (0.1, "a", 3)}, "Δ change")
    array.save(tmp_path / "new" / "effect.npz")
    again = NamedArray.load(str(tmp_path / "new" / "effect.npz"))
    assert again.values.dtype == dtype and again.name == array.name
    np.testing.assert_array_equal(again, array)
    assert list(again.axes.items()) == list(array.axes.items())
    assert [*map(type, again.axes["head"])] == [float, str, int]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["effect.npz"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text", "npy", "other npz", "missing", "folder"])
def test_a_file_that_is_not_whole_is_said_in_a_sentence(damage, effect, tmp_path):
    path = tmp_path / "effect.npz"
    effect.save(path)
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        path.write_bytes(content[:300] + bytes(byte ^ 0xFF for byte in content[300:400]) + content[400:])
    elif damage in ("empty", "text"):
        path.write_text("" if damage == "empty" else "layer,head\n1,2\n")
    elif damage == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif damage == "other npz":
        np.savez(path, values=np.zeros(3))
    else:
        path.unlink()
        if damage == "folder":
            path.mkdir()
    with pytest.raises(
        ValueError, match="does not exist" if damage == "missing" else "is not a complete file of"
    ) as error:
        NamedArray.load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_wrong_axes_and_labels_are_said_in_a_sentence(effect):
    for call in (
        lambda: effect.mean("layers"),
        lambda: effect.std("image", "layers"),
        lambda: effect.select(layers=3),
        lambda: effect.mean("image").select(control="zero").plot(x="layers"),
    ):
        with pytest.raises(ValueError, match="no axis 'layers'; there are layer, head"):
            call()
    with pytest.raises(ValueError, match="no control 'none'; there are zero, mean, noise"):
        effect.select(control="none")
    with pytest.raises(ValueError, match="no layer 9; there are 0, 1, 2, 3"):
        effect.select(layer=(0, 9))
    with pytest.raises(ValueError, match=r"values have shape \[2\]; expected that of the axes, {'layer': 3}"):
        NamedArray(np.zeros(2), {"layer": (0, 1, 2)})


def test_xarray_gets_the_labels(effect, monkeypatch):
    class Xarray:
        DataArray = staticmethod(lambda *args: args)

    monkeypatch.setitem(sys.modules, "xarray", Xarray)
    values, coordinates, dimensions, name = effect.to_xarray()
    assert values is effect.values and dimensions == ("layer", "head", "control", "image") and name == "change"
    assert coordinates == {axis: list(labels) for axis, labels in effect.axes.items()}


@pytest.mark.parametrize("package", ["xarray", "matplotlib"])
def test_a_package_that_is_missing_is_said_in_a_sentence(package, effect, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    if package == "matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=f"{package} is not installed: pip install {package}"):
        effect.to_xarray() if package == "xarray" else effect.mean("image", "control").plot()


# --- pictures


def written(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_two_axes_are_a_heat_map_with_every_label(effect, tmp_path):
    shown = effect.mean("image").select(head=1)
    figure = shown.plot(tmp_path / "map.png", x="layer", y="control")
    panel, bar = figure.axes
    assert (panel.get_xlabel(), panel.get_ylabel(), bar.get_ylabel()) == ("layer", "control", "change")
    assert written(panel.xaxis) == ["0", "1", "2", "3"] and written(panel.yaxis) == list(CONTROLS)
    (image,) = panel.images
    np.testing.assert_array_equal(image.get_array(), shown.values.T)
    # Row 0 is at the bottom, and each label in the middle of its cells.
    assert image.origin == "lower" and list(panel.get_yticks()) == [0, 1, 2]
    low, high = image.get_clim()
    assert high == -low == np.abs(shown.values).max() and image.get_cmap().name == "RdBu_r"
    assert image.get_cmap()(0.5) == pytest.approx(to_rgba("w"), abs=0.05)
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_values_of_one_sign_have_a_scale_from_the_least_to_the_largest(effect):
    shown = NamedArray(np.abs(effect.values[:, :, 0, 0]) + 1, {"layer": (0, 1, 2, 3), "head": (0, 1, 2)})
    (image,) = shown.plot().axes[0].images
    assert image.get_clim() == (shown.values.min(), shown.values.max()) and image.get_cmap().name == "viridis"


def test_three_axes_are_heat_maps_on_one_scale(effect, tmp_path):
    shown = effect.select(image=4)
    figure = shown.plot(tmp_path / "maps.svg", col="control", x="head")
    *panels, bar = figure.axes
    assert [panel.get_title() for panel in panels] == list(CONTROLS) and bar.get_ylabel() == "change"
    for i, panel in enumerate(panels):
        np.testing.assert_array_equal(panel.images[0].get_array(), shown.values[:, :, i])
        assert panel.get_xlabel() == "head" and written(panel.xaxis) == ["0", "1", "2"]
        assert panel.images[0].get_clim() == panels[0].images[0].get_clim()
    assert panels[0].get_ylabel() == "layer"
    assert (tmp_path / "maps.svg").read_text().startswith("<?xml")
    assert [panel.get_title() for panel in shown.plot(col="head").axes[:-1]] == ["head 0", "head 1", "head 2"]


def test_one_axis_is_a_line_over_numbers_and_bars_over_words(effect):
    by_layer, by_control = effect.mean("image", "head", "control"), effect.mean("image", "head", "layer")
    panel = by_layer.plot().axes[0]
    np.testing.assert_array_equal(panel.lines[0].get_xydata(), np.stack([range(4), by_layer.values], 1))
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("layer", "change")
    assert all(place == int(place) for place in panel.get_xticks())
    for labels in ((0, 1), (3,), (2, 5)):  # no tick between two layers
        panel = NamedArray(np.zeros(len(labels)), {"layer": labels}).plot().axes[0]
        assert list(panel.get_xticks()) == list(labels)
    panel = by_control.plot().axes[0]
    assert [bar.get_height() for bar in panel.patches] == list(by_control.values)
    assert written(panel.xaxis) == list(CONTROLS)
    panel = NamedArray(np.arange(3.0), {"strength": (0.1, 1.0, 10.0)}).plot().axes[0]
    np.testing.assert_array_equal(panel.lines[0].get_xdata(), [0.1, 1, 10])


def test_long_axes_write_every_few_labels_and_words_all():
    layers, words = tuple(range(40)), tuple(f"register {i}" for i in range(20))
    panel = NamedArray(np.zeros((40, 20)), {"layer": layers, "group": words}).plot().axes[0]
    assert written(panel.xaxis) == list(map(str, range(0, 40, 5)))
    assert list(panel.get_xticks()) == list(range(0, 40, 5))
    assert written(panel.yaxis) == list(words)
    panel = NamedArray(np.zeros((2, 20)), {"layer": (0, 1), "group": words}).plot(x="group", y="layer").axes[0]
    assert {label.get_rotation() for label in panel.get_xticklabels()} == {45.0}


@pytest.mark.parametrize(
    ("values", "limits"),
    [
        (np.zeros((2, 2)), (-0.1, 0.1)),  # a colour bar needs some width
        (np.full((2, 2), np.nan), (0, 1)),
        (np.array([[0.5, np.nan], [np.inf, -1]]), (-1, 1)),  # around 0, as there are both signs
        (np.array([[0.5, np.nan], [-np.inf, 2]]), (0.5, 2)),
    ],
)
def test_constant_and_missing_values_are_drawn(values, limits, tmp_path):
    image = NamedArray(values, {"layer": (0, 1), "head": (0, 1)}).plot(tmp_path / "map.png").axes[0].images[0]
    assert image.get_clim() == limits
    np.testing.assert_array_equal(
        np.ma.filled(np.ma.asarray(image.get_array()), np.nan), np.where(np.isfinite(values), values, np.nan)
    )


@pytest.mark.parametrize(
    ("axes", "given", "message"),
    [
        ("", {}, "cannot be drawn: take the mean over, or select"),
        ("abcd", {}, "cannot be drawn: take the mean over, or select"),
        ("a", {"y": "a"}, "is drawn with x, an axis each"),
        ("ab", {"col": "a"}, "is drawn with x and y, an axis each"),
        ("ab", {"x": "a", "y": "a"}, "is drawn with x and y, an axis each"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_a_sentence(axes, given, message):
    array = NamedArray(np.zeros((2,) * len(axes)), dict.fromkeys(axes, (0, 1)))
    with pytest.raises(ValueError, match=message):
        array.plot(**given)


def test_a_notebook_shows_a_plot():
    """Also where pyplot was not imported, whose backend would."""
    figure = NamedArray(np.arange(6.0).reshape(2, 3), {"layer": (0, 1), "head": (0, 1, 2)}).plot()
    with Image.open(io.BytesIO(figure._repr_png_())) as picture:
        assert picture.format == "PNG" and np.asarray(picture.convert("L")).std() > 10
