"""The step inspector, read back from a browser: what its maps and images show, and what keys and clicks do."""

import json
import re

import pytest
import torch

pytest.importorskip("matplotlib", reason="needs the extra [demo]")
pytest.importorskip("jinja2", reason="needs the extra [demo]")

from helpers import browser as chromium
from helpers.monitoring import MAKERS, page

from bcl_fast.experiments import inspector
from bcl_fast.glance import MATRICES, VECTORS

needs_browser = pytest.mark.skipif(chromium.BROWSER is None, reason="no Chromium or Chrome is installed")
STRIPS = ("image_coverage", "image_need")
# Of a copy: Chromium warns where a canvas that is drawn on is read time and again.
PIXELS = """(canvas => {
  const [copy, {width, height}] = [document.createElement('canvas'), canvas];
  Object.assign(copy, {width, height});
  const context = copy.getContext('2d', {willReadFrequently: true});
  context.drawImage(canvas, 0, 0);
  return [height, width, Array.from(context.getImageData(0, 0, width, height).data)];
})"""


@pytest.fixture(scope="module")
def layers():
    made = {}

    def get(name):
        if name not in made:
            made[name] = MAKERS[name]()
        return made[name]

    return get


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with chromium.browser(tmp_path_factory.mktemp("profile")) as window:
        yield window


@pytest.fixture
def show(window, layers, tmp_path):
    """Opens a page of the layers of these names; nothing may be said in its console."""

    def open_page(*names, width=1200):
        data = [inspector.inspector_data(layers(name).lines, layers(name).glances) for name in names]
        path = tmp_path / "page.html"
        path.write_text(page([{"title": "Step inspector", "inspector": one} for one in data]), encoding="utf-8")
        window.open(path, width)
        window.until(f"document.querySelectorAll('.inspector[data-ready]').length == {len(names)}")
        return [View(window, i) for i in range(len(names))]

    yield open_page
    assert window.messages == []


class View:
    """One inspector of the page."""

    def __init__(self, window, i):
        self.window, self.root = window, f"document.querySelectorAll('.inspector')[{i}]"

    def one(self, selector):
        return f"{self.root}.querySelector({json.dumps(selector)})"

    def evaluate(self, function, selector):
        """The values of a JavaScript function of every element that is found."""
        found = f"Array.from({self.root}.querySelectorAll({json.dumps(selector)}), {function})"
        return self.window.evaluate(found)

    def text(self, selector="*"):
        return self.window.evaluate(f"{self.one(selector)}.innerText")

    def pixels(self, selector):
        """The colors of a canvas [height, width, 3]."""
        height, width, data = self.window.evaluate(f"{PIXELS}({self.one(selector)})")
        return torch.tensor(data).reshape(height, width, 4)[..., :3]

    def levels(self, selector, bar):
        """The places of a canvas's colors on a scale: [height, width], 0 to 255."""
        colors, scale = self.pixels(selector), self.pixels(bar)[0]
        same = (colors[:, :, None] == scale).all(dim=3)
        assert same.sum(dim=2).eq(1).all()
        return same.int().argmax(dim=2)

    def map(self, name):
        """What a map shows, in its own scale: [b, d] as shares of the scale."""
        figure = f"[data-name={name}]"
        return self.levels(f"{figure} .stage canvas", f"{figure} .scale canvas") / 255

    def focus(self, selector):
        self.window.evaluate(f"{self.one(selector)}.focus()")

    def press(self, selector, key, times=1):
        self.focus(selector)
        self.window.press(key, times)

    def everything(self):
        return [self.text(selector) for selector in (".controls", ".metrics", ".feature", ".sample")] + [
            self.map(name).tolist() for name in MATRICES
        ]


FEATURE, SAMPLE = ".controls label:nth-of-type(2) select", ".controls label:nth-of-type(3) select"
SLIDER, SAME = "input[type=range]", "input[type=checkbox]"


def kept(layer, step, name):
    """A matrix of the record [b, d], or a strip [b, 1], where it is kept."""
    record, glance = layer.records[step], layer.glances[step]
    values = getattr(record, name)[glance["samples"]]
    return values[:, None] if name in STRIPS else values[:, glance["features"]]


