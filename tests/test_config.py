"""Experiments: what is accepted, what is refused, and how a mistake is told."""

import pytest
import yaml

from harness.cli import main
from harness.config.schema import micro_batch
from harness.errors import UserError
from harness.io.artifacts import canonical
from harness.validation import load_experiment, parse_experiment


def mistakes(raw: dict) -> list[str]:
    with pytest.raises(UserError) as error:
        parse_experiment(raw, "tiny.yaml")
    first, *lines = str(error.value).splitlines()
    count = len(lines)
    assert first == f"tiny.yaml: {'1 mistake' if count == 1 else f'{count} mistakes'}"
    return [line.strip() for line in lines]


def put(raw: dict, path: str, value) -> dict:
    *parents, last = path.split(".")
    for parent in parents:
        raw = raw[parent]
    raw[last] = value
    return raw


CLAIM = {"claim": "SiD wins", "source": "s", "reported": "1 -> 2", "better": "sid", "worse": "sim"}


@pytest.mark.parametrize("name", ["digits", "digits-tune", "digits-claims"])
def test_the_shipped_experiments_are_valid(name):
    load_experiment(f"configs/{name}.yaml")


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("students.sid.method", "sld", "students.sid.method: unknown method 'sld'; did you mean 'sid'?"),
        (
            "students.sid.settings",
            {"alhpa": 1.0},
            "students.sid.settings.alhpa: unknown key; did you mean 'alpha'?",
        ),
        ("students.sid.metod", "sid", "students.sid.metod: unknown key; did you mean 'method'?"),
        ("trainng", {}, "trainng: unknown key; did you mean 'training'?"),
        ("evaluation.num_sample", 5, "evaluation.num_sample: unknown key; did you mean 'num_samples'?"),
        ("training.settings.lrr", 1, "training.settings.lrr: no method has this setting; did you mean 'lr'?"),
        ("training.budget", [{"unit": "images", "amount": -5}],
         "training.budget.0.amount: input should be greater than 0, not -5"),
        ("training.budget", [{"unit": "image", "amount": 5}],
         "training.budget.0.unit: input should be 'images', 'flops' or 'seconds', not 'image'"),
        ("training.seeds", "zero", "training.seeds: input should be a valid list, not 'zero'"),
        ("training.seeds", [1, 1], "training.seeds: a seed stands twice"),
        ("students.sid.settings", {"lr": "fast"},
         "students.sid.settings.lr: input should be a valid number, unable to parse string as a number, not 'fast'"),
        ("students.sid.settings", {"lr": -1.0},
         "students.sid.settings.lr: input should be greater than 0, not -1.0"),
        ("students.dmd.settings", {"regression": "none", "distribution_matching": False},
         "students.dmd.settings.distribution_matching: value error, must be true with regression: none, not False"),
        ("students.sid.freeze", "inate",
         "students.sid.freeze: input should be 'none' or 'innate', not 'inate'"),
        ("students.sid.teacher", "edn",
         "students.sid.teacher: unknown teacher 'edn'; did you mean 'edm'?"),
        ("students.gdd.settings", {"features": "tiny-critc"},
         "students.gdd.settings: feature network 'tiny-critc' is not under features; did you mean 'tiny-critic'?"),
        ("students.gdd.settings", {"features": "tiny-clip"},
         "students.gdd.settings: feature network 'tiny-clip' gives no feature maps"),
        ("evaluation.extractors", ["tiny-cn", "tiny-clip"],
         "evaluation.extractors: 'tiny-cn' is not under features; did you mean 'tiny-cnn'?"),
        ("data.name", "digit", "data.name: unknown data set 'digit' without a source; did you mean 'digits'?"),
        ("teachers.edm.network.type", "UNet2D",
         "teachers.edm.network.type: unknown network 'UNet2D'; did you mean 'UNet2DModel'?"),
        ("teachers.vp", {"source": "none.pkl"}, "teachers.vp.source: none.pkl does not exist"),
        ("teachers.vp", {"source": "https://x.org/a.pkl"},
         "teachers.vp.sha256: missing; a download is checked by its hash"),
        ("teachers.vp", {"source": "README.md", "imagse": 3}, "teachers.vp.imagse: unknown key; known: network, sampler, sha256, source"),
        ("teachers.edm.imagse", 3, "teachers.edm.imagse: unknown key; did you mean 'images'?"),
        ("teachers.edm.images", 1000, "teachers.edm.images: not a multiple of its batch 64"),
        ("evaluation.num_samples", 9,
         "evaluation.num_samples: 9 are too few; with neighbours 3 the metrics need 10 or more"),
        ("evaluation", {"num_samples": 40, "neighbours": 40, "extractors": ["tiny-cnn", "tiny-clip"]},
         "evaluation.num_samples: 40 are too few; with neighbours 40 the metrics need 41 or more"),
        ("evaluation.sampling_seed", 0, "evaluation.sampling_seed: unknown key; did you mean 'sampling_seeds'?"),
        ("evaluation.sampling_seeds", [1, 1], "evaluation.sampling_seeds: a seed stands twice"),
        ("evaluation.snapshot_seeds", 3, "evaluation.snapshot_seeds: 3, but there are 2 sampling_seeds"),
        ("claims", [{**CLAIM, "better": "sld"}], "claims.0.better: unknown student 'sld'; did you mean 'sid'?"),
        ("claims", [{**CLAIM, "worse": "sid"}], "claims.0: 'sid' is both better and worse"),
        ("claims", [{**CLAIM, "metric": "fdd"}], "claims.0.metric: unknown metric 'fdd'; did you mean 'fd'?"),
        ("claims", [{**CLAIM, "metric": "fid-edm"}], "claims.0.metric: no extractor has 'fid-edm'"),
        ("claims", [{**CLAIM, "sorce": "x"}], "claims.0.sorce: unknown key; did you mean 'source'?"),
        ("claims", [{**CLAIM, "metric": "diversity"}],
         "claims.0.metric: 'diversity' is a diagnostic: neither more nor less of it is better"),
        ("evaluation.main_metric", "memorisation",
         "evaluation.main_metric: 'memorisation' is a diagnostic: neither more nor less of it is better"),
        ("evaluation.main_metric", "fdd", "evaluation.main_metric: unknown metric 'fdd'; did you mean 'fd'?"),
        ("features.inception", {"type": "incepton"},
         "features.inception.type: input should be 'cnn', 'resnet', 'clip', 'inception', 'open-clip', 'dinov2' or 'efficientnet-lite', not 'incepton'"),
        ("features.inception", {"type": "inception", "wieghts": "x.pth"},
         "features.inception.wieghts: unknown key; did you mean 'weights'?"),
        ("features.inception", {"type": "inception", "images": 3},
         "features.inception.images: unknown key; known: resize, type, weights"),
        ("features.inception", {"type": "inception", "weights": "none.pth"},
         "features.inception.weights: none.pth does not exist"),
        ("features.inception", 3,
         "features.inception: input should be a valid dictionary or instance of FeatureSection, not 3"),
        ("features.tiny-critic", {"type": "inception"},
         "students.gdd.settings: feature network 'tiny-critic' gives no feature maps"),
        ("evaluation.main_metric", "attribute-accuracy", "evaluation.main_metric: 'attribute-accuracy' needs captions; data has none"),
        ("claims", [{**CLAIM, "metric": "ink-accuracy"}], "claims.0.metric: 'ink-accuracy' needs captions; data has none"),
        ("evaluation.main_metric", "fid-edm",
         "evaluation.main_metric: 'fid-edm' is not for extractors of type clip, cnn; those have accuracy, aesthetic, class-score, clip-score, cmmd, coverage, density, fd, fd-inf, kd, precision, recall"),
        ("evaluation.statistics", "non.npz", "evaluation.statistics: non.npz does not exist"),
        ("evaluation.statistics", "tests", "evaluation.statistics: tests is a folder"),
        ("evaluation.statistics", "https://x.org/x.npz",
         "evaluation.statistics_sha256: missing; a download is checked by its hash"),
        ("evaluation.statistics", "README.md",
         "evaluation.statistics: they are for an extractor of type inception"),
        ("evaluation.statistics_sha256", "0" * 64,
         "evaluation.statistics_sha256: means nothing without statistics"),
        ("training.settings.lr", "fast", "training.settings.lr: input should be a valid number, unable to parse string as a number, not 'fast'"),
        ("training.budget", [{"unit": "flops", "amount": float("inf")}], "training.budget.0.amount: input should be a finite number, not inf"),
        ("device", "gpu", "device: string should match pattern '^(auto|cpu|cuda(:\\d+)?)$', not 'gpu'"),
        ("name", "a/b", "name: a name is lower-case letters, digits, '.', '_' and '-', not 'a/b'"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_key(tiny, path, value, expected):
    put(tiny, path, value)
    assert expected in mistakes(tiny)


def test_a_reserved_name_is_refused(tiny):
    tiny["students"]["teacher"] = {"method": "sid"}
    assert mistakes(tiny) == ["students.teacher: this name is reserved"]


def test_a_batch_that_does_not_divide_the_budget_is_told_with_the_nearest_that_do(tiny):
    put(tiny, "training.budget", [{"unit": "images", "amount": 100}])
    assert any("the nearest are 96 and 112" in line for line in mistakes(tiny))


def test_all_mistakes_are_told_at_once(tiny):
    put(tiny, "training.budget", [{"unit": "images", "amount": -5}])
    put(tiny, "evaluation.extractors", ["tiny-cn", "tiny-clip"])
    put(tiny, "students.sid.settings", {"alhpa": 1})
    put(tiny, "students.sim.method", "simm")
    put(tiny, "teachers.edm.lr", "x")
    del tiny["data"]
    lines = "\n".join(mistakes(tiny))
    for key in ("training.budget.0.amount", "evaluation.extractors", "students.sid.settings.alhpa",
                "students.sim.method", "teachers.edm.lr", "data: missing"):  # fmt: skip
        assert key in lines


def test_no_traceback_for_a_users_mistake(tmp_path, tiny, capsys):
    put(tiny, "students.sid.method", "sld")
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tiny))
    assert main(["train", "sid", "0", "--configfile", str(tmp_path / "x.yaml")]) == 2
    message = capsys.readouterr().err
    assert message.splitlines()[1].startswith("error: ") and "did you mean 'sid'" in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "sidd", "0"], "unknown student 'sidd'; did you mean 'sid'?"),
        (["teacher", "end"], "unknown teacher 'end'; did you mean 'edm'?"),
        (["features", "tiny-cn"], "unknown feature network 'tiny-cn'; did you mean 'tiny-cnn'?"),
        (["pairs", "x"], "unknown pair set 'x'; known: edm_n64_steps3"),
        (["train", "sid", "0"], "data.json is missing; run the workflow"),
        (["score", "sid", "0"], "student.json is missing; run the workflow"),
        (["report"], "edm.json is missing or belongs to other weights or settings; run the"),
    ],
)
def test_a_stage_called_by_hand_too_early_or_by_a_wrong_name(
    tmp_path, monkeypatch, tiny, capsys, arguments, message
):
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tiny))
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--configfile", "x.yaml"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "not valid YAML"),
        ("- a\n- b\n", "holds keys and values"),
        ("name: a\nname: b\n", "line 2: key 'name' stands twice"),
        ("extends: x.yaml\n", "leads back to the file itself"),
        ("extends: other.yaml\n", "no such experiment file"),
        ("extends: [a.yaml]\n", "names one file"),
    ],
)
def test_a_broken_file_is_one_clear_line(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_experiment(tmp_path / "x.yaml")
    assert str(tmp_path) in str(error.value)


def test_extends_merges_and_null_removes(tmp_path, tiny):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(tiny))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.yaml").write_text(
        "extends: ../base.yaml\nname: x\ntraining: {seeds: [7]}\nstudents: {sid: null}\n"
    )
    experiment = load_experiment(tmp_path / "sub" / "x.yaml")
    assert experiment.name == "x"
    assert experiment.training.seeds == [7]
    assert "sid" not in experiment.students and "sim" in experiment.students
    assert experiment.training.budget[0].amount == 160


