"""Checkpoint folders: written completely or not at all, found, loaded, exported, inherited from."""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from command import DISK_FULL, UserError, first_line, sync_to_disk, writable_folder, write_text

_STEP_NAME = re.compile(r"step_(\d+)(\.replaced)?")
_TEMPORARY = ".tmp-"


@dataclass
class Checkpoint:
    """A loaded checkpoint folder. `trainer` and `tokenizer` are None where it holds none."""

    path: Path
    step: int
    config: dict
    tensors: dict[str, Tensor]
    trainer: dict | None
    tokenizer: str | None


def save_checkpoint(run_dir: str | Path, step: int, config: dict, tensors: dict, trainer=None,
                    tokenizer=None, keep_last: int = 3, best: bool = False) -> Path:  # fmt: skip
    """Write `run_dir/step_00001000/` and drop all but the last `keep_last` and the best one.

    Files go to a temporary folder, are synced and then renamed: a kill at any moment leaves the
    earlier checkpoints complete. `trainer`: a dict of plain containers, numbers, strings, tensors,
    which load without pickled code; `tokenizer`: JSON of the `tokenizers` library; `best` is noted
    in `best.json`. Raises UserError on a full disk, TypeError for a bad `trainer`."""
    run_dir = Path(run_dir)
    final = run_dir / f"step_{step:08d}"
    with _temporary(run_dir, final) as temporary:
        _write_files(temporary, step, config, tensors, trainer, tokenizer)
        _publish(temporary, final)
        if best:
            write_text(run_dir / "best.json", json.dumps({"checkpoint": final.name}))
    _prune(run_dir, final, keep_last)
    return final


def save_export(folder, step: int, config: dict, tensors: dict, tokenizer=None) -> Path:
    """Write a shipped folder; other files there (a model card) stay. UserError on a full disk."""
    folder = Path(folder)
    with _temporary(folder, folder) as temporary:
        _write_files(temporary, step, config, tensors, None, tokenizer)
        for file in temporary.iterdir():
            os.replace(file, folder / file.name)
        sync_to_disk(folder)
    return folder


@contextlib.contextmanager
def _temporary(parent: Path, final: Path) -> Iterator[Path]:
    """A folder within `parent` to write to, gone afterwards; a full disk is a UserError."""
    temporary = parent / f"{_TEMPORARY}{final.name}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(parent)
        temporary.mkdir()
        yield temporary
    except Exception as error:
        if not _is_disk_full(error):
            raise
        state = "there is no earlier checkpoint"
        with contextlib.suppress(UserError):
            state = f"the last complete checkpoint, {find_checkpoint(parent)}, is kept"
        full = f"{final}: the disk is full, this checkpoint was not saved; {state}"
        raise UserError(f"{full}; free some space") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def to_export(args: argparse.Namespace) -> Checkpoint:
    """The run's newest checkpoint. Raises UserError where `--export` cannot write, or would into
    the run's own folder, whose steps a shipped model would hide."""
    export, run_dir = (Path(path).resolve() for path in (args.export, args.checkpoint_dir))
    if export == run_dir or run_dir in export.parents or any(export.glob("step_*")):
        raise UserError(f"--export {args.export}: is a run's folder; export into another one")
    checkpoint = load_checkpoint(args.checkpoint_dir, with_trainer=False)
    writable_folder(export, "--export")
    return checkpoint


def config_of(kind: type, model: str, stored: dict, where: str | Path) -> Any:
    """The config dataclass `kind` that a checkpoint's `config.json` holds. Raises UserError for
    another kind of model, or fields that this version does not know."""
    if stored.get("model") != model:
        raise UserError(f"{where}: holds a {stored.get('model', 'nameless')} model, not a {model}")
    values = {name: value for name, value in stored.items() if name != "model"}
    if unknown := set(values) - {field.name for field in dataclasses.fields(kind)}:
        raise UserError(f"{where}: config has unknown fields: {', '.join(sorted(unknown))}")
    return kind(**values)


def stored_config(model: str, config: object) -> dict:
    """What goes into `config.json`."""
    return {"model": model, **dataclasses.asdict(config)}


def open_run(run_dir: str | Path, model: str, fresh: bool) -> Checkpoint | None:
    """The checkpoint that a run goes on from; None for a new run. Raises UserError where `fresh`
    meets a used folder, or the folder holds another `model`."""
    folder = Path(run_dir)
    if fresh and any(file.name != ".lock" for file in folder.iterdir()):
        raise UserError(f"--fresh: {folder} is not empty; move it away or choose another folder")
    if not any(folder.glob("step_*")):
        return None
    checkpoint = load_checkpoint(folder)
    if checkpoint.config.get("model") != model:
        raise UserError(f"{folder}: holds another model's checkpoints; choose another folder")
    return checkpoint


def fill(model: nn.Module, tensors: dict, path: str | Path, optional: tuple[str, ...] = ()) -> None:
    """The model's weights; only names that end in one of `optional` may lack. UserError: no fit."""
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        odd = [name for name in missing if not name.endswith(optional)] + unexpected
    except RuntimeError as error:
        odd = str(error).splitlines()[-1:]
    if odd:
        raise UserError(f"{path}: weights do not fit the config, first at {odd[0].strip()}")


