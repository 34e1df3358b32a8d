"""Experiment files: what is accepted, what is rejected, and how errors are reported."""

import pytest
import torch
import yaml

from harness.cli import main
from harness.config.loading import read_yaml
from harness.config.schema import micro_batch
from harness.errors import ConfigError, Problem, UserError
from harness.io.artifacts import canonical
from harness.networks import build_denoiser
from harness.validation import load_experiment, load_snapshot, parse_experiment


def problems(raw: dict) -> list[Problem]:
    with pytest.raises(ConfigError) as error:
        parse_experiment(raw, "tiny.yaml")
    return list(error.value.problems)


def mistakes(raw: dict) -> list[str]:
    return [str(problem) for problem in problems(raw)]


def keys(raw: dict) -> list[str]:
    return [problem.key for problem in problems(raw)]


def put(raw: dict, path: str, value) -> dict:
    *parents, last = path.split(".")
    for parent in parents:
        raw = raw[parent]
    raw[last] = value
    return raw


CLAIM = {"claim": "SiD wins", "source": "s", "reported": "1 -> 2", "better": "sid", "worse": "sim"}


@pytest.mark.parametrize("name", ["digits", "digits-tune", "digits-claims"])
def test_shipped_experiment_is_valid(name):
    load_experiment(f"configs/{name}.yaml")