def check_maps(view, layer, step, ranges=None):
    for name in (*MATRICES, *STRIPS):
        expected = kept(layer, step, name).float()
        low, high = ranges[name] if ranges else (expected.min(), expected.max())
        shown = low + view.map(name) * (high - low)
        error = (shown - expected).abs().max()
        # In a range of several steps bytes are rounded twice.
        assert shown.shape == expected.shape and error <= (high - low) / 255 * (1.01 if ranges else 0.51) + 1e-7, name
    assert view.text(".step .now").startswith(f"{layer.lines[step]['step']} ({step + 1} of ")


def number(text):
    return float(text.replace("\u2212", "-"))


@needs_browser
@pytest.mark.parametrize("name", ["images", "vectors"])
def test_maps_show_the_numbers_of_the_record(show, layers, name):
    (view,) = show(name)
    check_maps(view, layers(name), 0)
    for matrix in MATRICES:
        low, high = view.evaluate("e => e.textContent", f"[data-name={matrix}] .scale span")
        assert number(low) == pytest.approx(kept(layers(name), 0, matrix).min().item(), rel=6e-3, abs=1e-6)
        assert number(high) == pytest.approx(kept(layers(name), 0, matrix).max().item(), rel=6e-3)
        text = view.text(f"[data-name={matrix}] .alike")
        alike = [number(part) for part in re.findall(r"[\d.e\u2212]+\d", text)]
        assert alike == pytest.approx(layers(name).glances[0][f"{matrix}_alike"].tolist(), rel=6e-3, abs=1e-4)


@needs_browser
def test_arrow_keys_move_the_slider_through_the_steps(show, layers):
    (view,) = show("images")
    view.press(SLIDER, "ArrowRight")
    check_maps(view, layers("images"), 1)
    view.press(SLIDER, "End")
    check_maps(view, layers("images"), 3)
    view.press(SLIDER, "ArrowLeft")
    check_maps(view, layers("images"), 2)
    line = layers("images").lines[2]
    assert view.text(".metrics").startswith(f"alive: {line['alive']}") and f"dead: {line['dead']}" in view.text(
        ".metrics"
    )


@needs_browser
def test_scales_may_be_the_same_at_all_steps(show, layers):
    (view,) = show("images")
    view.press(SLIDER, "ArrowRight")
    view.press(SAME, " ")
    every = {name: [kept(layers("images"), step, name) for step in range(4)] for name in (*MATRICES, *STRIPS)}
    ranges = {name: (min(m.min() for m in all_), max(m.max() for m in all_)) for name, all_ in every.items()}
    check_maps(view, layers("images"), 1, ranges)


def check_feature(view, layer, step, column):
    """What is said and drawn of a feature is its own."""
    record, glance = layer.records[step], layer.glances[step]
    feature = glance["features"][column].item()
    assert f"Feature {feature} at step {layer.lines[step]['step']}" in view.text(".feature h4")
    numbers = dict(view.evaluate("e => [e.dataset.key, e.textContent]", ".feature dd"))
    assert {"win_rate", "novelty", "som_strength"} <= numbers.keys()
    for key, text in numbers.items():
        own = glance[key] if key in glance else getattr(record, key)
        assert number(text) == pytest.approx(own[feature].item(), rel=0.05, abs=1e-9), key  # two digits where small
    won = [s for s in glance["samples"].tolist() if record.winner[s] == feature]
    words = f"Wins {len(won)} of the {len(glance['samples'])} samples shown"
    assert view.text(".wins") == words + (f": {', '.join(map(str, won))}." if won else ".")
    assert view.evaluate("e => e.selectedIndex", "select")[0] == column
    column_marks = view.evaluate("e => +e.getAttribute('x')", "[data-name=affinity] .chosen[width='1']")
    assert column_marks == [column]


@needs_browser
def test_keys_in_the_list_choose_a_feature(show, layers):
    (view,) = show("images")
    check_feature(view, layers("images"), 0, 0)
    view.press(FEATURE, "ArrowDown", 5)
    check_feature(view, layers("images"), 0, 5)
    view.press(SLIDER, "ArrowRight")
    check_feature(view, layers("images"), 1, 5)