def test_a_students_own_setting_wins_over_the_shared_one(tiny):
    tiny["training"]["settings"]["lr"] = 3e-4
    tiny["students"]["sid"]["settings"] = {"lr": 5e-4}
    experiment = parse_experiment(tiny, "x")
    assert experiment.method_config("sid").lr == 5e-4
    assert experiment.method_config("sim").lr == 3e-4


def test_a_pretrained_network_stands_beside_trained_ones(tiny):
    before = parse_experiment(tiny, "x")
    assert "reference" not in before.evaluation_spec()  # scores that are older than the key stay
    tiny["features"]["inception"] = {"type": "inception"}
    tiny["evaluation"] |= {"extractors": ["inception", "tiny-cnn"], "main_metric": "fid-edm"}
    experiment = parse_experiment(tiny, "x")
    assert experiment.features["inception"].weights is None
    assert experiment.features["tiny-cnn"].width == 8
    # A key that came later is left out where it keeps its default: finished scores outlive it.
    assert "resize" not in experiment.features_spec("inception")["features"]
    # Named as a local file it is fetched, and what it sees scored, again.
    tiny["features"]["inception"]["weights"] = "README.md"
    local = parse_experiment(tiny, "x")
    assert canonical(local.score_spec()) != canonical(experiment.score_spec())
    assert canonical(local.run_spec("sid", 0)) == canonical(before.run_spec("sid", 0))


