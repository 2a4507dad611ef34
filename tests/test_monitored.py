"""The pictures and the table of a layer of anybody's model: there for every kind of layer, and of the right numbers."""

import dataclasses
import math

import pytest
import torch

pytest.importorskip("matplotlib", reason="needs the extra [demo]")

from helpers.monitoring import MAKERS

from bcl_fast.experiments import monitored, plots
from bcl_fast.glance import glance, values

SCALARS = [{"step": step, "loss": 1 / (1 + step)} for step in range(25)]
TITLES = ["Course", "Step inspector", "Win rates", "Forces", "Weights and targets", "Coverage", "Last measured step"]
WITHOUT = {"vectors": {"Forces", "Weights and targets"}, "smallest": {"Weights and targets"}}
WITHOUT["wide"] = WITHOUT["smallest"]


@pytest.fixture(scope="module")
def layers():
    return {name: maker() for name, maker in MAKERS.items()}


def blocks_of(layer, glances=None, scalars=SCALARS):
    found = monitored.layer_blocks("encoder.0", layer.lines, layer.glances if glances is None else glances, scalars)
    return {block["title"]: block for block in found}


@pytest.mark.filterwarnings("error")  # matplotlib's, of empty logarithmic axes and the like
def test_every_kind_of_layer_has_its_pictures(layers, tmp_path):
    for name in MAKERS:
        blocks = blocks_of(layers[name])
        for title, block in blocks.items():
            if "figure" in block:
                plots.save(block["figure"], tmp_path / f"{title}.png")
        assert list(blocks) == [title for title in TITLES if title not in WITHOUT.get(name, ())], name


def test_vectors_are_kept_to_a_share_of_their_own_feature_s_range(layers):
    """Of a feature that is far smaller than others, or beyond float32, as of any."""
    scales = 10.0 ** torch.tensor([0, -8, 39, -300, 308], dtype=torch.float64)
    weight = (torch.rand(5, 16, dtype=torch.float64) - 0.3) * 2 * scales[:, None]
    weight[0] = 0
    record = dataclasses.replace(layers["beyond float32"].records[0], weight=weight)
    found = values(glance(record, None), "weight")
    shares = (found - weight).abs() / (weight.amax(dim=1, keepdim=True) / 2 - weight.amin(dim=1, keepdim=True) / 2)
    assert found[0].eq(0).all() and shares[1:].max() < 1.01 / 255


@pytest.mark.parametrize("name", ["images", "smallest", "always diverged"])
def test_lines_alone_have_a_course_and_a_table(layers, name, tmp_path):
    blocks = blocks_of(layers[name], glances=[], scalars=[])
    assert list(blocks) == ["Course", "Last measured step"]
    plots.save(blocks["Course"]["figure"], tmp_path / "course.png")


def curves(figure):
    """Heading -> label -> the points of a line."""
    return {
        axes.get_title(): {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
        for axes in figure.axes
        if axes.get_title()
    }


def test_the_course_draws_metrics_counts_forces_and_the_users_numbers(layers):
    lines = layers["images"].lines
    found = curves(blocks_of(layers["images"])["Course"]["figure"])
    assert found["loss"] == {"loss": [[row["step"], row["loss"]] for row in SCALARS]}
    drawn = {label: points for panel in found.values() for label, points in panel.items()}
    for key, label in {
        **plots.COUNTS,
        **plots.FORCES,
        **{k: v for p in plots.ALIKE.values() for k, v in p.items()},
    }.items():
        assert drawn[label] == [[line["step"], line[key]] for line in lines], key
    assert "Adam" not in str(found)


def test_of_many_numbers_of_the_user_four_are_drawn(layers):
    scalars = [{"step": step, **{f"number{i}": i * step for i in range(6)}} for step in range(3)] + [{"step": 9}]
    block = blocks_of(layers["images"], scalars=scalars)["Course"]
    assert block["lines"] == ("4 of 6 scalars; not shown: number4, number5.",)
    assert len([title for title in curves(block["figure"]) if title.startswith("number")]) == 4


def test_curves_of_thousands_of_steps_have_few_markers(layers):
    lines = [{**layers["images"].lines[0], "step": step} for step in range(5000)]
    figure = next(monitored.layer_blocks("encoder.0", lines, [], []))["figure"]
    every = [line.get_markevery() for axes in figure.axes for line in axes.get_lines()]
    assert every and all(5000 / one <= 200 for one in every)


def test_win_rates_and_coverage_are_those_of_the_records(layers):
    layer = layers["images"]
    blocks = blocks_of(layer)
    image = blocks["Win rates"]["figure"].axes[0].images[0].get_array()
    rates = torch.stack([record.win_rate for record in layer.records]).double()
    torch.testing.assert_close(torch.tensor(image.data), rates[:, rates[-1].argsort(descending=True)].T)
    for patch, place in zip(blocks["Coverage"]["figure"].axes[0].patches, (0, -1), strict=True):
        heights = patch.get_path().vertices[:, 1]
        assert f"step {layer.lines[place]['step']}" == patch.get_label()
        assert heights.max() <= len(layer.records[place].image_coverage)
    broken = blocks_of(layers["diverged"])["Coverage"]["figure"].axes[0].get_legend().get_texts()
    assert [text.get_text() for text in broken] == ["step 0", "step 10 (6 not finite)"]
    legend = [text.get_text() for text in blocks["Coverage"]["figure"].axes[0].get_legend().get_texts()]
    assert legend == ["step 0", "step 30"]


def test_the_optimizer_is_not_called_adam(layers):
    figure = blocks_of(layers["images"])["Forces"]["figure"]
    assert [axes.get_title() for axes in figure.axes] == [
        "The gradient against pull",
        "The optimizer's move against pull",
    ]


@pytest.mark.parametrize(
    "name, channels, size", [("images", 1, (6, 5)), ("color", 3, (36, 20)), ("channels", 1, (5, 7))]
)
def test_mosaics_have_the_shape_and_the_colors_of_images(layers, name, channels, size):
    layer = layers[name]
    drawn = torch.tensor(blocks_of(layer)["Weights and targets"]["figure"].axes[0].images[0].get_array().data)
    zoom = math.ceil(20 / max(size))
    first = drawn[: size[0] * zoom : zoom, : size[1] * zoom : zoom]
    weight = layer.records[-1].weight[0].reshape(-1, *size)
    weight = weight if channels == 3 else weight.mean(dim=0, keepdim=True)
    weight = weight / weight.abs().max()
    expected = (weight.permute(1, 2, 0) + 1) / 2 if channels == 3 else weight[0]
    assert first.shape == expected.shape and (first - expected).abs().max() < 0.03
    height, width = drawn.shape[:2]
    assert 0.4 < height / width < 2.5


def test_the_table_has_the_last_step_in_words(layers):
    table = blocks_of(layers["images"])["Last measured step"]["table"]
    assert table["headings"][1] == "step 30"
    rows = {row[0]["text"]: [cell["text"] for cell in row[1:]] for row in table["rows"]}
    line = layers["images"].lines[-1]
    assert rows["alive"][0] == str(line["alive"]) and float(rows["wt_sim"][0]) == pytest.approx(
        line["wt_sim"], abs=6e-4
    )
    assert float(rows["pull"][0]) == pytest.approx(line["pull"], rel=0.06)
    assert set(line) - set(rows) == {"layer"} and all(meaning for _, meaning in rows.values())
    broken = blocks_of(layers["always diverged"])["Last measured step"]["table"]["rows"]
    assert {row[0]["text"]: row[1]["text"] for row in broken}["wt_sim"] == "not finite"
