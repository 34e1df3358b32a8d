"""Published numbers: their sources, and which runs reproduce them."""

from pathlib import Path

import pandas as pd
import pytest
import yaml

from harness.cli import main
from harness.config.experiment import Experiment
from harness.data.datasets import prepare
from harness.errors import UserError
from harness.evaluation.fingerprints import reference_fingerprint
from harness.io.artifacts import digest, write_json
from harness.io.records import FeatureRecord, ScoreRecord, TeacherRecord
from harness.reporting.published import tables as paper
from harness.reporting.published.match import (
    PAPERS,
    concerning,
    is_own,
    network,
    published,
    runs_of,
)
from harness.reporting.published.tables import check_inputs, teacher_lines
from harness.validation import load_experiment, parse_experiment
from tests.conftest import ROOT
from tests.test_config import problems, put

UNREAD = ("memory", "tertiary")


@pytest.fixture
def cifar(tiny) -> dict:
    """The tiny experiment as if it were on CIFAR-10 with EDM's sampler."""
    tiny["paper"] = {"dataset": "CIFAR-10", "conditioning": "cond"}
    tiny["teachers"]["edm"]["sampler"] = {"steps": 18}
    tiny["students"]["dmd"]["settings"] = {"regression": "lpips"}
    for name, settings in {
        "dmd-l2": {"regression": "l2"},
        "dmd-nodm": {"distribution_matching": False},
        "dmd-sigma": {"weighting": "sigma/alpha"},
        "dmd-sigma3": {"weighting": "sigma^3/alpha"},
    }.items():
        tiny["students"][name] = {"method": "dmd", "settings": settings}
    tiny["training"]["seeds"] = [0, 1]
    tiny["evaluation"]["num_samples"] = 50_000
    return tiny


def paper_experiment(name: str, **overrides) -> Experiment:
    """An experiment of configs/paper, without its files."""
    return load_experiment(ROOT / "configs" / "paper" / f"{name}.yaml", overrides, files=False)


def scores(*rows: tuple) -> pd.DataFrame:
    """`collect`'s table of rows (student, seed, metric, value) and optional other columns."""
    common = {"extractor": "inception", "num_samples": 50_000, "final": True, "flag": ""}
    common |= {"status": "ok", "selected": None}
    keys = ("student", "seed", "metric", "value")
    return pd.DataFrame(
        [
            common | dict(zip(keys, row, strict=False)) | (row[4] if len(row) > 4 else {})
            for row in rows
        ]
    )


def rows_of(table: pd.DataFrame, paper: str, method: str, metric: str = "FID") -> pd.DataFrame:
    return table[(table.paper == paper) & (table.method == method) & (table.metric == metric)]


# -- the data -----------------------------------------------------------------------------------


def test_every_published_number_has_a_source_that_was_read():
    assert len(published()) > 400
    for entry in published():
        assert entry["source"] and entry["evidence"] and entry["evidence"] not in UNREAD
        for key in ("paper", "table", "dataset", "conditioning", "method", "metric", "value"):
            assert entry[key] is not None or (key, entry["evidence"]) == (
                "table",
                "third_party_repo",
            ), entry


# -- the section --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "key", "code"),
    [
        ({"dataset": "cifar10"}, "dataset", "unknown-name"),
        ({"dataset": "CIFAR-10"}, "conditioning", "missing-key"),
        ({"dataset": "FFHQ-64", "conditioning": "cond"}, "conditioning", "unknown-name"),
        ({"dataset": "FFHQ-64", "setting": "exactly"}, "setting", "invalid-value"),
        ({"datset": "FFHQ-64"}, "datset", "unknown-key"),
        ({"dataset": "FFHQ-64", "methods": {"sidd": {"method": "SiD"}}}, "methods.sidd",
         "unknown-name"),
        ({"dataset": "FFHQ-64", "methods": {"gdd": {"method": "GDDI"}}}, "methods.gdd.method",
         "unknown-name"),
        ({"dataset": "FFHQ-64", "methods": {"sid": {"method": "SiD", "variant": "alpha=1.3"}}},
         "methods.sid.variant", "unknown-name"),
    ],
)  # fmt: skip
def test_errors_in_the_section_are_reported(tiny, section, key, code):
    put(tiny, "paper", section)
    assert (f"paper.{key}", code) in [(p.key, p.code) for p in problems(tiny)]