def test_specs_hold_what_matters_and_nothing_else(tiny):
    """Evaluation and the budget are no part of what decides a run's weights."""
    before = parse_experiment(tiny, "x")
    tiny["evaluation"]["num_samples"] = 500
    tiny["training"]["budget"] = [{"unit": "images", "amount": 320}]
    tiny["students"]["sid"]["settings"] = {"alpha": 1.0}
    after = parse_experiment(tiny, "x")
    assert canonical(before.run_spec("sim", 0)) == canonical(after.run_spec("sim", 0))
    assert canonical(before.run_spec("sid", 0)) != canonical(after.run_spec("sid", 0))
    assert canonical(before.score_spec()) != canonical(after.score_spec())


def test_a_micro_batch_is_the_largest_that_divides_the_batch(tiny):
    assert [micro_batch(336, n) for n in (None, 1, 32, 336, 400)] == [336, 1, 28, 336, 336]
    tiny["training"]["micro_batch"] = 5
    parse_experiment(tiny, "x")  # batches of 16: four at a time
    tiny["training"]["settings"]["batch"] = 17
    tiny["training"]["budget"] = [{"unit": "images", "amount": 170}]
    assert mistakes(tiny)[0] == (
        "students.dmd: batch 17 has no divisor above 1 up to training.micro_batch 5"
    )


