"""What a machine does to a command: interruptions, file systems, variables of a platform, other
users' files."""

import errno
import io
import os
import re
import signal
import subprocess
import sys
import tomllib
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from harness import cli
from harness.errors import REMEDIES, ConfigError, UserError, file_system_error
from harness.evaluation import references
from harness.features import lpips
from harness.io import environment, locks, packages
from harness.io.artifacts import atomic_folder, load_tensors, save_tensors, write_json
from harness.io.downloads import cache_dir, fetch
from harness.training import distributed
from harness.validation import parse_experiment
from harness.workflow import help, interruption, machine, torchrun
from harness.workflow.status import print_status
from tests.conftest import DATA, ROOT

TINY = ["--configfile", str(DATA / "tiny.yaml")]
OTHER = 12345  # a user id without an entry in passwd


def as_another_user(work) -> None:
    """Run `work` in a fork without root's access to the files of others. As another user than
    root, permissions count anyway."""
    if child := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        return
    try:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(OTHER)
            os.setuid(OTHER)
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


@pytest.fixture
def open_path(tmp_path):
    """A temporary folder that other users can enter."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o055)
    return tmp_path


def stage_that_raises(monkeypatch, error: BaseException) -> None:
    def prepare(*arguments, **options):
        raise error

    monkeypatch.setattr("harness.data.datasets.prepare", prepare)


# -- interruptions ----------------------------------------------------------------------------------


def test_interrupted_stage_ends_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stage_that_raises(monkeypatch, KeyboardInterrupt())
    assert cli.main(["data", *TINY]) == 130
    *_, last = capsys.readouterr().err.splitlines()
    assert last == "data: interrupted; the same command continues"
    assert not list(tmp_path.rglob("failure.json"))


def test_interruption_of_an_import_has_no_traceback():
    code = "import sys, harness.__main__ as m; sys.modules['harness.cli'] = None; "
    code += "import builtins; imp = builtins.__import__\n"
    code += "def stop(name, *a, **k):\n    if name == 'harness.cli': raise KeyboardInterrupt\n"
    code += "    return imp(name, *a, **k)\nbuiltins.__import__ = stop\nsys.exit(m.main())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.parametrize("number", [1, 2])
def test_interrupted_workflow_says_so_at_once(monkeypatch, capfd, number):
    """The first interruption stops jobs and leads to the report; the second ends the process."""

    def leave(status):
        raise OSError(f"status {status}")

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(fileno=lambda: 2))
    handler = interruption.Interruption()
    handler.started = True
    with pytest.raises(SystemExit) as stopped:
        handler._handle(signal.SIGINT, None)
    assert stopped.value.code == 130 and handler.interrupted
    assert capfd.readouterr().err == (
        "\nInterrupted: jobs stop, and a partial report is being written."
        " The same command continues.\n"
    )
    with pytest.raises(OSError, match="status 130"):
        handler._handle(signal.SIGINT, None)
    assert capfd.readouterr().err == "\nInterrupted. The same command continues.\n"


@pytest.mark.slow
def test_workflow_handles_interruptions_before_its_slow_imports():
    text = (ROOT / "harness/workflow/rules/common.smk").read_text()
    assert text.index("INTERRUPTION.install()") < text.index("import load_experiment")


def test_processes_of_a_stage_end_in_their_own_line(tmp_path, capfd):
    """Without torchrun's traceback, and with the status of the process that failed."""
    (tmp_path / "work.py").write_text("import sys\nprint('error: x', file=sys.stderr)\nsys.exit(2)")
    command = [sys.executable, "-m", "harness.workflow.torchrun", "--standalone", "--nnodes=1"]
    command += ["--nproc-per-node=1", str(tmp_path / "work.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: x\n")


# -- help -------------------------------------------------------------------------------------------


def test_help_explains_every_command_and_argument(capsys):
    grouped = [name for names in help.GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(cli.COMMANDS)  # each in one group
    assert {*help.DETAILS} <= {*cli.COMMANDS}
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert "Start with" in text and all(run.help in text for run in cli.COMMANDS.values())
    for name, run in cli.COMMANDS.items():
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        assert run.help[1:] in " ".join(capsys.readouterr().out.split())
        for argument in run.arguments:
            plain = argument.rstrip("?")
            assert help.argument(name, plain) or cli.ARGUMENTS[plain]["help"], (name, plain)


# -- packages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["plan", "--tflops", "0"], "0 is not a finite number above 0"),
        (["plan", "--tflops", "nan"], "nan is not a finite number above 0"),
        (["train", "sid", "-5"], "-5 is negative"),
    ],
)
def test_numbers_out_of_range_are_rejected(capsys, arguments, reason):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert capsys.readouterr().err.strip().endswith(reason)


