"""Where an experiment's files lie under results/."""

from pathlib import Path


class Paths:
    """Folders and files of one experiment; `root` is results/<experiment>."""

    def __init__(self, root: Path):
        self.root = root
        self.data, self.logs = root / "data", root / "logs"
        self.tables, self.figures = root / "tables", root / "figures"

    def features(self, name: str) -> Path:
        return self.root / "features" / name

    def teacher(self, name: str) -> Path:
        return self.root / "teachers" / name

    def pairs(self, name: str) -> Path:
        return self.root / "pairs" / name

    def run(self, student: str, seed: int) -> Path:
        return self.root / "students" / student / f"seed{seed}"

    def scores(self, student: str, seed: int) -> Path:
        """The score file of a run."""
        return self.root / "scores" / student / f"seed{seed}.json"

    def reference_scores(self, teacher: str) -> Path:
        """The score file of a teacher and of the floor."""
        return self.root / "scores" / "teachers" / f"{teacher}.json"

    def snapshot(self, digest: str) -> Path:
        """The resolved configuration that jobs read."""
        return self.root / "config" / f"{digest}.json"
