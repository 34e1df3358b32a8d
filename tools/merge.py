"""Join packs (`tools.pack`) with each other and with the results of an experiment that exist."""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import harness
from harness.config.experiment import Experiment
from harness.errors import UserError
from harness.io.artifacts import (
    digest,
    link,
    load_tensors,
    read_json,
    save_tensors,
    sha256_file,
    write_json,
)
from harness.io.records import DataRecord
from harness.reporting.collect import flatten
from harness.reporting.manifest import ORIGINS, commit_and_changes
from harness.validation import load_experiment, parse_experiment
from harness.workflow.stages import all_stages, read, unfinished
from tools.container import FOLDERS, HISTORY, MANIFEST, Entry, Pack
from tools.mosaics import decode

MACHINE_KEYS = ("device", "processes")  # of an experiment; they may differ between machines
SHOWN = 5  # conflicts in a message


def code_facts() -> dict[str, Any]:
    """The commit, whether files were changed since, and a hash of all Python sources."""
    root = Path(harness.__file__).parent.parent
    files = sorted(path for part in ("harness", "methods") for path in (root / part).rglob("*.py"))
    sources = {path.relative_to(root).as_posix(): sha256_file(path) for path in files}
    commit, dirty = commit_and_changes()
    return {"commit": commit, "dirty": dirty, "sha256": digest(sources)}


def read_origins(root: Path) -> list[dict]:
    """The packs that were unpacked into a results folder."""
    path = root / ORIGINS
    return read_json(path, owner=path) if path.exists() else []


def is_derived(path: str) -> bool:
    """Whether a file is written from scores by the report (or by the comparison of libraries)."""
    return path.split("/")[0] in ("tables", "figures", "report.html", "manifest.json")


def is_agreement(path: str) -> bool:
    """Whether a file is a table of the comparison with other libraries."""
    return path.startswith("tables/agreement.")


def comparable(raw: dict) -> dict:
    """A configuration without the keys of the machine."""
    return {key: value for key, value in raw.items() if key not in MACHINE_KEYS}


def check_alike(packs: list[Pack], experiment: Experiment, allow_commits: bool) -> None:
    """Raise a `UserError` unless the packs and the results that exist are of one configuration, one
    data set and one code. allow_commits: the code may differ."""
    ours = flatten(comparable(experiment.raw))
    record = read(DataRecord, experiment.paths.data / "data.json")
    data = {f"{experiment.paths.root}": record.sha256} if record else {}
    codes = {"this checkout": code_facts()}
    for origin in read_origins(experiment.paths.root):
        codes[f"a pack unpacked before ({origin['pack'][:8]})"] = origin["code"]
    for pack in packs:
        theirs = flatten(comparable(pack.manifest.experiment))
        keys = dict.fromkeys([*ours, *theirs])
        if different := [key for key in keys if ours.get(key) != theirs.get(key)]:
            values = (json.dumps(side.get(different[0])) for side in (theirs, ours))
            message = "{}: {} is {}, not {}: another configuration"
            raise UserError(message.format(pack.folder, different[0], *values), "configuration")
        data[str(pack.folder)] = pack.manifest.data
        codes[str(pack.folder)] = pack.manifest.code.model_dump()
    (first, sha256), *others = data.items()
    for name, other in others:
        if other != sha256:
            message = f"{name} and {first} have different data sets ({other} and {sha256})"
            raise UserError(message, "data")
    (first, code), *others = codes.items()
    for name, other in others:
        commits = {code["commit"], other["commit"]} - {None}
        if not allow_commits and (len(commits) == 2 or code["sha256"] != other["sha256"]):
            message = f"{first} is of {_code_text(code)}, and {name} of {_code_text(other)}"
            raise UserError(f"{message}; to join them nevertheless, add --allow-commits", "commit")


def _code_text(code: dict) -> str:
    changes = ", modified" * bool(code["dirty"])
    return f"commit {code['commit'] or 'unknown'}{changes} (sources {code['sha256']})"