def test_the_section_and_an_only_conditioning_are_optional(tiny):
    before = parse_experiment(tiny, "x")
    assert before.paper is None
    tiny["paper"] = {"dataset": "FFHQ-64"}
    after = parse_experiment(tiny, "x")
    assert after.paper.setting == "scaled"
    assert before.run_fingerprint("sid", 0) == after.run_fingerprint("sid", 0)
    assert before.report_fingerprint() != after.report_fingerprint()


# -- which runs reproduce a number ---------------------------------------------------------------------


def matched(experiment) -> set[tuple]:
    return {
        (name, entry["paper"], entry["method"], entry["variant"])
        for entry in concerning(experiment.paper)
        for name in runs_of(experiment, entry)
    }


def test_students_match_their_published_names(cifar):
    found = matched(parse_experiment(cifar, "x"))
    assert ("dmd", "DMD", "DMD", None) in found
    assert ("dmd", "DMD", "DMD", "full") in found
    assert ("dmd-noreg", "DMD", "DMD", "w/o regression loss") in found
    assert ("dmd-noreg", "DMD", "DMD", "full") not in found
    ablations = {
        "dmd-l2": "L2 instead of LPIPS in the regression loss",
        "dmd-nodm": "w/o distribution matching (regression only)",
        "dmd-sigma": "sample weighting sigma_t/alpha_t",
        "dmd-sigma3": "sample weighting sigma_t^3/alpha_t",
    }
    for name, variant in ablations.items():
        assert {row[3] for row in found if row[0] == name} == {variant}
    assert ("sid", "SiD", "SiD", "alpha=1.2") in found
    assert ("sid", "SiD", "SiD", "alpha=1.0") not in found
    assert ("sim", "SIM", "SIM", None) in found
    assert ("teacher", "EDM", "EDM (teacher)", None) in found
    cifar["paper"]["conditioning"] = "uncond"
    found = matched(parse_experiment(cifar, "x"))
    assert ("gdd-i", "GDD", "GDD-I", None) in found
    assert not any(name == "gdd" for name, *_ in found)  # plain GDD was read nowhere
    assert ("sim", "IMM", "SiM", None) in found  # IMM's spelling


def test_a_student_with_other_settings_matches_no_number(cifar):
    cifar["students"]["sid"]["freeze"] = "innate"
    cifar["students"]["sim"]["freeze"] = "innate"
    cifar["students"]["dmd-sigma"]["settings"]["regression"] = "none"  # two ablations in one
    found = {name for name, *_ in matched(parse_experiment(cifar, "x"))}
    assert not found & {"sid", "sim", "dmd-sigma"}


def test_a_number_without_a_variant_means_the_papers_own_setting():
    """SiD uses alpha 1.2, but 1.0 on AFHQv2, also for the 1.62 in GDD's README."""
    experiment = paper_experiment("afhqv2-64")
    found = matched(experiment)
    assert ("sid", "GDD", "SiD", None) in found and ("sid", "SiD", "SiD", "alpha=1.0") in found
    changed = {"students": {"sid": {"settings": {"alpha": 1.2}}}}
    assert not any(name == "sid" for name, *_ in matched(paper_experiment("afhqv2-64", **changed)))


def test_a_published_name_can_be_set(cifar):
    cifar["paper"]["methods"] = {"gdd": {"method": "DMD", "variant": "full"}}
    found = matched(parse_experiment(cifar, "x"))
    assert {row for row in found if row[0] == "gdd"} == {("gdd", "DMD", "DMD", "full")}


def test_a_teacher_matches_numbers_of_its_sampler(cifar):
    cifar["paper"] = {"dataset": "ImageNet-64"}

    def values(**sampler) -> set[float]:
        cifar["teachers"]["edm"]["sampler"] = sampler
        experiment = parse_experiment(cifar, "x")
        entries = concerning(experiment.paper)
        return {
            entry["value"]
            for entry in entries
            if entry["metric"] == "FID" and "teacher" in runs_of(experiment, entry)
        }

    # DMD counts 512 evaluations; GDD's README gives 2.64 without a count.
    assert values(steps=256) == {2.32, 2.64}
    assert values(steps=256, s_churn=40.0) == {1.36}
    assert values(steps=18) == set()