def test_summary_of_an_unfinished_experiment_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["summary", *TINY]) == 0
    assert "results/tiny has no complete report" in capsys.readouterr().out


def test_extras_have_the_packages_that_messages_name():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for module, extra in packages.EXTRAS.items():
        names = [re.split("[><=]", requirement)[0] for requirement in extras[extra]]
        assert module in names


def test_missing_packages_are_reported_before_anything_runs(tiny, monkeypatch):
    monkeypatch.setattr(packages, "is_installed", lambda module: False)
    tiny["training"]["loggers"] = ["csv", "wandb"]
    tiny["students"]["sid"]["lora"] = {"rank": 2}
    with pytest.raises(ConfigError) as error:
        parse_experiment(tiny, "tiny")
    message = (
        "needs the package {}, which is not installed: pip install -e '.[{}]' in the project's"
    )
    assert [(p.key, p.code) for p in error.value.problems] == [
        ("training.loggers", "missing-package"),
        ("students.sid.lora", "missing-package"),
    ]
    found = [problem.message for problem in error.value.problems]
    assert found[0].startswith(message.format("wandb", "loggers"))
    assert found[1].startswith(message.format("peft", "text-to-image"))
    parse_experiment(tiny, "tiny", files=False)  # a plan needs none
    with pytest.raises(UserError, match=r"LPIPS needs the package lpips.*\[pretrained\]"):
        lpips.trunk_file()


# -- file systems -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", REMEDIES)
def test_error_of_a_file_system_is_one_line(tmp_path, monkeypatch, capsys, number):
    monkeypatch.chdir(tmp_path)
    stage_that_raises(monkeypatch, OSError(number, os.strerror(number), "data/x"))
    assert cli.main(["data", *TINY]) == 2
    _, *lines = capsys.readouterr().err.splitlines()
    assert lines == [f"error: data/x: {os.strerror(number)}; {REMEDIES[number]}"]


def test_other_errors_keep_their_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stage_that_raises(monkeypatch, OSError(errno.EINVAL, "Invalid argument", "x"))
    with pytest.raises(OSError, match="Invalid argument"):
        cli.main(["data", *TINY])


def test_a_full_disk_names_the_file(tmp_path):
    """`write` and libraries in Rust name none."""
    for error in (
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"),
    ):
        with pytest.raises(OSError) as caught, atomic_folder(tmp_path / "model"):
            raise error
        assert caught.value.filename == str(tmp_path / "model")
        assert caught.value.errno in (errno.ENOSPC, errno.EDQUOT)
        assert file_system_error(RuntimeError("x")) is None
    assert not list(tmp_path.iterdir())


def test_folders_have_the_mode_and_group_of_their_parent(tmp_path):
    tmp_path.chmod(0o2775)
    before = os.umask(0o002)
    try:
        with atomic_folder(tmp_path / "model") as folder:
            (folder / "x").write_text("x")
    finally:
        os.umask(before)
    assert (tmp_path / "model").stat().st_mode & 0o7777 == 0o2775  # a group shares it


def test_unreadable_file_is_not_called_damaged(open_path):
    path = open_path / "x.safetensors"
    sha256 = save_tensors(path, {})
    path.chmod(0)

    def read():
        with pytest.raises(PermissionError):
            load_tensors(path, sha256)
        with pytest.raises(PermissionError):
            load_tensors(path)

    as_another_user(read)


# -- variables --------------------------------------------------------------------------------------

PLATFORM = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "PET_NNODES": "2"}


def test_ranks_of_a_platform_do_not_count(monkeypatch):
    """Some platforms set them in every container; only torchrun's own count."""
    for name, value in PLATFORM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert distributed.processes.__wrapped__() == distributed.Processes(0, 1)
    assert environment.is_first()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert not environment.is_first()