@needs_browser
@pytest.mark.parametrize("name, matrix", [("images", "rescue_pull"), ("vectors", "rank_score")])
def test_a_click_on_a_cell_chooses_its_feature_and_sample(show, layers, name, matrix):
    (view,) = show(name)
    b, d = kept(layers(name), 0, matrix).shape
    row, column = b - 3, d - 2
    view.window.click(view.one(f"[data-name={matrix}] .stage"), (column + 0.5) / d, (row + 0.5) / b)
    check_feature(view, layers(name), 0, column)
    record, sample = layers(name).records[0], layers(name).glances[0]["samples"][row].item()
    text = view.text(".sample")
    assert f"Sample {sample}: won by feature {record.winner[sample]}" in text
    pulls = int((record.rescue_pull[sample] > 0).sum()) or "none"
    assert f"It pulls {pulls} of the {record.rescue_pull.shape[1]} features." in text
    coverage, need = (number(re.search(rf"{what} ([\d.]+\d)", text)[1]) for what in ("coverage", "need"))
    assert coverage == pytest.approx(record.image_coverage[sample].item(), rel=6e-3)
    assert need == pytest.approx(record.image_need[sample].item(), rel=6e-3)
    for one in MATRICES:
        cell = number(view.text(f"[data-name={one}] .cell").rpartition(" ")[2])
        values = kept(layers(name), 0, one)
        spread = (values.max() - values.min()).item()
        assert cell == pytest.approx(values[row, column].item(), abs=spread / 255 + 6e-3 * spread)


@needs_browser
def test_keys_and_clicks_on_a_strip_choose_a_sample(show, layers):
    (view,) = show("images")
    view.press(SAMPLE, "ArrowDown", 4)
    assert view.text(".sample").startswith("Sample 4:")
    view.window.click(view.one("[data-name=image_need] .stage"), 0.5, 9.5 / 12)
    assert view.text(".sample").startswith("Sample 9:")
    check_feature(view, layers("images"), 0, 0)  # as it was


@needs_browser
@pytest.mark.parametrize("name", ["images", "vectors"])
def test_winners_are_marked(show, layers, name):
    (view,) = show(name)
    view.press(SLIDER, "ArrowRight")
    marks = view.evaluate("e => [e.getAttribute('y'), e.getAttribute('x')].map(v => Math.floor(v))", ".won")
    record, glance = layers(name).records[1], layers(name).glances[1]
    features = glance["features"].tolist()
    winners = [(row, record.winner[s].item()) for row, s in enumerate(glance["samples"].tolist())]
    assert marks == [[row, features.index(winner)] for row, winner in winners if winner in features] != []
    assert len(view.evaluate("e => e.parentNode.parentNode.parentNode.dataset.name", ".won")) == len(marks)


@needs_browser
def test_rescue_images_are_those_of_its_samples(show, layers):
    (view,) = show("images")
    view.press(FEATURE, "ArrowDown", 3)
    view.press(SLIDER, "ArrowRight", 2)
    record = layers("images").records[2]
    pull, samples = record.rescue_pull[:, 3].sort(descending=True)
    shown = [int(one) for one in view.evaluate("e => e.dataset.sample", ".rescue figure")]
    assert sorted(shown) == sorted(samples[pull > 0].tolist()) and len(shown) == 5
    low, high = record.x[layers("images").glances[2]["chosen"]].aminmax()
    for i, sample in enumerate(shown, 1):
        gray = view.pixels(f".rescue figure:nth-child({i}) canvas")[..., 0] / 255
        expected = (record.x[sample].reshape(6, 5) - low) / (high - low)
        assert (gray - expected).abs().max() <= 0.51 / 255
        assert view.text(f".rescue figure:nth-child({i})").endswith("weight 0.2")


@needs_browser
@pytest.mark.parametrize("name, size, column", [("images", (6, 5), 4), ("vectors", (1, 10), 16)])
def test_weight_and_targets_are_drawn_around_zero(show, layers, name, size, column):
    (view,) = show(name)
    view.press(FEATURE, "ArrowDown", column)
    record, feature = layers(name).records[0], layers(name).glances[0]["features"][column]
    assert record.winner_target[feature].eq(0).all() == (name == "vectors")  # it wins nothing
    for i, vector in enumerate(VECTORS, 1):
        figure = f".vectors figure:nth-child({i})"
        caption = view.text(figure)
        assert vector in caption
        expected = getattr(record, vector)[feature].reshape(size)
        levels = view.levels(f"{figure} canvas", ".feature .scale canvas")
        step = (expected.max() - expected.min()) / 255
        largest = expected.abs().max()
        if largest == 0:
            assert levels.float().sub(127.5).abs().max() < 1 and "0 everywhere" in caption
            continue
        assert number(caption.rpartition(" ")[2]) == pytest.approx(largest.item(), abs=step.item())
        shown = (levels / 127.5 - 1) * largest
        assert (shown - expected).abs().max() <= 2 * step + largest / 255, vector


