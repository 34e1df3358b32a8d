"""Model cards, and uploads to the Hugging Face hub, on a local server."""

import base64
import json
import re
import threading
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline

from harness.cli import main
from harness.config.schema import DataSection, ImportedTeacher
from harness.errors import UserError
from harness.io.artifacts import sha256_file
from harness.io.records import DataRecord, ScoreRecord, StudentRecord, TeacherRecord
from harness.io.uploads import Destination, check_destination
from harness.networks import save_denoiser
from harness.students.export import export_student
from harness.students.model_card import _licence
from harness.students.pipeline import OneStepPipeline
from harness.teachers.pipelines import PipelineFolder
from tests import pipelines
from tests.test_student_pipeline import PLUGIN, denoiser_of, pipeline_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "owner/student"


def student_run(root, denoiser, seed: int = 0):
    """A finished run of a student with these weights."""
    folder = root / f"seed{seed}"
    sha256 = save_denoiser(denoiser, folder / "model", {"sigma_init": 2.5})
    ledger = {"images": 4096, "flops": 3 * 10**12, "seconds": 60.0}
    StudentRecord(
        **{"sha256": sha256, "fingerprint": "f", "experiment": "tiny", "student": "sid"},
        **{"seed": seed, "method": "sid", "paper": "Zhou et al. 2024", "data_free": False},
        **{"deviations": ["no | augmentation"], "settings": {}, "changed_settings": {}},
        **{"freeze": "none", "trained_against": ["critic"], "pretraining": ["ImageNet"]},
        **{"device": "cpu", "processes": 1, "nfe": 1, "parameters": 12, "snapshots": []},
        **{"inputs": {"teacher": "b" * 64}, "contended": False, "ledger": ledger},
        **{"stop": {"unit": "images", "amount": 4096}},
    ).write(folder / "student.json")
    names = ["zero", "one", "two"]
    DataRecord(
        **{"name": "mine", "registered": False, "class_names": names, "train_images": 0},
        **{"held_out_images": 0, "image_shape": [3, 16, 16], "images_sha256": "c", "sha256": "d"},
    ).write(root / "data" / "data.json")
    student = SimpleNamespace(name="sid")
    run = {"folder": folder, "experiment": "tiny", "student": student, "seed": seed}
    return SimpleNamespace(**run, data=root / "data"), sha256


def scores_of(path, sha256: str) -> None:
    """Two metrics at two sample sizes, with two sampling seeds."""
    protocols, rows = {}, []
    for metric, values in {"fd": (2.0, 4.0), "precision": (0.5, 0.5)}.items():
        for size in (100, 400):
            key = f"{metric}{size}"
            facts = {"metric": metric, "extractor": "cnn", "num_samples": size, "resize": "none"}
            facts |= {"sampling_seeds": [0, 1], "settings": {"k": 3} if metric != "fd" else {}}
            protocols[key] = facts | {"reference": "train1438", "extractor_sha256": {"w": "e" * 8}}
            flag = "trained-on-extractor" if metric == "fd" else ""
            row = {"metric": metric, "extractor": "cnn", "num_samples": size, "protocol": key}
            rows += [
                row | {"sample_seed": seed, "value": value, "flag": flag}
                for seed, value in enumerate(values)
            ]
    entry = {"snapshot": "last", "final": True, "grid": [], "rows": rows}
    facts = {"weights": sha256, "fingerprint": "f", "tf32": False, "dimensions": {}}
    ScoreRecord(**facts, entries=[entry], protocols=protocols).write(path)


def trained_teacher():
    data = SimpleNamespace(name="mine")
    return SimpleNamespace(name="edm", section=SimpleNamespace(), data_section=data)


@pytest.fixture
def student(tmp_path):
    """Arguments of `export_student` but the folder."""
    run, sha256 = student_run(tmp_path / "run", denoiser_of("unet"))
    scores_of(tmp_path / "scores.json", sha256)
    return run, trained_teacher(), tmp_path / "scores.json"