@pytest.mark.parametrize(
    ("path", "value", "key"),
    [
        ("students.sid.method", "sld", "students.sid.method"),
        ("students.sid.settings", {"alhpa": 1.0}, "students.sid.settings.alhpa"),
        ("students.sid.metod", "sid", "students.sid.metod"),
        ("trainng", {}, "trainng"),
        ("evaluation.num_sample", 5, "evaluation.num_sample"),
        ("training.settings.lrr", 1, "training.settings.lrr"),
        ("training.budget", [{"unit": "images", "amount": -5}], "training.budget.0.amount"),
        ("training.budget", [{"unit": "image", "amount": 5}], "training.budget.0.unit"),
        ("training.budget", [{"unit": "flops", "amount": float("inf")}], "training.budget.0.amount"),
        ("training.seeds", "zero", "training.seeds"),
        ("training.seeds", [1, 1], "training.seeds"),
        ("training.settings.lr", "fast", "training.settings.lr"),
        ("students.sid.settings", {"lr": "fast"}, "students.sid.settings.lr"),
        ("students.sid.settings", {"lr": -1.0}, "students.sid.settings.lr"),
        ("students.dmd.settings", {"regression": "none", "distribution_matching": False},
         "students.dmd.settings.distribution_matching"),
        ("students.sid.freeze", "inate", "students.sid.freeze"),
        ("students.sid.teacher", "edn", "students.sid.teacher"),
        ("students.gdd.settings", {"discriminator": "features", "features": "tiny-critc"}, "students.gdd.settings"),
        ("students.gdd.settings", {"discriminator": "features", "features": "tiny-clip"}, "students.gdd.settings"),
        ("features.tiny-critic", {"type": "inception"}, "students.gdd.settings"),
        ("data.name", "digit", "data.name"),
        ("teachers.edm.network.type", "UNet2D", "teachers.edm.network.type"),
        ("teachers.vp", {"source": "none.pkl"}, "teachers.vp.source"),
        ("teachers.vp", {"source": "https://x.org/a.pkl"}, "teachers.vp.sha256"),
        ("teachers.vp", {"source": "README.md", "imagse": 3}, "teachers.vp.imagse"),
        ("teachers.edm.imagse", 3, "teachers.edm.imagse"),
        ("teachers.edm.images", 1000, "teachers.edm.images"),
        ("evaluation.extractors", ["tiny-cn", "tiny-clip"], "evaluation.extractors"),
        ("evaluation.num_samples", 9, "evaluation.num_samples"),
        ("evaluation", {"num_samples": 40, "neighbours": 40, "extractors": ["tiny-cnn", "tiny-clip"]},
         "evaluation.num_samples"),
        ("evaluation.sampling_seed", 0, "evaluation.sampling_seed"),
        ("evaluation.sampling_seeds", [1, 1], "evaluation.sampling_seeds"),
        ("evaluation.snapshot_seeds", 3, "evaluation.snapshot_seeds"),
        ("evaluation.main_metric", "memorisation", "evaluation.main_metric"),
        ("evaluation.main_metric", "fdd", "evaluation.main_metric"),
        ("evaluation.main_metric", "attribute-accuracy", "evaluation.main_metric"),
        ("evaluation.main_metric", "fid-edm", "evaluation.main_metric"),
        ("evaluation.statistics", "non.npz", "evaluation.statistics"),
        ("evaluation.statistics", "tests", "evaluation.statistics"),
        ("evaluation.statistics", "https://x.org/x.npz", "evaluation.statistics_sha256"),
        ("evaluation.statistics", "README.md", "evaluation.statistics"),
        ("evaluation.statistics_sha256", "0" * 64, "evaluation.statistics_sha256"),
        ("claims", [{**CLAIM, "better": "sld"}], "claims.0.better"),
        ("claims", [{**CLAIM, "worse": "sid"}], "claims.0"),
        ("claims", [{**CLAIM, "metric": "fdd"}], "claims.0.metric"),
        ("claims", [{**CLAIM, "metric": "fid-edm"}], "claims.0.metric"),
        ("claims", [{**CLAIM, "metric": "diversity"}], "claims.0.metric"),
        ("claims", [{**CLAIM, "metric": "ink-accuracy"}], "claims.0.metric"),
        ("claims", [{**CLAIM, "sorce": "x"}], "claims.0.sorce"),
        ("features.inception", {"type": "incepton"}, "features.inception.type"),
        ("features.inception", {"type": "inception", "wieghts": "x.pth"}, "features.inception.wieghts"),
        ("features.inception", {"type": "inception", "images": 3}, "features.inception.images"),
        ("features.inception", {"type": "inception", "weights": "none.pth"}, "features.inception.weights"),
        ("features.inception", 3, "features.inception"),
        ("device", "gpu", "device"),
        ("students.sid.settings", {"betas": [0.9, 1.0]}, "students.sid.settings.betas"),
        ("students.sid.settings", {"generator_betas": [-0.1, 0.9]}, "students.sid.settings.generator_betas"),
        ("training.settings.betas", [0.9, 1.0], "training.settings.betas"),
        ("students.dmd.settings.t_min", 0.99, "students.dmd.settings"),
        ("students.gdd.settings.backbones", ["vgg16_bn", "vgg16_bn"], "students.gdd.settings.backbones"),
        ("teachers.edm.betas", [0.9, 1.0], "teachers.edm.betas.1"),
        ("teachers.edm.sampler", {"sigma_min": 80.0, "sigma_max": 80.0}, "teachers.edm.sampler"),
        ("teachers.edm.sampler", {"s_min": 2.0, "s_max": 1.0}, "teachers.edm.sampler"),
        ("teachers.edm.lr", float("nan"), "teachers.edm.lr"),
        ("teachers.edm.p_mean", float("-inf"), "teachers.edm.p_mean"),
        ("teachers.edm.network.norm_eps", float("inf"), "teachers.edm.network.norm_eps"),
        ("teachers.edm.images", 2**63, "teachers.edm.images"),
        ("training.seeds", [2**63], "training.seeds.0"),
        ("training.budget", [{"unit": "images", "amount": 0}], "training.budget.0.amount"),
        ("training.budget", [{"unit": "images", "amount": a} for a in (16, 32)], "training.budget"),
        ("training.loggers", ["csv", "csv"], "training.loggers"),
        ("evaluation.extractors", ["tiny-cnn", "tiny-clip", "tiny-cnn"], "evaluation.extractors"),
        ("students", {1: {"method": "sid"}}, "students.1"),
        ("students", {False: {"method": "sid"}}, "students.False"),
        ("students", {(1, 2): {"method": "sid"}}, "students.(1, 2)"),
        ("data.source", "~nosuchuser/x", "data.source"),
        ("data.prompts", "~nosuchuser", "data.prompts"),
        ("plugins", ["~nosuchuser/x.py"], "plugins.0"),
        ("teachers.vp", {"source": "~nosuchuser/x.pkl"}, "teachers.vp.source"),
        ("features.inception", {"type": "inception", "weights": "~nosuchuser/x"}, "features.inception.weights"),
        ("evaluation.statistics", "~nosuchuser/x.npz", "evaluation.statistics"),
        ("students.gdd.settings.class_table", "~nosuchuser/x", "students.gdd.settings.class_table"),
        ("teachers.edm.network.x", {1, 2}, "teachers.edm.network.x"),
        ("teachers.edm.network.x", b"x", "teachers.edm.network.x"),
        ("name", "a/b", "name"),
    ],
)  # fmt: skip
def test_error_names_the_key(tiny, path, value, key):
    put(tiny, path, value)
    assert key in keys(tiny)