def test_torchrun_starts_without_the_platform_s_variables(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    for name, value in PLATFORM.items():
        monkeypatch.setenv(name, value)
    machine.relaunch(2, ["train", "sid", "0"])
    ((_, command, variables),) = started
    assert command[1:3] == ["-m", torchrun.__name__] and "--nnodes=1" in command
    assert not variables.keys() & PLATFORM.keys() and variables["PATH"] == os.environ["PATH"]


def test_notebook_s_backend_of_matplotlib_is_replaced(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    environment.prepare()
    assert os.environ["MPLBACKEND"] == "agg"


def test_ascii_output_replaces_arrows(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    environment.prepare()
    print("fd ↓", flush=True)
    assert stream.buffer.getvalue() == b"fd ?\n"


def test_user_without_a_home_gets_a_private_folder(monkeypatch, tmp_path):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("ONESTEP_CACHE", raising=False)
    for name in ("HOME", "USER"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with pytest.raises(UserError) as error:
        cache_dir()
    assert error.value.code == "no-home"
    environment.prepare()
    folder = tmp_path / f"onestep-harness-{os.getuid()}"
    assert os.environ["HOME"] == str(folder) and folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)  # perhaps another user's
    environment.prepare()
    assert os.environ["HOME"] != str(folder)


# -- other users' files -----------------------------------------------------------------------------


def test_status_reads_the_results_of_another_user(tiny, open_path, capsys):
    experiment = parse_experiment(tiny, "tiny", open_path / "results")
    folder = experiment.paths.run("sid", 0)
    write_json(folder / "failure.json", {"stage": "training", "reason": "x"})
    with locks.run_lock(folder):
        assert (folder / ".lock").stat().st_mode & 0o777 == 0o664
        assert locks.is_locked(folder)
        (folder / ".lock").chmod(0o644)
    for path in (open_path / "results").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)

    def look():
        assert not locks.is_locked(folder)
        print_status(experiment)
        assert "failed (training: x)" in capsys.readouterr().out

    as_another_user(look)


def test_references_of_another_user_are_read_without_a_lock(tmp_path, monkeypatch):
    """`score-folder` writes nothing where the features are stored, and stores none where it may
    not write."""
    extracted, dataset = [], SimpleNamespace(train=[0], sha256="x")
    extractor = SimpleNamespace(
        **{"name": "cnn", "hashes": {}, "resize": "", "provided": {"features"}},
        settings=SimpleNamespace(type=""),
    )
    scoring = SimpleNamespace(extractors={"cnn": (None, tmp_path)}, device="cpu")

    def extract(*arguments, **options):
        extracted.append(1)
        return {"features": torch.ones(3, 2), "index": torch.arange(3)}

    def refuse(folder):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(references, "_extract", extract)
    with monkeypatch.context() as other_user:
        other_user.setattr(references, "run_lock", refuse)
        references.load_reference(scoring, extractor, dataset, None)
        assert extracted == [1] and not list(tmp_path.iterdir())
    references.load_reference(scoring, extractor, dataset, None)
    assert extracted == [1, 1]
    monkeypatch.setattr(references, "run_lock", refuse)
    found = references.load_reference(scoring, extractor, dataset, None)
    assert extracted == [1, 1] and torch.equal(found.features, torch.ones(3, 2))


def test_cache_of_another_user_is_one_line(open_path, monkeypatch):
    monkeypatch.setenv("ONESTEP_CACHE", str(open_path))
    lock = open_path / f"{'0' * 16}-x.bin.lock"
    lock.touch(0o644)
    lock.chmod(0o444)  # a test without root is its owner

    def download():
        for place in (lock, open_path):
            with pytest.raises(UserError) as error:
                fetch("http://127.0.0.1:9/x.bin", "0" * 64)
            assert error.value.code == "cache-access" and "\n" not in str(error.value)
            assert str(error.value).startswith(f"{place} belongs to ")
            assert "set ONESTEP_CACHE" in str(error.value)
            os.environ["ONESTEP_CACHE"] = str(open_path / "new")
            open_path.chmod(0o555) if os.getuid() != OTHER else None

    as_another_user(download)
    open_path.chmod(0o755)