@pytest.mark.parametrize("name", ["cifar10-uncond", "cifar10-cond", "ffhq64", "afhqv2-64"])
def test_a_ve_teacher_does_not_match_numbers_of_vp(name):
    found = {row[0] for row in matched(paper_experiment(name))}
    assert "teacher/vp" in found and "teacher/ve" not in found


def test_an_imported_network_is_identified_by_its_config(cifar, tmp_path):
    cifar["teachers"]["edm"] = {"source": "none.pkl", "sampler": {"steps": 18}}
    experiment = parse_experiment(cifar, "x", tmp_path, files=False)
    folder = experiment.paths.teacher("edm")
    for config, expected in (
        (None, None),
        ({"_class_name": "SongUNet", "embedding_type": "positional"}, "vp"),
        ({"_class_name": "SongUNet", "embedding_type": "fourier"}, "ve"),
        ({"_class_name": "DhariwalUNet"}, "adm"),
        ({"_class_name": "UNet2DModel"}, None),
    ):
        if config:
            write_json(folder / "config.json", config)
        assert network(experiment, "edm") == expected
        assert (expected == "ve") != any(name == "teacher" for name, *_ in matched(experiment))


def test_teachers_have_names_if_there_are_several(cifar):
    cifar["teachers"]["other"] = cifar["teachers"]["edm"] | {"sampler": {"steps": 40}}
    found = matched(parse_experiment(cifar, "x"))
    assert ("teacher/edm", "EDM", "EDM (teacher)", None) in found
    assert not any(name == "teacher/other" for name, *_ in found)


# -- the table ----------------------------------------------------------------------------------


def test_only_an_fid_is_reproduced(cifar):
    experiment = parse_experiment(cifar, "x")
    metrics = ("fd", "kd", "fidelity", "clip-fid")
    table = paper.paper_table(experiment, scores(*(("sid", 0, m, 1.0) for m in metrics)))
    assert tuple(table.columns) == paper.COLUMNS
    assert (table.reproduced == "").all() and (table.setting_match == "").all()
    assert table.difference.isna().all()
    assert "no run has an FID" in rows_of(table, "SiD", "SiD").note.iloc[0]


def test_reproduced_is_mean_and_std_over_seeds(cifar):
    cifar["paper"]["setting"] = "exact"
    table = paper.paper_table(
        parse_experiment(cifar, "x"),
        scores(
            ("sid", 0, "fid-edm", 2.0),
            ("sid", 1, "fid-edm", 3.0),
            ("sid", 0, "fid", 9.0),  # another protocol: EDM's comes first
            ("sid", 0, "fid-edm", 9.0, {"final": False}),
            ("sid", 0, "fid-edm", 9.0, {"num_samples": 359}),
            ("teacher", None, "fid-edm", 1.8),
            ("sim", 0, "fd", 1.0),
        ),
    )
    sid = rows_of(table, "SiD", "SiD")
    sid = sid[(sid.variant == "alpha=1.2") & (sid.evidence == "author_repo")].iloc[0]
    assert sid.reported == 1.71 and sid.reproduced == "2.50 ± 0.71"
    assert sid.difference == pytest.approx(2.5 - 1.71) and sid.setting_match == "changed"
    assert (
        "different from the published run: batch, generator_dropout, share_images, dropout, "
        "augment, budget, teacher (trained here), network (another instead of vp), held_out (0.2 "
        "instead of 0), statistics (those of the images instead of cifar10-32x32.npz);"
    ) in sid.note
    assert "sid of tiny: fid-edm_n50000_inception" in sid.note
    assert "another statistic: 2 sampling seeds instead of 10, the last snapshot" in sid.note
    assert sid.reported_is.startswith("the mean of 10 evaluations of the snapshot with the lowest")
    assert (sid.reproduced_is, sid.snapshots) == ("one evaluation of the last snapshot", 1)
    teacher = rows_of(table, "EDM", "EDM (teacher)").iloc[0]
    assert teacher.reproduced == "1.80" and teacher.difference == pytest.approx(0.01)
    assert (
        teacher.setting_match == "changed"
        and "different from the published run: teacher (trained here), network" in teacher.note
    )
    assert teacher.reported_is == "the minimum of 3 evaluations (NVlabs/edm README)"
    assert rows_of(table, "SIM", "SIM").reproduced.item() == ""
    context = rows_of(table, "DMD", "StyleGAN-XL").iloc[0]
    assert context.reproduced == "" and context.setting_match == "" and context.reported == 1.85