@needs_browser
def test_the_curve_holds_the_win_rates_and_marks_the_step(show, layers):
    (view,) = show("images")
    view.press(FEATURE, "ArrowDown", 2)
    view.press(SLIDER, "ArrowRight", 2)
    points = re.findall(r"([\d.]+) ([\d.]+)", view.evaluate("e => e.getAttribute('d')", ".curve path")[0])
    x, y = torch.tensor([[float(part) for part in point] for point in points]).T
    rates = torch.tensor([record.win_rate[2] for record in layers("images").records])
    bottom = view.evaluate("e => +e.getAttribute('y1')", ".curve line")[0]
    shown = (bottom - y) / (bottom - y.min()) * rates.max()
    torch.testing.assert_close(shown, rates, rtol=0, atol=2e-3)
    torch.testing.assert_close(x.diff(), x.diff()[:1].expand(3), rtol=0, atol=0.2)
    circle = view.evaluate("e => [+e.getAttribute('cx'), +e.getAttribute('cy')]", ".curve circle")[0]
    assert circle == pytest.approx([x[2].item(), y[2].item()], abs=0.1)


@needs_browser
def test_it_says_what_is_shown_of_what(show):
    one, two, three = show("vectors", "color", "smallest")
    assert one.text(".shown") == "Shown: 96 of 120 samples, 64 of 100 features, all 3 measured steps."
    assert three.text(".shown") == "Shown: the only sample, all 2 features, the only measured step."
    assert "averaged from 3 \u00d7 36 \u00d7 20 (channels, height, width) to 3 \u00d7 32 \u00d7 18" in two.text(
        ".shown"
    )


@needs_browser
def test_a_smaller_batch_keeps_the_last_sample_there_is(show, layers):
    (view,) = show("images")
    assert "Batches have 7 to 12 samples" in view.text(".shown")
    view.press(SAMPLE, "ArrowDown", 10)
    view.press(SLIDER, "End")
    check_maps(view, layers("images"), 3)
    assert view.text(".sample").startswith("Sample 6:") and len(view.evaluate("e => 1", f"{SAMPLE} option")) == 7
    view.press(SAMPLE, "ArrowUp")
    assert view.text(".sample").startswith("Sample 5:")


@needs_browser
def test_two_layers_do_not_disturb_each_other(show):
    one, two = show("images", "vectors")
    before = two.everything()
    one.press(SLIDER, "End")
    one.press(FEATURE, "ArrowDown", 3)
    one.press(SAME, " ")
    assert two.everything() == before
    before = one.everything()
    two.press(SLIDER, "ArrowRight")
    two.window.click(two.one("[data-name=affinity] .stage"), 0.7, 0.7)
    assert one.everything() == before


@needs_browser
@pytest.mark.parametrize("name", ["smallest", "wide", "color", "channels", "always diverged", "beyond float32"])
def test_layers_of_every_kind_are_shown_to_the_last_step(show, layers, name):
    (view,) = show(name)
    layer = layers(name)
    view.press(SLIDER, "End")
    view.press(FEATURE, "ArrowDown")
    assert f"Feature 1 at step {layer.lines[-1]['step']}" in view.text(".feature")
    if name == "smallest":
        assert view.evaluate("e => e.disabled", SLIDER) == [True]
        assert view.map("rank_score").shape == (1, 2) and len(view.evaluate("e => 1", ".rescue figure")) == 1
    elif name == "wide":
        rows = layer.glances[-1]["rescue_rows"][1].tolist()
        assert [int(text.split()[1][:-1]) for text in view.evaluate("e => e.innerText", ".rescue li")] == rows
        assert "not kept" in view.text(".shown") and view.evaluate("e => 1", ".vectors") == []
    elif name == "beyond float32":
        weight = layer.records[-1].weight[1].reshape(4, 4) / layer.records[-1].weight[1].abs().max()
        levels = view.levels(".vectors figure:nth-child(1) canvas", ".feature .scale canvas")
        assert (levels / 127.5 - 1 - weight).abs().max() < 1 / 60
        assert "It pulls 5 of the 5 features." in view.text(".sample") and layer.records[-1].weight.max() > 1e40
    elif name == "channels":
        image = view.pixels(".rescue figure canvas")
        sample = int(view.evaluate("e => e.dataset.sample", ".rescue figure")[0])
        expected = layer.records[-1].x[sample].reshape(2, 5, 7).mean(dim=0) + 0.3  # from 0 to 1
        assert image.shape == (5, 7, 3) and (image[..., 0] / 255 - expected).abs().max() < 0.02
    elif name == "color":
        image = view.pixels(".rescue figure canvas").permute(2, 0, 1) / 255
        sample = int(view.evaluate("e => e.dataset.sample", ".rescue figure")[0])
        pixels = layer.records[-1].x[sample].reshape(3, 36, 20) + 0.3
        expected = torch.nn.functional.adaptive_avg_pool2d(pixels, (32, 18))
        assert (image - expected).abs().max() < 0.01