def example(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


# -- the model card -------------------------------------------------------------------------------


def test_card_has_metadata_scores_with_protocol_and_cost(student, tmp_path):
    export_student(*student, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "onestep-harness" and not {"license", "base_model"} & set(head)
    assert head["tags"] == ["one-step-diffusion", "distillation", "sid"]
    (result,) = head["model-index"][0]["results"]
    fd, precision = result["metrics"]
    size = {"extractor": "cnn", "num_samples": 400, "sampling_seeds": 2}
    assert (fd["type"], fd["value"]) == ("fd", 3.0)
    assert fd["args"] == size | {"protocol": "fd400", "std": pytest.approx(2**0.5)}
    assert precision["args"]["std"] == 0
    for line in (
        "| metric | extractor | num_samples | value | sampling_seeds | settings | protocol | flag |",
        "| fd | cnn | 400 | 3 ± 1.4 | 2 |  | fd400 | trained-on-extractor |",
        "| precision | cnn | 400 | 0.5 ± 0 | 2 | k 3 | precision400 |  |",
        "`trained-on-extractor`: the student was trained against this feature network.",
        "* reference: train1438",
        "* resize: none",
        "* sampling seeds: 0, 1",
        "* sha256 of feature networks: cnn w eeeeeeee",
        "| training seed | 0 |",
        "| budget | 4,096 images |",
        "| spent | 4,096 images, 3 TFLOPs of all networks, 60 seconds on cpu |",
        "| network evaluations per image (NFE) | 1 |",
        "| trained against | critic |",
        "Labels: 0 = zero, 1 = one, 2 = two.",
        "Deviations from the paper: no | augmentation.",
        "The weights were trained from this data only.",
    ):
        assert f"\n{line}\n" in card + "\n", line


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: [mit, other]\n---\n", ["mit", "other"]),
        ("---\n: not: [YAML\n---\n", None),
        ("no metadata", None),
    ],
)
def test_licence_is_that_of_the_teachers_card(tmp_path, text, licence):
    (tmp_path / "README.md").write_text(text)
    assert _licence(str(tmp_path), None) == licence


def test_card_without_scores_says_so(student, tmp_path):
    run, teacher, _ = student
    export_student(run, teacher, tmp_path / "missing.json", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "These weights have not been scored." in card and "model-index" not in card


@pytest.mark.parametrize(("name", "classes"), [("unet", 10), ("unet", 0), ("plug-in", 10)])
def test_example_of_the_card_runs(name, classes, tmp_path, monkeypatch):
    run, _ = student_run(tmp_path / "run", denoiser_of(name, classes))
    export_student(run, trained_teacher(), tmp_path / "none.json", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    if name == "plug-in":
        (tmp_path / PLUGIN.name).symlink_to(PLUGIN)
    exec(example((tmp_path / "out" / "README.md").read_text()), {})
    assert (tmp_path / "image.png").is_file()


@pytest.mark.parametrize("make", [pipelines.stable_diffusion, pipelines.pixart])
def test_example_of_a_text_to_image_student_runs(make, tmp_path, monkeypatch):
    """The card names the licence of the teacher."""
    make().save_pretrained(tmp_path / "pipe")
    (tmp_path / "pipe" / "README.md").write_text("---\nlicense: openrail++\n---\n")
    source = PipelineFolder(tmp_path / "pipe")
    run, _ = student_run(tmp_path / "run", source.denoiser())
    section = ImportedTeacher(source=str(tmp_path / "pipe"))
    imported = {"source": section.source, "sha256": source.sha256()}
    facts = {"teacher": "sd", "sha256": "a", "fingerprint": "f", "parameters": 1}
    TeacherRecord(**facts, imported=imported).write(tmp_path / "teacher" / "teacher.json")
    names = {"name": "sd", "folder": tmp_path / "teacher"}
    teacher = SimpleNamespace(**names, section=section, data_section=DataSection(name="mine"))
    export_student(run, teacher, tmp_path / "none.json", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    card = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "openrail++" and "base_model" not in head
    assert head["pipeline_tag"] == "text-to-image" and "teacher | sd (pipe)" in card
    assert ("sentencepiece protobuf" in card) == (make is pipelines.pixart)
    code = example(card)
    if make is pipelines.pixart:  # images of 16 pixels are not a size of PixArt's
        code = code.replace("guidance_scale=0", "guidance_scale=0, use_resolution_binning=False")
    exec(code, {})
    assert (tmp_path / "image.png").is_file()
    assert isinstance(DiffusionPipeline.from_pretrained("out"), type(make()))


# -- uploads --------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local hub. `server.files` are the files of a repository by branch; `server.status` maps the
    beginning of a path to an error."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self, value, status=200, **headers):
            body = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for key, text in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(key.replace("_", "-"), text)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            http.requests.append(f"{self.command} {self.path}")
            for path, status in http.status.items():
                if self.path.startswith(path):
                    return self.answer({"error": f"status {status}"}, status)
            path = self.path.partition("?")[0]
            if "Bearer token" not in self.headers.get("Authorization", "") and "api/" in path:
                return self.answer({"error": "Invalid credentials"}, 401)
            if path == "/api/whoami-v2":
                return self.answer({"name": "owner", "type": "user", "auth": {}})
            if path == "/api/repos/create":
                http.created.append(json.loads(content))
                status = 409 if http.files else 200
                return self.answer({"url": f"{http.address}/{REPOSITORY}"}, status)
            if path == "/api/validate-yaml":
                assert yaml.safe_load(json.loads(content)["content"].split("---")[1])
                return self.answer({"warnings": [], "errors": []})
            branch = http.files.setdefault(path.rpartition("/")[2], {})
            if "/preupload/" in path:
                rows = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    | {"oid": http.blobs.get(f["path"])}
                    for f in json.loads(content)["files"]
                ]
                return self.answer({"files": rows})
            if "/commit/" in path:
                lines = [json.loads(line) for line in content.splitlines()]
                http.messages.append(lines[0]["value"]["summary"])
                for line in lines[1:]:
                    data = base64.b64decode(line["value"]["content"])
                    branch[line["value"]["path"]] = data
                    blob = b"blob %d\0" % len(data) + data
                    http.blobs[line["value"]["path"]] = sha1(blob).hexdigest()
                commit = f"{http.address}/{REPOSITORY}/commit/{COMMIT}"
                return self.answer({"commitUrl": commit, "commitOid": COMMIT})
            if "/branch/" in path:
                return self.answer({})
            files = http.files.get("main", {})
            if "/resolve/" in path:
                name = re.sub(r".*/resolve/[^/]*/", "", path)
                if name not in files:
                    return self.answer({}, 404, X_Error_Code="EntryNotFound")
                tag = f'"{name.replace("/", "-")}"'
                return self.answer(files[name], X_Repo_Commit=COMMIT, ETag=tag)
            if "/tree/" in path:
                rows = [{"type": "file", "path": f, "size": len(files[f])} for f in files]
                return self.answer([row | {"oid": "0" * 40} for row in rows])
            names = [{"rfilename": name} for name in files]
            facts = {"id": REPOSITORY, "sha": COMMIT, "private": http.private}
            return self.answer(facts | {"siblings": names})

        do_POST = do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    http.requests, http.created, http.messages, http.private = [], [], [], False
    http.files, http.blobs, http.status = {}, {}, {}
    http.address, constants = f"http://127.0.0.1:{http.server_port}", huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", http.address)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", http.address)  # diffusers' client
    template = http.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "token")
    yield http
    http.shutdown()
    http.server_close()