def test_every_default_says_where_it_comes_from():
    from harness.method import get_method, method_names

    for name in method_names():
        for key, field in get_method(name).Config.model_fields.items():
            assert field.json_schema_extra["origin"] in ("paper", "code", "ours"), (name, key)
            assert field.description, (name, key)


def test_a_claim_goes_by_the_resize_of_an_inception(tiny):
    tiny["features"]["inception"] = {"type": "inception", "resize": "clean"}
    tiny["evaluation"]["extractors"] = ["tiny-cnn", "inception"]
    tiny["claims"] = [CLAIM | {"metric": "fid-clean"}]
    parse_experiment(tiny, "x")
    tiny["claims"][0]["metric"] = "fid-edm"
    assert mistakes(tiny) == ["claims.0.metric: no extractor has 'fid-edm'"]


def test_a_data_free_experiment_needs_no_images(tmp_path):
    """A teacher from elsewhere and the reference's statistics are enough."""
    raw = {
        "name": "free",
        "data": {"name": "x", "image_shape": [3, 16, 16]},
        "features": {"inception": {"type": "inception"}},
        "teachers": {"edm": {"source": str(tmp_path / "x.npz")}},
        "students": {"sid": {"method": "sid"}},
        "training": {"seeds": [0], "budget": [{"unit": "images", "amount": 256}]},
        "evaluation": {
            "extractors": ["inception"],
            "statistics": str(tmp_path / "x.npz"),
            "main_metric": "fid-edm",
        },
    }
    (tmp_path / "x.npz").touch()
    parse_experiment(raw, "free")
    raw["students"]["gdd"] = {"method": "gdd"}
    assert mistakes(raw) == ["students.gdd: method gdd needs images; data has none"]
    del raw["students"]["gdd"], raw["evaluation"]["statistics"]
    assert mistakes(raw) == ["evaluation.statistics: missing; data has no images to compare with"]