def inherit_weights(model: nn.Module, path: str | Path, skip: tuple[str, ...] = ()) -> list[str]:
    """Start from another checkpoint's weights where name and shape agree, unless the name starts
    with one of `skip`. Prints how many, returns their names."""
    tensors = load_checkpoint(path, with_trainer=False).tensors
    own = model.state_dict()
    shapes = {name: tensor.shape for name, tensor in own.items() if not name.startswith(skip)}
    fitting = {name: t for name, t in tensors.items() if t.shape == shapes.get(name)}
    if not fitting:
        raise UserError(f"--init_from {path}: no tensor fits; give a checkpoint of the same model")
    model.load_state_dict(fitting, strict=False)
    print(f"init_from {path}: inherited {len(fitting)} of {len(own)} tensors")
    return list(fitting)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: a run's newest complete step, or, as a step's or a
    shipped folder (config.json and model.safetensors), itself. Raises UserError where none is."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint folder")
    for folder in (path, *reversed(_step_folders(path))):
        if _is_complete(folder):
            return folder
    if (path / "config.json").exists() or (path / "model.safetensors").exists():
        raise UserError(f"{path}: incomplete checkpoint; copy it again or take an earlier step")
    raise UserError(f"{path}: no complete checkpoint here (neither step_* folders nor config.json "
                    "with model.safetensors); train first or give another folder")  # fmt: skip


def load_checkpoint(path: str | Path, with_trainer: bool = True) -> Checkpoint:
    """What `find_checkpoint` finds, on the CPU, no pickled code executed; UserError if damaged."""
    folder, trainer, tokenizer = find_checkpoint(path), None, None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        with safe_open(folder / "model.safetensors", framework="pt") as opened:
            step = int((opened.metadata() or {}).get("step", 0))
        tensors = load_file(folder / "model.safetensors")
        if with_trainer and (folder / "trainer.pt").exists():
            trainer = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
        if (folder / "tokenizer.json").exists():
            tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8")
    except (OSError, ValueError, EOFError, SafetensorError, RuntimeError, KeyError,
            UnpicklingError) as error:  # fmt: skip
        raise UserError(f"{folder}: damaged checkpoint ({first_line(error, 120)}); "
                        "copy it again or take an earlier step") from error  # fmt: skip
    return Checkpoint(folder, step, config, tensors, trainer, tokenizer)


def fingerprint(config: dict, tensors: dict[str, Tensor]) -> str:
    """SHA-256 (hex) over the config's sorted JSON and every tensor's name, dtype, shape, bytes."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _write_files(folder, step, config, tensors, trainer, tokenizer) -> None:
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    # Copied, as safetensors refuses tensors that share memory.
    copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    save_file(copies, folder / "model.safetensors", {"format": "pt", "step": str(step)})
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    if trainer is not None:
        with open(folder / "trainer.pt", "wb") as file:  # whose errors name a full disk
            torch.save(trainer, file)
        # Refused now, not by `weights_only` at load time, after the pod is lost.
        if refused := torch.serialization.get_unsafe_globals_in_checkpoint(folder / "trainer.pt"):
            raise TypeError(f"trainer holds {', '.join(refused)}: store plain values or tensors")
    for file in folder.iterdir():
        sync_to_disk(file)
    sync_to_disk(folder)


def _publish(temporary: Path, final: Path) -> None:
    # A folder cannot be renamed over a full one; find_checkpoint knows the old one's new name too.
    replaced = final.with_name(f"{final.name}.replaced")
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    sync_to_disk(final.parent)
    if replaced.exists():
        _discard(replaced)


def _prune(run_dir: Path, newest: Path, keep_last: int) -> None:
    spared = {newest.name}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        spared.add(json.loads((run_dir / "best.json").read_text(encoding="utf-8"))["checkpoint"])
    for folder in _step_folders(run_dir)[: -max(1, keep_last)]:
        if folder.name not in spared:
            _discard(folder)


def _step_folders(run_dir: Path) -> list[Path]:
    # Oldest first; one that is being replaced before the one that replaces it.
    found = [(_STEP_NAME.fullmatch(f.name), f) for f in run_dir.iterdir() if f.is_dir()]
    return [f for _, _, f in sorted((int(m[1]), m[2] is None, f) for m, f in found if m)]


def _discard(folder: Path) -> None:
    # Renamed first: a kill in mid-removal must not leave a folder that looks complete.
    doomed = folder.with_name(f"{_TEMPORARY}old-{folder.name}")
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _remove_leftovers(run_dir: Path) -> None:
    for leftover in run_dir.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for leftover in run_dir.glob(".*.part"):  # of best.json
        leftover.unlink(missing_ok=True)
    for replaced in run_dir.glob("step_*.replaced"):  # killed while a step was saved again
        standing = replaced.with_suffix("")
        if _is_complete(standing):
            _discard(replaced)
        else:
            shutil.rmtree(standing, ignore_errors=True)
            replaced.rename(standing)


def _is_complete(folder: Path) -> bool:  # all files, at full length
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
        with safe_open(folder / "model.safetensors", framework="pt"):  # checks header and length
            pass
    except (OSError, ValueError, SafetensorError):
        return False
    trainer = folder / "trainer.pt"
    return not trainer.exists() or zipfile.is_zipfile(trainer)


def _is_disk_full(error: BaseException | None) -> bool:
    # safetensors (Rust) and torch.save (C++) wrap the system's error in their own.
    hints = [f"os error {number}" for number in DISK_FULL] + ["No space left"]
    while error is not None:
        if getattr(error, "errno", None) in DISK_FULL or any(h in str(error) for h in hints):
            return True
        error = error.__cause__ or error.__context__
    return False