def contents(folder) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.contract
def test_student_is_uploaded_and_loaded_from_the_hub(server, student, tmp_path):
    address = export_student(*student, tmp_path / "out", Destination(REPOSITORY))
    assert address == f"{server.address}/{REPOSITORY}" and "private" not in server.created[0]
    assert server.files["main"] == contents(tmp_path / "out")
    assert {"README.md", "model_index.json"} < set(server.files["main"])
    assert f'from_pretrained("{REPOSITORY}")' in server.files["main"]["README.md"].decode()
    pipe = OneStepPipeline.from_pretrained(REPOSITORY)
    local = OneStepPipeline.from_pretrained(tmp_path / "out")
    z = torch.randn(1, 3, 16, 16)
    images = [p(class_labels=3, latents=z, output_type="pt").images for p in (pipe, local)]
    assert torch.equal(*images)


def test_examples_of_the_documentation_run(server, tmp_path, monkeypatch):
    """docs/using-a-student.md, with the CPU for the GPU."""
    text = (Path(__file__).parents[1] / "docs" / "using-a-student.md").read_text()
    for name, folder in (("unet", "my-student"), ("plug-in", "my-plug-in-student")):
        pipeline_of(name).save_pretrained(tmp_path / folder)
    source = pipelines.stable_diffusion()
    source.save_pretrained(tmp_path / "my-text-student")
    (tmp_path / PLUGIN.name).symlink_to(PLUGIN)
    server.files["main"] = contents(tmp_path / "my-student")
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 6
    for code in examples:
        exec(code.replace('"cuda"', '"cpu"'), {})


def test_repeated_upload_sends_only_what_changed(server, student, tmp_path):
    server.status["/api/models"] = 413  # the export is complete, the upload is not
    with pytest.raises(UserError, match="the hub answered 413"):
        export_student(*student, tmp_path / "out", Destination(REPOSITORY))
    del server.status["/api/models"]
    (tmp_path / "out" / "NOTES.md").write_text("mine")
    before = contents(tmp_path / "out")
    options = Destination(REPOSITORY, message="First weights")
    export_student(*student, tmp_path / "out", options)
    assert contents(tmp_path / "out") == before == server.files["main"]
    assert server.messages == ["First weights"]
    (tmp_path / "out" / "NOTES.md").write_text("changed")
    server.files["main"]["by-others.txt"] = b"stays"
    server.files["main"]["README.md"] = b"not sent again"
    export_student(*student, tmp_path / "out", options)
    assert server.files["main"]["NOTES.md"] == b"changed"
    assert server.files["main"]["by-others.txt"] == b"stays"
    assert server.files["main"]["README.md"] == b"not sent again"