@needs_browser
def test_a_step_that_is_not_finite_says_so(show):
    (view,) = show("diverged")
    visible = "e => getComputedStyle(e).display"
    assert view.evaluate(visible, ".warning") == ["none"]
    view.press(SLIDER, "ArrowRight")
    assert view.evaluate(visible, ".warning") == ["block"]
    assert "not finite" in view.text("dd[data-key=win_rate]") and "not finite" in view.text(".metrics")
    assert len(view.evaluate("e => 1", ".curve circle")) == 0


@needs_browser
@pytest.mark.parametrize("width", [400, 1200])
def test_it_fits_the_window_and_keys_reach_every_control(show, width):
    view, _ = show("images", "vectors", width=width)
    assert view.window.evaluate("document.documentElement.scrollWidth <= innerWidth")
    view.focus(SLIDER)
    reached = []
    for _ in range(4):
        reached.append(view.window.evaluate("document.activeElement.type"))
        assert view.window.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        assert view.window.evaluate("document.activeElement.labels[0].innerText.trim().length") > 3
        view.window.press("Tab")
    assert reached == ["range", "select-one", "select-one", "checkbox"]
    assert all(view.evaluate("e => e.getAttribute('aria-label').length > 20", "canvas[role=img]"))


# --- Without a browser ------------------------------------------------------------------------------------------------


def test_no_text_ends_the_script():
    text = page([{"title": "Step inspector", "inspector": {"name": "</script><script>alert(1)//"}}])
    assert text.count("<script") == 2  # the data and our own
    found = re.search(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)[1]
    assert json.loads(found) == {"name": "</script><script>alert(1)//"}


def test_data_are_plain_json(layers):
    """JSON has no NaN."""
    for name in MAKERS:
        data = inspector.inspector_data(layers(name).lines, layers(name).glances)
        assert json.loads(json.dumps(data, allow_nan=False)) == data, name


def noise(tensor):
    """Bytes that cannot be compressed."""
    return torch.randint(0, 256, tensor.shape).to(torch.uint8) if tensor.dtype == torch.uint8 else tensor


@pytest.mark.parametrize("measured", [1, 2, 41, 1000])
def test_at_most_40_steps_are_inspected(layers, measured):
    layer = layers("smallest")
    lines = [{"step": 3 * i} for i in range(measured)]
    data = inspector.inspector_data(lines, layer.glances * measured)
    steps = [step["step"] for step in data["steps"]]
    assert len(steps) == min(measured, 40) and (steps[0], steps[-1]) == (0, 3 * (measured - 1))
    gaps = {b - a for a, b in zip(steps, steps[1:], strict=False)}
    assert not gaps or (min(gaps) > 0 and max(gaps) - min(gaps) <= 3)
    assert data["measured"] == measured and len(data["curve"]["step"]) == min(measured, inspector.CURVE)


def test_a_layer_takes_at_most_its_share_of_the_page(layers, monkeypatch):
    layer = layers("images")
    monkeypatch.setattr(inspector, "BYTES", 60_000)
    lines, glances = [{"step": i} for i in range(100)], [{k: noise(v) for k, v in layer.glances[0].items()}] * 100
    data = inspector.inspector_data(lines, glances)
    size, steps = len(json.dumps(data)), [step["step"] for step in data["steps"]]
    assert 2 < len(steps) < 40 and (steps[0], steps[-1]) == (0, 99)
    assert 40_000 < size <= 60_000