@pytest.mark.parametrize(
    ("path", "value", "code", "suggestion"),
    [
        ("students.sid.method", "sld", "unknown-name", "sid"),
        ("students.sid.settings", {"alhpa": 1.0}, "unknown-key", "alpha"),
        ("trainng", {}, "unknown-key", "training"),
        ("evaluation.num_sample", 5, "unknown-key", "num_samples"),
        ("training.settings.lrr", 1, "unknown-key", "lr"),
        ("students.sid.teacher", "edn", "unknown-name", "edm"),
        ("features.inception", {"type": "inception", "wieghts": "x"}, "unknown-key", "weights"),
        ("teachers.edm.sampler", {"stps": 3}, "unknown-key", "steps"),
        ("training.snapshots", {"images": {"frst": 3}}, "unknown-key", "first"),
    ],
)
def test_misspelled_name_gets_a_suggestion(tiny, path, value, code, suggestion):
    put(tiny, path, value)
    problem = next(p for p in problems(tiny) if "did you mean" in p.message)
    assert problem.code == code
    assert f"did you mean {suggestion!r}?" in problem.message


def test_message_of_all_problems(tiny):
    tiny["students"]["teacher"] = {"method": "sid"}
    put(tiny, "training.budget", [{"unit": "images", "amount": -5}])
    with pytest.raises(ConfigError) as error:
        parse_experiment(tiny, "tiny.yaml")
    assert str(error.value) == (
        "tiny.yaml: 2 errors\n"
        "  training.budget.0.amount: must be greater than 0, not -5\n"
        "  students.teacher: this name is reserved"
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("training.seeds", 3, "expected a list, such as [0, 1], not 3"),
        ("training.seeds", [], "must not be empty"),
        ("training.seeds", [0.5], "expected an integer, not 0.5"),
        ("training.tf32", "maybe", "expected true or false, not 'maybe'"),
        ("training.precision", "fp8", "must be 'fp32' or 'bf16', not 'fp8'"),
        (
            "training.budget",
            {"unit": "images"},
            "expected a list, such as [0, 1], not {'unit': 'images'}",
        ),
        ("teachers.edm.lr", "1e", "expected a number, not '1e'"),
        ("data", 3, "expected keys and values, not 3"),
        ("device", "gpu", "expected auto, cpu, cuda, or one GPU such as cuda:1, not 'gpu'"),
        ("data.sha256", "ab", "expected 64 hexadecimal digits (a sha256), not 'ab'"),
        ("teachers.edm.images", 100, "must be a multiple of the batch, 64, such as 64 or 128"),
    ],
)
def test_messages_are_in_the_terms_of_yaml(tiny, key, value, message):
    put(tiny, key, value)
    found = [problem.message for problem in problems(tiny) if problem.key.startswith(key)]
    assert found == [message]


def test_a_missing_base_is_named_with_its_key(tmp_path):
    (tmp_path / "x.yaml").write_text("extends: photos.yaml")
    with pytest.raises(UserError) as error:
        load_experiment(tmp_path / "x.yaml")
    assert str(error.value) == f"{tmp_path}/x.yaml: extends: {tmp_path}/photos.yaml does not exist"


def test_tabs_in_yaml_have_a_hint(tmp_path):
    (tmp_path / "x.yaml").write_text("data:\n\tname: digits")
    with pytest.raises(UserError, match=r"line 2, column 1: name: digits \^; indent with spaces$"):
        read_yaml(tmp_path / "x.yaml")