def test_limits_of_a_reproduction_are_notes_of_its_row(cifar):
    cifar["evaluation"]["num_samples"] = 2000
    failed = {"metric": None, "status": "failed (training: broke)", "flag": None}
    table = paper.paper_table(
        parse_experiment(cifar, "x"),
        scores(
            ("dmd", 0, "fid", 3.0, {"num_samples": 2000, "flag": "trained-on-extractor"}),
            ("dmd", 1, None, None, failed | {"num_samples": None, "extractor": None}),
        ),
    )
    full = rows_of(table, "DMD", "DMD")
    row = full[full.variant == "full"].iloc[0]
    assert row.reproduced == "3.00" and row.setting_match == "scaled"
    for part in ("1 excluded: failed (training: broke)", "fid_n2000_inception",
                 "trained-on-extractor", "papers use 50000", "re-implementation"):  # fmt: skip
        assert part in row.note


def test_each_student_has_a_row_and_clip_fid_is_never_reproduced(cifar):
    cifar["paper"] = {"dataset": "FFHQ-64"}
    cifar["students"]["again"] = cifar["students"]["gdd-i"]
    table = paper.paper_table(
        parse_experiment(cifar, "x"), scores(("gdd-i", 0, "fid", 1.0), ("again", 0, "fid", 1.1))
    )
    rows = rows_of(table, "GDD", "GDD-I")
    abstract = rows[rows.evidence == "abstract"]
    assert list(abstract.reproduced) == ["1.00", "1.10"]
    clip = rows_of(table, "GDD", "GDD-I", "CLIP-FID")
    assert (clip.reproduced == "").all() and clip.note.str.contains("not compared: ").all()


def test_paper_tables_are_written_as_csv_markdown_and_latex(cifar, tmp_path):
    experiment = parse_experiment(cifar, "x")
    table = scores(("sid", 0, "fid", 2.0), ("sid", 1, "fid", 2.5))
    csv, markdown, tex = paper.write_paper(experiment, table, tmp_path)
    assert "2.25 ± 0.35" in csv.read_text() and "2.25 ± 0.35" in markdown.read_text()
    assert r"2.25 $\pm$ 0.35" in tex.read_text() and r"\toprule" in tex.read_text()
    assert "nan" not in markdown.read_text() and "<NA>" not in markdown.read_text()


@pytest.mark.slow
def test_the_workflow_declares_the_paper_table(empty_workspace):
    config = empty_workspace.config() | {"paper": {"dataset": "FFHQ-64", "setting": "toy"}}
    empty_workspace.write_config(config)
    done = empty_workspace.snakemake("-n")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tables/paper.csv" in done.stdout


# -- all experiments ----------------------------------------------------------------------------


def test_paper_tables_without_any_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["paper-tables"]) == 0
    output = capsys.readouterr().out
    fids = [
        entry
        for entry in published()
        if entry["paper"] in PAPERS
        and entry["table"].startswith(paper.TABLES[entry["paper"]])
        and is_own(entry)
        and entry["metric"] == "FID"
    ]
    assert f"{len(fids)} of {len(fids)} FIDs" in output
    assert "  DMD, Table 2 (left): CIFAR-10 cond: DMD w/o regression loss: 5.58" in output
    folder = tmp_path / "results" / "paper-tables"
    names = {path.name for path in folder.iterdir()}
    assert {"dmd-table-1.csv", "dmd-table-2.md", "dmd-table-3.csv", "dmd-table-4.md",
            "dmd-table-6.csv", "sid-readme.csv", "sim-abstract.md", "gdd-abstract.csv"} <= names  # fmt: skip
    half = pd.read_csv(folder / "dmd-table-2.csv")
    assert set(half.table) == {"Table 2 (left)", "Table 2 (right)"}
    assert set(half.dataset) == {"CIFAR-10", "ImageNet-64"}


