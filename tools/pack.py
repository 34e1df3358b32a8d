"""Pack the results of an experiment for another machine, and join the results of several machines.

    python -m tools.pack pack --configfile configs/x.yaml --out FOLDER [--students] [--pairs]
    python -m tools.pack pack --configfile configs/x.yaml --out FOLDER --images
    python -m tools.pack unpack FOLDER... [--configfile configs/x.yaml] [--allow-commits]

A pack is a folder of files of at most 15 MB (`tools.container`). It holds what is finished: the
records, the teachers' weights, trained feature networks, scores, the samples of the figures, the
logs of trainings, and the report if it is complete. A run that is trained and not
scored yet comes with the weights of all its snapshots. `--students` adds the weights of each scored
run's last and selected snapshot, in the precision in which they were scored (bfloat16 as
`diffusion_pytorch_model.bf16.safetensors`, which diffusers reads as `variant="bf16"`). `--pairs`
adds teacher pairs. Otherwise they are generated again where a student still needs them, and packed
only if another run was trained on them, so that both use the same. `--images` packs the prepared
data set instead, as lossless WebP mosaics.

Unpacking joins packs with each other and with the results that exist. All packs must be of the same
configuration, code and data. Files that exist with the same content are left alone. Anything that
exists with another content is a conflict: nothing is written then. Tables, figures and the page are
not compared, but written again by `python -m harness report` after runs were added.

All files of one call get the same modification time, so that none is newer than another: Snakemake
and `tools.slice` repeat no stage because of the order in which files arrive. Snakemake repeats
stages if a source (a method's file, or a local `data.source`) is newer; `snakemake --touch` marks
everything as up to date.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from harness.config.experiment import Experiment
from harness.errors import UserError
from harness.io.artifacts import (
    digest,
    load_tensors,
    read_json,
    save_tensors,
    sha256_file,
    size_text,
)
from harness.io.records import DataRecord, ScoreRecord, StudentRecord
from harness.networks import WEIGHTS
from harness.validation import load_experiment
from harness.workflow.stages import Stage, all_stages, read, unfinished
from tools.container import HISTORY, MANIFEST, Entry, Manifest, Mosaic, write_parts
from tools.merge import code_facts, read_origins, unpack
from tools.mosaics import encode

BF16_WEIGHTS = "diffusion_pytorch_model.bf16.safetensors"


class Selection:
    """The files of a results folder that go into a pack. files: path in the pack -> file."""

    def __init__(self, experiment: Experiment, students: bool = False, pairs: bool = False):
        self.experiment, self.root = experiment, experiment.paths.root
        self.students, self.pairs = students, pairs
        self.files: dict[str, Path] = {}
        self.links: dict[str, str] = {}
        self.devices: dict[str, str] = {}
        self.stages: list[str] = []
        self._converted = Path(tempfile.mkdtemp(prefix="onestep-pack-"))

    def __enter__(self) -> "Selection":
        self._all = stages = all_stages(self.experiment)
        self._todo = set(unfinished(stages))
        for name, stage in stages.items():
            if set(stage.needs) <= {*self.stages} and stage.is_current() and self._add(stage):
                self.stages.append(name)
        if "data" in self.stages and (self.root / HISTORY).exists():
            self._file(self.root / HISTORY)
        return self

    def __exit__(self, *_) -> None:
        shutil.rmtree(self._converted, ignore_errors=True)

    def _file(self, path: Path) -> None:
        """Add a file, or a link with all files that it leads to."""
        name = path.relative_to(self.root).as_posix()
        if not path.is_symlink():
            self.files[name] = path
            return
        target = Path(os.path.normpath(path.parent / os.readlink(path)))
        self.links[name] = target.relative_to(self.root).as_posix()
        for file in sorted(target.rglob("*")) if target.is_dir() else [target]:
            if file.is_file():
                self.files[file.relative_to(self.root).as_posix()] = file

    def _add(self, stage: Stage) -> bool:
        """Add the files of a finished stage; False if it is left out."""
        command, folder = stage.command, stage.record.parent
        if command == "data":
            for path in (stage.record, *sorted(folder.glob("*.txt"))):
                self._file(path)
        elif command in ("features", "teacher"):
            # References are features of real images, which any machine computes again.
            for path in sorted(folder.iterdir()):
                if path.name.startswith((".", "reference-")):
                    continue
                if path.is_symlink() or (path.is_file() and path.name != "failure.json"):
                    self._file(path)
            for path in sorted(folder.glob("text/**/*")):  # embeddings of prompts
                if path.is_file() and not path.name.startswith("."):
                    self._file(path)
            self._training(stage)
        elif command == "pairs":
            return self._add_pairs(stage)
        elif command in ("train", "import-student"):
            self._add_run(stage)
        elif command in ("score", "score-references"):
            self._add_scores(stage)
        elif command == "agreement":
            for path in sorted(folder.glob("agreement.*")):
                self._file(path)
        else:
            for name in read_json(stage.record)["outputs"]:
                self._file(self.root / name)
            self._file(stage.record)
        return True

    def _training(self, stage: Stage) -> None:
        """Add the log of a training, and note its device."""
        record = read_json(stage.record)
        if record.get("run_id"):
            folder = stage.record.parent / "runs" / record["run_id"]
            for name in ("train.csv", "devices.json", "contended"):
                if (folder / name).is_file():
                    self._file(folder / name)
        if device := record.get("device_name") or record.get("device"):
            self.devices[stage.name] = device

    def _add_pairs(self, stage: Stage) -> bool:
        """Add the record of a pair set, and its files with `--pairs`, or if some of its students
        are trained and others are not. If none is, it is left out, and generated again."""
        folder, files = stage.record.parent, []
        readers = {name for name, other in self._all.items() if stage.name in other.needs}
        needed, used = readers & self._todo, readers - self._todo
        if stage.has_files() and (self.pairs or (needed and used)):
            run = folder / read_json(stage.record)["run_id"]
            files = [path for path in sorted(run.iterdir()) if path.is_file()]
        elif needed and not used:
            return False
        for path in (stage.record, *(p for p in files if not p.name.startswith("."))):
            self._file(path)
        return True

    def _add_run(self, stage: Stage) -> None:
        record, folder = StudentRecord.read(stage.record), stage.record.parent
        self._file(stage.record)
        self._training(stage)
        unscored = f"score {' '.join(stage.arguments)}" in self._todo
        weights = self._packed_weights(stage) if self.students else set()
        for snapshot in record.snapshots:
            run = folder / "runs" / record.run_id / "snapshots" / snapshot.name
            for path in sorted(run.iterdir()):
                if path.name == WEIGHTS and unscored:
                    self._file(path)  # as they are: the score checks their hash
                elif path.name == WEIGHTS and snapshot.name in weights:
                    self._add_weights(path)
                elif path.is_file() and path.name not in (WEIGHTS, BF16_WEIGHTS):
                    self._file(path)
        for name in ("model", "snapshots", "train.csv"):
            path = folder / name
            if path.is_symlink():
                target = Path(os.path.normpath(path.parent / os.readlink(path)))
                self.links[path.relative_to(self.root).as_posix()] = target.relative_to(
                    self.root
                ).as_posix()

    def _packed_weights(self, stage: Stage) -> set[str]:
        """Names of a run's last and selected snapshots, which `harness prune` keeps, too."""
        record, (student, seed) = StudentRecord.read(stage.record), stage.arguments
        scores = read(ScoreRecord, self.experiment.paths.scores(student, int(seed)))
        selected = {entry.snapshot for entry in scores.entries if entry.selected} if scores else {}
        return {record.snapshots[-1].name, *selected}

    def _add_weights(self, path: Path) -> None:
        if self.experiment.evaluation.precision == "fp32":
            return self._file(path)
        name = path.with_name(BF16_WEIGHTS).relative_to(self.root).as_posix()
        converted = self._converted / digest(name)
        tensors = load_tensors(path).items()
        halves = {k: t.bfloat16() if t.is_floating_point() else t for k, t in tensors}
        save_tensors(converted, halves)
        self.files[name] = converted

    def _add_scores(self, stage: Stage) -> None:
        scores = ScoreRecord.read(stage.record)
        names = [file.file for file in (scores.samples, scores.per_image) if file is not None]
        if scores.kept is not None and "agreement" in self._todo:
            names.append(scores.kept.file)  # only the comparison with other libraries reads it
        for path in (stage.record, *map(stage.record.with_name, names)):
            self._file(path)