def test_earlier_export_is_uploaded_with_the_name_of_the_repository(server, student, tmp_path):
    export_student(*student, tmp_path / "out")
    card = tmp_path / "out" / "README.md"
    assert 'from_pretrained("out")' in card.read_text()
    card.write_text(card.read_text() + "\nMy own remark.\n")
    export_student(*student, tmp_path / "out", Destination(REPOSITORY))
    sent = server.files["main"]["README.md"].decode()
    assert f'from_pretrained("{REPOSITORY}")' in sent and sent.endswith("My own remark.\n")


def test_folder_with_other_content_is_neither_changed_nor_uploaded(server, student, tmp_path):
    out = tmp_path / "out"
    run, _ = student_run(tmp_path / "other", denoiser_of("unet", 4), seed=1)
    export_student(run, *student[1:], out)
    before = contents(out)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "mine.txt").touch()
    for folder in (out, tmp_path / "files", out / "README.md"):
        for destination in (None, Destination(REPOSITORY)):
            with pytest.raises(UserError) as error:
                export_student(*student, folder, destination)
            assert error.value.code == "exists" and str(folder) in str(error.value)
    assert contents(out) == before and not server.created


def test_private_repository_and_branch(server, student, tmp_path):
    options = Destination(REPOSITORY, private=True, revision="v2", message="Second")
    with pytest.raises(UserError) as error:
        export_student(*student, tmp_path / "out", options)
    assert error.value.code == "public" and not server.messages
    server.private = True
    export_student(*student, tmp_path / "out", options)
    assert {server.created[0].get("visibility"), server.created[0].get("private")} & {
        "private",
        True,
    }
    assert server.files["v2"] == contents(tmp_path / "out") and not server.files.get("main")


@pytest.mark.parametrize("name", ["student", "a/b/c", "owner/-x", "owner/x..y", "o w/x", "", "./x"])
def test_invalid_repository_is_rejected_before_any_request(server, student, tmp_path, name):
    with pytest.raises(UserError) as error:
        export_student(*student, tmp_path / "out", Destination(name))
    assert error.value.code == "invalid-value" and "\n" not in str(error.value)
    assert server.requests == [] and not (tmp_path / "out").exists()


def test_upload_without_login_or_network_is_rejected_before_the_export(
    server, student, tmp_path, monkeypatch
):
    def fails():
        with pytest.raises(UserError) as error:
            export_student(*student, tmp_path / "out", Destination(REPOSITORY))
        assert not (tmp_path / "out").exists() and "\n" not in str(error.value)
        return error.value.code, str(error.value)

    monkeypatch.setenv("HF_TOKEN", "old")
    assert fails()[0] == "upload" and "log in again" in fails()[1]
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert fails()[0] == "not-logged-in" and "hf auth login" in fails()[1]
    monkeypatch.setenv("HF_TOKEN", "token")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fails()[0] == "offline"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert fails()[0] == "upload" and REPOSITORY in fails()[1]


@pytest.mark.parametrize(
    "status",
    [{"/api/repos/create": 403, "/api/models": 404}, {"/api/models/owner/student/commit": 403}],
)
def test_upload_without_permission_keeps_the_export(server, student, tmp_path, status):
    server.status |= status
    with pytest.raises(UserError, match="no permission") as error:
        export_student(*student, tmp_path / "out", Destination(REPOSITORY))
    assert error.value.code == "upload" and (tmp_path / "out" / "README.md").is_file()


def test_options_of_an_upload_need_a_repository(capsys):
    arguments = ["export", "sid", "0", "out", "--configfile", "tests/data/tiny.yaml"]
    assert main([*arguments, "--private"]) == 2
    assert "--push-to-hub" in capsys.readouterr().err


def test_check_of_a_destination_reads_only(server):
    check_destination(Destination(REPOSITORY))
    assert server.requests == ["GET /api/whoami-v2"]


def test_card_names_the_weights_of_the_run(student, tmp_path):
    export_student(*student, tmp_path / "out")
    digest = sha256_file(student[0].folder / "model" / "diffusion_pytorch_model.safetensors")
    assert f"| weights | sha256 {digest} |" in (tmp_path / "out" / "README.md").read_text()