def test_paper_tables_load_the_papers_experiments_without_their_files(
    tmp_path, monkeypatch, capsys
):
    """In a fresh clone with the results of one unfinished experiment."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    best = {"final": False, "selected": 100}
    rows = [("sid", 0, "fid-edm", 1.9, best), ("sid", 1, "fid-edm", 2.1, best)]
    rows = scores(*rows, *((*row[:3], row[3] + 0.1) for row in rows))
    nothing = scores(("none", 0, "fid-edm", 0.0))

    def collected(experiment, partial):
        assert partial
        return (rows if experiment.name == "cifar10-uncond" else nothing), {}

    monkeypatch.setattr(paper, "collect", collected)
    assert main(["paper-tables"]) == 0
    output = capsys.readouterr()
    assert "skipped" not in output.err and "from 17 experiments\n" in output.out
    sid = pd.read_csv("results/paper-tables/sid-readme.csv").set_index(["dataset", "conditioning"])
    row = sid.loc[("CIFAR-10", "uncond")].squeeze()
    assert row.reproduced == "2.00 ± 0.14" and row.setting_match == "exact"
    assert row["last"] == "2.10 ± 0.14"
    assert "SiD alpha=1.2: 1.923" not in output.out


def test_paper_tables_skip_unreadable_experiments(cifar, tmp_path, monkeypatch, capsys, caplog):
    """A manifest takes precedence over a file of the same name."""
    results, configs = tmp_path / "results", tmp_path / "configs"
    configs.mkdir()
    (configs / "broken.yaml").write_text("name: [")
    (configs / "tiny.yaml").write_text(yaml.safe_dump(cifar))
    cifar["paper"]["setting"] = "toy"
    write_json(results / "tiny" / "manifest.json", {"config": cifar})
    write_json(results / "digits" / "manifest.json", {"config": {"name": "digits"}})
    write_json(results / "damaged" / "manifest.json", [])
    table = scores(("sim", 0, "fid-edm", 2.0))
    monkeypatch.setattr(paper, "collect", lambda experiment, partial: (table, {}))
    with caplog.at_level("WARNING"):
        paper.write_paper_tables(parse_experiment, results, configs)
    output = capsys.readouterr()
    assert "from 1 experiment\n" in output.out and "SIM: 1.96" not in output.out
    assert "SIM, abstract: CIFAR-10 uncond: SIM: 2.06" in output.out
    skipped = "\n".join(caplog.messages)
    assert f"{configs}/broken.yaml" in skipped and f"{results}/damaged/manifest.json" in skipped
    row = pd.read_csv(results / "paper-tables" / "sim-abstract.csv").set_index("conditioning")
    assert row.difference["cond"] == pytest.approx(0.04) and row.setting_match["cond"] == "toy"


# -- the teacher --------------------------------------------------------------------------------


def write_teacher_scores(experiment, *rows: tuple) -> None:
    """Write a teacher's record and its score file from rows (metric, extractor, value)."""
    fingerprint = digest(experiment.teacher_fingerprint("edm"))
    write_teacher_record(experiment, fingerprint)
    keys = ("metric", "extractor", "value")
    common = {"num_samples": 50_000, "stderr": 0.02, "protocol": "p"}
    entry = {"student": "teacher", "snapshot": "", "final": True, "grid": [], "nfe": 35}
    entry["rows"] = [common | dict(zip(keys, row, strict=True)) for row in rows]
    ScoreRecord(
        teacher="edm",
        weights="0" * 64,
        fingerprint=digest(
            reference_fingerprint(experiment.scoring(), experiment.teachers["edm"].sampler)
        ),
        tf32=False,
        entries=[entry],
        protocols={},
        dimensions={},
    ).write(experiment.paths.reference_scores("edm"))


def write_teacher_record(experiment, fingerprint: str) -> None:
    record = TeacherRecord.model_construct(
        teacher="edm", fingerprint=fingerprint, run_id="r", sha256="0" * 64, parameters=1
    )
    record.write(experiment.paths.teacher("edm") / "teacher.json")