class Unpacking:
    """Packs that become one results folder."""

    def __init__(self, packs: list[Pack], root: Path):
        self.packs, self.root = packs, root
        # A report is used as it is, or not at all: its parts must belong together.
        with_report = [pack for pack in packs if "manifest.json" in pack.manifest.files]
        self._report = next(iter(with_report), None)
        if self._report is not None:
            parts = filter(is_derived, self._report.manifest.files)
            if any((root / path).exists() for path in parts if not is_agreement(path)):
                self._report = None
        self._histories: list[dict] = []

    def _files(self, pack: Pack) -> Iterator[tuple[str, Entry]]:
        """The files of a pack that may be written, without those of an outdated report."""
        for path, entry in (pack.manifest.files | pack.manifest.shards).items():
            if path == HISTORY or path.endswith(".rest"):
                continue
            if is_derived(path) and not is_agreement(path) and pack is not self._report:
                continue
            yield path, entry

    def check(self) -> None:
        """Raise a `UserError` (code "conflict") if a file or link exists with another content, in
        the folder or in two packs; and if a folder below the results is a link."""
        found: dict[str, str] = {}  # path -> sha256, of the packs so far
        links: dict[str, str] = {}
        conflicts: dict[str, list[str]] = {}
        self.new: dict[str, Pack] = {}
        self.new_links: dict[str, str] = {}
        for pack in self.packs:
            for path, entry in self._files(pack):
                target = self.root / path
                self._check_folders(target)
                known = found.setdefault(path, entry.sha256)
                exists = target.is_symlink() or target.exists()
                same = known == entry.sha256
                if exists and same:
                    same = target.is_file() and not target.is_symlink()
                    same = same and sha256_file(target) == entry.sha256
                if not same and not is_derived(path):
                    conflicts.setdefault(_result(path), []).append(path)
                elif not exists:
                    self.new.setdefault(path, pack)
            for path, leads_to in pack.manifest.links.items():
                target = self.root / path
                self._check_folders(target)
                same = links.setdefault(path, leads_to) == leads_to
                if target.is_symlink():
                    expected = os.path.relpath(self.root / leads_to, target.parent)
                    same = same and os.readlink(target) == expected
                elif target.exists():
                    same = False
                else:
                    self.new_links[path] = leads_to
                if not same:
                    conflicts.setdefault(_result(path), []).append(path)
        if conflicts:
            names = [f"{name} ({', '.join(files[:2])})" for name, files in conflicts.items()]
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            message = f"{', '.join(names[:SHOWN])}{more}: exists with another content; nothing was "
            message += "written. Leave out one of the packs, or delete the result that you do not "
            raise UserError(f"{message}need from {self.root}", "conflict")

    def _check_folders(self, target: Path) -> None:
        for folder in target.parents:
            if folder == self.root:
                return
            if folder.is_symlink():
                raise UserError(f"{folder} is a link; nothing is written behind it", "unsafe")

    def write(self) -> None:
        """Write the new files, records last, and give them one modification time."""
        self.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unpack-", dir=self.root) as temporary:
            staged = Path(temporary)
            for number, pack in enumerate(self.packs):
                self._stage(pack, staged / str(number))
            now = time.time()
            for path in sorted(self.new, key=_order):
                source = staged / str(self.packs.index(self.new[path])) / path
                os.utime(source, (now, now))
                target = self.root / path
                target.parent.mkdir(parents=True, exist_ok=True)
                if path.endswith(".json"):
                    self._links_of(target.parent)
                os.replace(source, target)
            for path in list(self.new_links):
                self._link(path)
        self._join_history()

    def _links_of(self, folder: Path) -> None:
        for path in [p for p in self.new_links if (self.root / p).parent == folder]:
            self._link(path)

    def _link(self, path: str) -> None:
        link(self.root / path, self.root / self.new_links.pop(path))

    def _stage(self, pack: Pack, folder: Path) -> None:
        """Extract a pack's new files, and rebuild its shards, in a temporary folder."""
        wanted = {path for path, owner in self.new.items() if owner is pack}
        shards = wanted & pack.manifest.shards.keys()
        wanted |= {f"{name}.rest" for name in shards} | {HISTORY}
        pack.extract(lambda path: folder / path if path in wanted else None)
        for name in shards:
            rebuild(pack, name, folder)
        if (folder / HISTORY).exists():
            self._histories.append(read_json(folder / HISTORY))

    def _join_history(self) -> None:
        path = self.root / HISTORY
        if not self._histories:
            return
        joined = read_json(path, owner=path) if path.exists() else {"work": {}, "runs": []}
        for other in self._histories:
            joined["work"] = other.get("work", {}) | joined["work"]
            joined["runs"] += [run for run in other.get("runs", []) if run not in joined["runs"]]
        write_json(path, joined)


