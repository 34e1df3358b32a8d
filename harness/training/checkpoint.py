"""Saved training states: `state.json`, and the safetensors file that it names."""

from harness.errors import UserError
from harness.io.artifacts import load_tensors, read_json, save_tensors, write_json
from harness.training.run import TrainingRun

STATE_FORMAT = 2


def save_checkpoint(run: TrainingRun, state: dict) -> None:
    """Write a trainer's `state_dict()` to the run's folder, and delete the previous one last."""
    record, file = dict(state), f"state-{state['step']:08d}.safetensors"
    sha256 = save_tensors(run.folder / file, record.pop("tensors"))
    header = {"format": STATE_FORMAT, "run": run.name, "run_id": run.run_id}
    write_json(run.folder / "state.json", header | {"file": file, "sha256": sha256} | record)
    for old in run.folder.glob("state-*.safetensors"):
        if old.name != file:
            old.unlink()


def load_checkpoint(run: TrainingRun) -> dict | None:
    """Read the saved state, if there is one. A state that is damaged, belongs to another run or has
    another format is a `UserError`."""
    folder, path = run.folder, run.folder / "state.json"
    if not path.exists():
        return None
    state = read_json(path, owner=folder)
    if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
        message = f"{path} was written by another version; delete {folder} to start over"
        raise UserError(message, "format")
    if state["run_id"] != run.run_id:
        other = f"another run ({state['run']}, {state['run_id']})"
        message = f"{path} belongs to {other}; delete {folder} to start {run.name} over"
        raise UserError(message, "other-run")
    file = folder / state["file"]
    return state | {"tensors": load_tensors(file, state["sha256"], run.device, owner=folder)}