def test_verify_teacher(cifar, tmp_path, monkeypatch, capsys):
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(cifar))
    monkeypatch.chdir(tmp_path)
    experiment = load_experiment("x.yaml")
    write_teacher_scores(experiment, ("fd", "tiny-cnn", 0.4))
    assert main(["verify-teacher", "--configfile", "x.yaml"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "reported | measured"
    reported = "FID 1.79 (EDM (teacher), 35 NFE, the minimum of 3 evaluations; EDM, README)"
    assert f"{reported} | no FID extractor in this experiment" in lines
    assert "FID 1.84 (EDM (teacher), 35 NFE; DMD, Table 6) | no FID" in "\n".join(lines)
    assert "- | fd_n50000_tiny-cnn 0.400 ± 0.020" in lines

    def lines_of(config: dict, *values: float) -> list[str]:
        experiment = parse_experiment(config, "x")
        write_teacher_scores(experiment, *(("fid-edm", "inception", value) for value in values))
        return teacher_lines(experiment, "edm")

    assert f"{reported} | fid-edm_n50000_inception 1.85 ± 0.02" in lines_of(cifar, 1.85)
    # The mean of two sampling seeds and its standard error.
    assert f"{reported} | fid-edm_n50000_inception 1.86 ± 0.01" in lines_of(cifar, 1.85, 1.87)
    measured = "fid-edm_n50000_inception 1.86 ± 0.01, minimum of 3: 1.84"
    assert f"{reported} | {measured}" in lines_of(cifar, 1.85, 1.84, 1.88, 1.87)
    cifar["teachers"]["edm"]["sampler"]["steps"] = 19
    assert f"{reported} | another sampler" in lines_of(cifar, 1.85)
    cifar["teachers"]["edm"]["sampler"]["steps"] = 18
    cifar["teachers"]["edm"]["network"] = {"type": "SongUNet", "embedding_type": "fourier"}
    assert f"{reported} | another network" in lines_of(cifar, 1.85)
    del cifar["paper"]
    assert lines_of(cifar, 1.85)[2:] == ["- | fid-edm_n50000_inception 1.85 ± 0.02"]


def test_verify_teacher_names_the_target_of_missing_inputs(cifar, tmp_path, monkeypatch, capsys):
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(cifar))
    monkeypatch.chdir(tmp_path)
    assert main(["verify-teacher", "end", "--configfile", "x.yaml"]) == 2
    assert "unknown teacher 'end'; did you mean 'edm'?" in capsys.readouterr().err
    command = "snakemake --cores 8 results/tiny/scores/teachers/edm.json --configfile x.yaml"
    assert main(["verify-teacher", "--configfile", "x.yaml"]) == 2
    error = capsys.readouterr().err
    assert "results/tiny/data/data.json is missing" in error and command in error
    experiment = load_experiment("x.yaml")
    for path in ("data/data", "features/tiny-cnn/features", "features/tiny-clip/features"):
        write_json(experiment.paths.root / f"{path}.json", {})
    write_teacher_record(experiment, "of other settings")
    with pytest.raises(UserError, match="teacher edm") as error:
        check_inputs(experiment, "edm", Path("x.yaml"))
    assert error.value.code == "missing-inputs" and command in str(error.value)
    (experiment.paths.data / "data.json").unlink()
    prepare(experiment.data, experiment.paths.data)  # without the experiment's fingerprint
    write_teacher_record(experiment, digest(experiment.teacher_fingerprint("edm")))
    for name in ("tiny-cnn", "tiny-clip"):
        path = experiment.paths.features(name) / "features.json"
        FeatureRecord(name=name, settings={}, run_id="of other settings").write(path)
    with pytest.raises(UserError, match="harness features tiny-cnn --configfile") as error:
        check_inputs(experiment, "edm", Path("x.yaml"))
    assert error.value.code == "outdated"


@pytest.mark.slow
def test_a_teachers_scores_are_a_target_that_trains_no_student(empty_workspace):
    target = "results/tiny/scores/teachers/edm.json"
    command = ("-n", "--cores", "8", target, "--configfile", "configs/tiny.yaml")
    done = empty_workspace.run("snakemake", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    rules = {line.split()[0] for line in done.stdout.splitlines() if line[:1].isalpha()}
    assert {"data", "features", "teacher", "score_references"} <= rules
    assert not rules & {"train", "score", "pairs", "report"}