def _order(path: str) -> tuple:
    """Order of writing. A record says that its stage is complete, so it comes after the files that
    it names, and after the records of earlier stages: an interrupted call can be repeated."""
    top = path.split("/")[0]
    return path.endswith(".json"), FOLDERS.index(top) if top in FOLDERS else len(FOLDERS), path


def _result(path: str) -> str:
    """The result that a file belongs to: `students/sid/seed0`, `teachers/edm`, `scores/sid`."""
    parts = path.split("/")
    return "/".join(parts[: 3 if parts[0] == "students" else 2])


def rebuild(pack: Pack, name: str, folder: Path) -> None:
    """Rebuild a shard of images from its mosaics; its bytes must be those that were packed."""
    tensors = load_tensors(folder / f"{name}.rest")
    (folder / f"{name}.rest").unlink()
    parts: dict[str, list] = {}
    mosaics = [mosaic for mosaic in pack.manifest.mosaics if mosaic.shard == name]
    for mosaic in sorted(mosaics, key=lambda mosaic: (mosaic.tensor, mosaic.first)):
        content = (pack.folder / mosaic.file).read_bytes()
        images = decode(content, tuple(mosaic.shape), pack.folder / mosaic.file)
        parts.setdefault(mosaic.tensor, []).append(torch.from_numpy(images))
    tensors |= {tensor: torch.cat(images) for tensor, images in parts.items()}
    if save_tensors(folder / name, tensors) != pack.manifest.shards[name].sha256:
        message = f"{name} could not be rebuilt from the mosaics bit for bit"
        raise UserError(f"{pack.folder}: {message}", "damaged")


def unpack(folders: list[Path], configfile: Path | None, allow_commits: bool) -> str:
    """Verify packs, and join them with each other and with the results that exist; returns a line
    for the user. Nothing is written if there is an error."""
    packs = [Pack(folder) for folder in folders]
    if configfile is not None:
        experiment = load_experiment(configfile, files=False)
    else:
        if packs[0].manifest.experiment.get("plugins"):  # code is not run because a pack names it
            message = "its configuration names plug-ins; give your own with --configfile"
            raise UserError(f"{folders[0]}: {message}", "plugins")
        source = str(folders[0] / MANIFEST)
        experiment = parse_experiment(packs[0].manifest.experiment, source, files=False)
    check_alike(packs, experiment, allow_commits)
    for pack in packs:
        pack.verify()
    root = experiment.paths.root
    work = Unpacking(packs, root)
    work.check()
    existed = sum(len(list(work._files(pack))) for pack in packs) - len(work.new)
    work.write()
    origins = read_origins(root)
    for pack in packs:
        manifest = pack.manifest
        facts = {"pack": sha256_file(pack.folder / MANIFEST), "code": manifest.code.model_dump()}
        facts |= {"devices": manifest.devices, "stages": manifest.stages}
        earlier = [origin.model_dump() for origin in manifest.origins]
        origins += [o for o in (*earlier, facts) if o not in origins]
    write_json(root / ORIGINS, origins)
    remaining = unfinished(all_stages(experiment))
    left = f"; {len(remaining)} stages remain: {', '.join(remaining)}" if remaining else ""
    return f"{root}: {len(work.new)} new files, {existed} existed{left}"