def write_pack(experiment: Experiment, out: Path, images: bool, students: bool, pairs: bool) -> str:
    """Write a pack to a new folder; returns a line for the user."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out: {out} exists and is not an empty folder; name a new one", "exists")
    data = read(DataRecord, experiment.paths.data / "data.json")
    if data is None:
        raise UserError(f"{experiment.paths.root} has no prepared data to pack", "missing-file")
    facts = {"experiment": experiment.raw, "code": code_facts(), "data": data.sha256}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pack-", dir=out.parent) as temporary:
        folder = Path(temporary)
        if images:
            manifest = _pack_images(experiment, folder, facts)
        else:
            with Selection(experiment, students, pairs) as selected:
                files, parts = write_parts(folder, selected.files)
                chosen = {name: getattr(selected, name) for name in ("links", "devices", "stages")}
            origins = read_origins(experiment.paths.root)
            made = {"files": files, "parts": parts, "origins": origins} | chosen
            manifest = Manifest(kind="results", **facts, **made)
        manifest.write(folder / MANIFEST)
        out.mkdir(exist_ok=True)
        for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):
            os.replace(path, out / path.name)
    sizes = [path.stat().st_size for path in out.iterdir()]
    what = "images" if images else f"{len(manifest.stages)} stages"
    return f"{out}: {what} in {len(sizes)} files, {size_text(sum(sizes))}"


def _pack_images(experiment: Experiment, folder: Path, facts: dict) -> Manifest:
    """The shards of the prepared data set: pictures of the pixels, everything else as it is."""
    root, files, shards, mosaics = experiment.paths.root, {}, {}, []
    paths = sorted(path for path in (root / "data").rglob("*") if path.is_file())
    with tempfile.TemporaryDirectory(prefix="onestep-pack-") as temporary:
        for path in (path for path in paths if not path.name.startswith(".")):
            name = path.relative_to(root).as_posix()
            if path.suffix != ".safetensors":
                files[name] = path
                continue
            rest = {}
            for tensor_name, tensor in load_tensors(path).items():
                shape = list(tensor.shape)
                if not (len(shape) == 4 and len(tensor) and shape[1] in (1, 3)):
                    rest[tensor_name] = tensor
                    continue
                for first, count, content in encode(tensor.numpy()):
                    file = f"mosaic-{len(mosaics):03d}.webp"
                    (folder / file).write_bytes(content)
                    entry = {"size": len(content), "sha256": sha256_file(folder / file)}
                    where = {"shard": name, "tensor": tensor_name, "first": first}
                    mosaics.append(Mosaic(file=file, shape=[count, *shape[1:]], **entry, **where))
            shards[name] = Entry(size=path.stat().st_size, sha256=sha256_file(path))
            stored = Path(temporary) / f"{len(shards)}.safetensors"
            save_tensors(stored, rest)
            files[f"{name}.rest"] = stored
        if not shards:
            raise UserError(f"{root / 'data'} has no images to pack", "no-images")
        entries, parts = write_parts(folder, files)
    made = {"files": entries, "parts": parts, "shards": shards, "mosaics": mosaics}
    return Manifest(kind="images", **facts, **made)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools.pack", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    pack = commands.add_parser("pack", help="write a pack")
    pack.add_argument("--configfile", type=Path, required=True, help="experiment file")
    pack.add_argument("--out", type=Path, required=True, help="new folder")
    pack.add_argument("--images", action="store_true", help="the data set instead of results")
    pack.add_argument("--students", action="store_true", help="with the weights of students")
    pack.add_argument("--pairs", action="store_true", help="with teacher pairs")
    join = commands.add_parser("unpack", help="join packs, and the results that exist")
    join.add_argument("folders", type=Path, nargs="+")
    join.add_argument("--configfile", type=Path, help="default: the configuration in the pack")
    join.add_argument("--allow-commits", action="store_true", help="join results of other code")
    args = parser.parse_args(argv)
    try:
        if args.command == "pack":
            experiment = load_experiment(args.configfile, files=False)
            print(write_pack(experiment, args.out, args.images, args.students, args.pairs))
        else:
            print(unpack(args.folders, args.configfile, args.allow_commits))
    except (UserError, OSError) as error:  # such as a full disk or a read-only folder
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