def test_nearest_multiples_of_the_batch_are_suggested(tiny):
    put(tiny, "training.budget", [{"unit": "images", "amount": 100}])
    assert any("96 and 112" in problem.message for problem in problems(tiny))


def test_all_errors_are_reported_together(tiny):
    put(tiny, "training.budget", [{"unit": "images", "amount": -5}])
    put(tiny, "evaluation.extractors", ["tiny-cn", "tiny-clip"])
    put(tiny, "students.sim.method", "simm")
    put(tiny, "students.sid.settings", {"alhpa": 1})
    put(tiny, "teachers.edm.lr", "x")
    del tiny["data"]
    expected = {
        "training.budget.0.amount",
        "evaluation.extractors",
        "students.sid.settings.alhpa",
        "students.sim.method",
        "teachers.edm.lr",
        "data",
    }
    assert expected <= set(keys(tiny))


def test_user_error_has_no_traceback(tmp_path, tiny, capsys):
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
        (["features", "tiny-cn"], "'tiny-cn'; did you mean 'tiny-cnn'?"),
        (["pairs", "x"], "'x'; known: edm_n64_steps3"),
        (["train", "sid", "0"], "data.json does not exist; run the workflow"),
        (["score", "sid", "0"], "student.json does not exist; run the workflow"),
        (["report"], "edm.json is missing or belongs to other weights or settings; run the"),
    ],
)
def test_stage_rejects_wrong_names_and_missing_inputs(
    tmp_path, monkeypatch, tiny, capsys, arguments, message
):
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tiny))
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--configfile", "x.yaml"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("name: [", "invalid-yaml"),
        ("- a\n- b\n", "invalid-yaml"),
        ("name: a\nname: b\n", "duplicate-key"),
        ("extends: x.yaml\n", "circular-extends"),
        ("extends: other.yaml\n", "missing-file"),
        ("extends: [a.yaml]\n", "invalid-value"),
    ],
)
def test_unreadable_file_is_one_clear_error(tmp_path, text, code):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        load_experiment(tmp_path / "x.yaml")
    assert error.value.code == code
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "line", "hint"),
    [
        ("students:\n  1: {method: sid}", 2, "'1' in quotes"),
        ("no: 1", 1, "'no' in quotes"),
        ("a: 1\non: {b: 1}", 2, "'on' in quotes"),
        ("8: 1", 1, "'8' in quotes"),
        ("~: 1", 1, "'~' in quotes"),
        ("? [a, b]\n: 1", 1, "not a list"),
        ("? {a: 1}\n: 1", 1, "not a list"),
    ],
)
def test_key_that_is_no_text_is_rejected_with_its_line(tmp_path, text, line, hint):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=f"line {line}: .*{hint}") as error:
        read_yaml(tmp_path / "x.yaml")
    assert error.value.code == "invalid-name" and "\n" not in str(error.value)


def test_numbers_are_read_as_in_yaml_1_2(tmp_path):
    text = "[1e-6, 1E6, 2e+3, 1.5e3, 1.e2, .5, -3.0e-4, 12, -7, 0x1F, 1_000, 0, 010, 1:30, 2024-01-01, "
    (tmp_path / "x.yaml").write_text("a: " + text + "1e, e5, '1e-6', true, null]")
    values = read_yaml(tmp_path / "x.yaml")["a"]
    numbers = [1e-6, 1e6, 2000.0, 1500.0, 100.0, 0.5, -3e-4, 12, -7, 31, 1000, 0]
    texts = ["010", "1:30", "2024-01-01", "1e", "e5", "1e-6"]
    assert values == [*numbers, *texts, True, None]
    assert [type(value) for value in values[:12]] == [type(number) for number in numbers]


