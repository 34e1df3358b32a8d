"""Figures: styles that are the same everywhere, headings that can be read, no charts of a point."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import yaml

from harness.reporting.figures import costs, health, quality, samples
from harness.reporting.figures.styles import HUES, METHODS, styles
from harness.reporting.formatting import latex, markdown, write_table
from tests.conftest import ROOT
from tests.reports import kept_samples, tidy_table, write_run
from tests.test_page import STUDENTS, make_experiment

# Without the sweep, whose 40 students are more than there are styles.
SHIPPED = {*ROOT.glob("configs/*.yaml"), *ROOT.glob("configs/paper/*.yaml")}
SHIPPED -= {ROOT / "configs/digits-tune.yaml"}


@cache
def students_of(path) -> dict[str, str]:
    """The students of a configuration and its bases, with their methods."""
    config = yaml.load(path.read_text(), yaml.CSafeLoader)
    base = students_of(path.parent / config["extends"]) if "extends" in config else {}
    own = config.get("students") or {}
    methods = {name: (s or {}).get("method") or base.get(name) for name, s in own.items()}
    return base | methods


def test_a_students_style_is_the_same_in_every_experiment():
    found = {}
    for path in SHIPPED:
        experiment = {name: method for name, method in students_of(path).items() if method}
        for name, style in styles(experiment).items():
            assert found.setdefault(name, style) == style, (path, name)
    assert {"dmd", "dmd-noreg", "gdd-i", "sid-alpha1.2", "sim-squared", "regression"} <= set(found)
    assert len(set(found.values())) == len(found) > 8


def test_common_ablations_differ_in_shape_from_plain_methods():
    names = {"dmd-noreg": "dmd", "gdd-i": "gdd", "sid-alpha1.2": "sid"}
    found = styles(names | {name: name for name in METHODS})
    assert len({style.shape for style in found.values()}) == len(found) == 8


def test_variants_have_the_hue_of_their_method():
    found = styles({"dmd": "dmd", "dmd-x": "dmd", "mine": "dmd", "sid": "sid"})
    assert {found[name].colour for name in ("dmd", "dmd-x", "mine")} <= set(HUES["blue"])
    assert found["sid"].colour == HUES["vermillion"][0]
    many = styles({f"dmd-{i}": "dmd" for i in range(14)} | {"dmd": "dmd"})
    assert len(set(many.values())) == 15
    assert len({(style.colour, style.shape) for style in many.values()}) == 15


def test_unknown_methods_have_stable_hues_of_their_own():
    one = styles({"diff-instruct": "diff_instruct"})
    both = styles({"a": "zz_method", "diff-instruct": "diff_instruct", "dmd": "dmd"})
    assert one["diff-instruct"] == both["diff-instruct"]
    own = {HUES[hue] for hue, _ in METHODS.values()}
    assert not any(both["diff-instruct"].colour in hues for hues in own)
    assert len({style.colour for style in both.values()}) == 3


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@pytest.mark.parametrize("background", ["#ffffff", "#14171a"])
def test_colours_are_visible_on_light_and_dark_pages(background):
    for colour in [tone for tones in HUES.values() for tone in tones]:
        low, high = sorted((luminance(colour), luminance(background)))
        assert (high + 0.05) / (low + 0.05) >= 3, colour


def test_methods_differ_for_colour_blind_readers():
    """Colours as a reader with deuteranopia sees them (Machado et al. 2009), or else shapes."""
    matrix = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])

    def seen(hue: str) -> np.ndarray:
        colour = HUES[hue][0]
        return matrix @ [(int(colour[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5)]

    for (a, shape_a), (b, shape_b) in combinations(METHODS.values(), 2):
        assert shape_a != shape_b and np.abs(seen(a) - seen(b)).max() > 0.05, (a, b)


# -- conditions ---------------------------------------------------------------------------------


def grid_of(experiment, kind, names, monkeypatch):
    monkeypatch.setattr(samples, "condition_names", lambda _: (kind, names))
    return samples.select_samples(experiment, kept_samples(["teacher", "s1"]))


def test_classes_are_headings_and_long_texts_are_numbered(tmp_path, monkeypatch):
    experiment = make_experiment(tmp_path)
    names = ("airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    grid = grid_of(experiment, "class", names, monkeypatch)
    assert grid.headings == list(names) and grid.width == 2 and not grid.is_numbered
    assert grid.images["s1"].shape[0] == 20
    grid = grid_of(experiment, "class", ("a very long name of a class", *names[1:]), monkeypatch)
    assert grid.headings == [str(i) for i in range(1, 11)] and grid.is_numbered
    prompts = tuple(f"a picture of number {i}, to be read in full" for i in range(10))
    grid = grid_of(experiment, "prompt", prompts, monkeypatch)
    assert grid.headings[-1] == "10" and grid.conditions == list(prompts)
    figure = samples.sample_grid(experiment, kept_samples(["teacher", "s1"]))
    text = figure.axes[0].get_xlabel().replace("\n     ", " ")
    assert all(prompt in text for prompt in prompts)


# -- charts -------------------------------------------------------------------------------------


def test_charts_of_one_point_are_left_out(tmp_path):
    experiment = make_experiment(tmp_path)
    once = tidy_table(experiment, {("fd", "tiny-cnn"): STUDENTS})
    assert quality.drawn_metrics(experiment, once, "images") == []
    for figure in (quality.figure(experiment, once, "images"), costs.figure(experiment, once)):
        assert "several snapshots" in str(figure.to_dict())
    one_seed = once[once.seed == 0]
    assert quality.final_chart(experiment, one_seed, "tiny-cnn") is None
    write_run(experiment, "s1", 0)
    assert "loss of s1" in str(health.figure(experiment, one_seed).to_dict())
    log = experiment.paths.run("s1", 0) / "train.csv"
    pd.read_csv(log).head(1).to_csv(log, index=False)
    assert "more than one point" in str(health.figure(experiment, one_seed).to_dict())


def test_rows_of_training_health_are_aligned(tmp_path):
    experiment = make_experiment(tmp_path)
    table = tidy_table(experiment, {("fd", "tiny-cnn"): STUDENTS})
    for student in STUDENTS:
        write_run(experiment, student, 0)
    figure = health.figure(experiment, table).to_dict()
    assert figure["align"] == "all" and figure["columns"] == 3 and len(figure["concat"]) == 6
    log = experiment.paths.run("s1", 0) / "train.csv"
    pd.read_csv(log).assign(**{"nonfinite/generator": [0, 1, 1]}).to_csv(log, index=False)
    assert len(health.figure(experiment, table).to_dict()["concat"]) == 9


# -- texts --------------------------------------------------------------------------------------


def test_bars_and_newlines_do_not_end_cells(tmp_path):
    table = pd.DataFrame({"claim": ["KL(q||p) beats\nKL(p||q)"], "a|b": ["x"]})
    for text in (
        markdown(table),
        write_table(table, tmp_path, "claims", "t", "c", table)[1].read_text().split("\n\n")[1],
    ):
        lines = text.strip().splitlines()
        assert len(lines) == 3 and r"KL(q\|\|p) beats KL(p\|\|q)" in lines[2]
        assert {line.replace(r"\|", "").count("|") for line in lines} == {3}
    assert r"a\|b" in markdown(table)
    assert "||" in markdown(table, tablefmt="simple")  # in the terminal


def test_latex_escapes_special_characters():
    table = pd.DataFrame({"a_b & c": ["50 % ≤ 3 −1 #1"]})
    text = latex(table, "t", "l")
    assert r"a\_b \& c" in text and r"50 \% $\leq$ 3 $-$1 \#1" in text and text.isascii()