def test_exponents_reach_a_network_as_numbers(tmp_path, tiny):
    text = yaml.safe_dump(tiny).replace(
        "norm_num_groups: 4", "norm_num_groups: 4\n      norm_eps: 1e-6"
    )
    (tmp_path / "x.yaml").write_text(text)
    network = load_experiment(tmp_path / "x.yaml").teachers["edm"].network
    assert network["norm_eps"] == 1e-6
    denoiser = build_denoiser(network, (1, 8, 8), 10)
    x = denoiser(torch.zeros(1, 1, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.long))
    assert x.shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    "change", [{"norm_num_groups": 0}, {"block_out_channels": []}, {"down_block_types": ["x"]}]
)
def test_network_that_cannot_be_built_is_one_line(tiny, change):
    network = tiny["teachers"]["edm"]["network"] | change
    with pytest.raises(UserError, match="network of type UNet2DModel: ") as error:
        build_denoiser(network, (1, 8, 8), 10)
    assert error.value.code == "network"


def test_text_that_is_read_as_a_number_gets_a_hint(tiny):
    put(tiny, "students.sid.method", 1)
    (problem,) = (p for p in problems(tiny) if p.key == "students.sid.method")
    assert problem.message == ("expected text, not 1; put text in quotes that YAML reads otherwise")


@pytest.mark.parametrize(
    "text",
    [
        *("a: &x [*x]", "&x\na: *x", "a: !!int x", "a: !!bool x", "a: !!timestamp x"),
        *("a: " + 5000 * "9", "a: " + 3000 * "["),
    ],
)
def test_unusual_yaml_is_one_line(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        load_experiment(tmp_path / "x.yaml")
    assert error.value.code in ("invalid-yaml", "config")


def test_home_folders_are_found(tmp_path, monkeypatch, tiny, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(tiny))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/x.yaml").write_text("extends: ~/base.yaml\nplugins: [~/plugin.py]\n")
    (tmp_path / "plugin.py").write_text("x = 1")
    assert main(["status", "--configfile", "~/sub/x.yaml"]) == 0
    with pytest.raises(SystemExit):
        main(["status", "--configfile", "~nosuchuser/x.yaml"])
    assert (
        "argument --configfile: ~nosuchuser/x.yaml: there is no user 'nosuchuser'"
        in capsys.readouterr().err
    )


def test_missing_file_says_where_it_was_looked_for(tmp_path, monkeypatch, capsys):
    """As after a command in another folder, without --configfile."""
    monkeypatch.chdir(tmp_path)
    assert main(["status"]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last == (
        f"error: configs/digits.yaml: experiment file not found in {tmp_path}; name one with "
        "--configfile, or change to the folder of the project"
    )
    assert main(["status", "--configfile", str(tmp_path)]) == 2
    assert f"{tmp_path}: is a folder, not an experiment file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "precision", "message"),
    [
        ("cuda:1", "fp32", None),
        ("cuda:2", "fp32", "device: cuda:2 is not available; this machine has 2 GPUs, from cuda:0"),
        ("cuda:0", "bf16", "training.precision: V100 does not compute in bf16; use fp32"),
        ("cuda:1", "bf16", None),
    ],
)
def test_machine_lacks_a_gpu_or_its_precision(tiny, monkeypatch, device, precision, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(7, 0), (8, 0)][index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "V100")
    tiny["device"], tiny["training"]["precision"] = device, precision
    experiment = parse_experiment(tiny, "x")
    if message is None:
        return experiment.check_device()
    with pytest.raises(UserError) as error:
        experiment.check_device()
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("name: café".encode("latin-1"), "at byte 9"),
        ("name: a".encode("utf-16"), "at byte 0"),
        ("name: a\n".encode("utf-16-le"), "a null character in line 1"),
        (b"name: a\n\xef\xbb\xbfdata: b\n", "a byte-order mark in line 2"),
    ],
)
def test_file_in_another_encoding_is_rejected(tmp_path, content, reason):
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(UserError, match=reason) as error:
        load_experiment(tmp_path / "x.yaml")
    assert error.value.code == "encoding" and str(tmp_path / "x.yaml") in str(error.value)


@pytest.mark.parametrize("name", ["x.yaml", "x.json"])
def test_byte_order_mark_of_a_file_is_ignored(tmp_path, name):
    (tmp_path / name).write_bytes(b'\xef\xbb\xbf{"name": "caf\xc3\xa9"}\r\n')
    assert read_yaml(tmp_path / name) == {"name": "café"}


def test_extends_merges_and_null_removes_a_key(tmp_path, tiny):
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


def test_own_setting_overrides_the_shared_one(tiny):
    tiny["training"]["settings"]["lr"] = 3e-4
    tiny["students"]["sid"]["settings"] = {"lr": 5e-4}
    students = parse_experiment(tiny, "x").students
    assert students["sid"].settings.lr == 5e-4
    assert students["sim"].settings.lr == 3e-4


def test_experiment_is_frozen(tiny):
    experiment = parse_experiment(tiny, "x")
    with pytest.raises(AttributeError):
        experiment.training = None


def test_snapshot_gives_the_same_experiment(tiny, tmp_path):
    experiment = parse_experiment(tiny, "x", tmp_path)
    again = load_snapshot(experiment.write_snapshot(), tmp_path)
    for student, seed in experiment.runs:
        one, other = (e.student_run(student, seed) for e in (experiment, again))
        assert one == other


def test_pretrained_network_changes_scores_and_no_run(tiny):
    before = parse_experiment(tiny, "x")
    tiny["features"]["inception"] = {"type": "inception"}
    tiny["evaluation"] |= {"extractors": ["inception", "tiny-cnn"], "main_metric": "fid-edm"}
    pretrained = parse_experiment(tiny, "x")
    assert pretrained.features["inception"].weights is None
    assert pretrained.features["tiny-cnn"].width == 8
    tiny["features"]["inception"]["weights"] = "README.md"
    local = parse_experiment(tiny, "x")
    fingerprints = [canonical(e.scoring().fingerprint) for e in (before, pretrained, local)]
    assert len(set(fingerprints)) == 3
    runs = [canonical(e.run_fingerprint("sid", 0)) for e in (before, pretrained, local)]
    assert len(set(runs)) == 1


def test_fingerprint_of_a_run_ignores_evaluation_and_budget(tiny):
    before = parse_experiment(tiny, "x")
    tiny["evaluation"]["num_samples"] = 500
    tiny["training"]["budget"] = [{"unit": "images", "amount": 320}]
    tiny["students"]["sid"]["settings"] = {"alpha": 1.0}
    after = parse_experiment(tiny, "x")
    assert before.run_fingerprint("sim", 0) == after.run_fingerprint("sim", 0)
    assert before.run_fingerprint("sid", 0) != after.run_fingerprint("sid", 0)
    assert before.scoring().fingerprint != after.scoring().fingerprint


def test_micro_batch_is_the_largest_divisor_up_to_the_limit(tiny):
    assert [micro_batch(336, n) for n in (None, 1, 32, 336, 400)] == [336, 1, 28, 336, 336]
    tiny["training"]["micro_batch"] = 5
    parse_experiment(tiny, "x")  # batches of 16: four at a time
    tiny["training"]["settings"]["batch"] = 17
    tiny["training"]["budget"] = [{"unit": "images", "amount": 170}]
    assert ("students.dmd", "batch") in [(p.key, p.code) for p in problems(tiny)]


def test_every_default_has_a_source():
    from harness.method import METHODS

    for name in METHODS:
        for key, field in METHODS[name].Config.model_fields.items():
            assert field.json_schema_extra["origin"] in ("paper", "code", "ours"), (name, key)
            assert field.description, (name, key)


def test_claim_uses_the_metric_of_its_inception_resize(tiny):
    tiny["features"]["inception"] = {"type": "inception", "resize": "clean"}
    tiny["evaluation"]["extractors"] = ["tiny-cnn", "inception"]
    tiny["claims"] = [CLAIM | {"metric": "fid-clean"}]
    parse_experiment(tiny, "x")
    tiny["claims"][0]["metric"] = "fid-edm"
    assert keys(tiny) == ["claims.0.metric"]


def test_data_free_experiment_needs_no_images(tmp_path):
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
    assert [(p.key, p.code) for p in problems(raw)] == [("students.gdd", "needs-images")]
    del raw["students"]["gdd"], raw["evaluation"]["statistics"]
    assert keys(raw) == ["evaluation.statistics"]
