"""Files written whole or not at all, and checkpoints: written, read, and matched to a run."""
import contextlib
import io
import os
import pickle
import re
import secrets
import shutil
import tempfile
import zipfile
from pathlib import Path

import torch

from configurator import configure, drop_retired, explained, fail, say

CONTENT = {"method": str, "config": dict, "model_args": dict, "picture_shape": tuple,
           "data": dict, "iteration": int, "losses": torch.Tensor, "model": dict, "ema": dict,
           "optimizer": dict, "scaler": dict}
WRITTEN = r"ckpt\.pt|ckpt-previous\.pt|log\.csv|sample-\d+\.png"   # what a run leaves in its folder
LATER = {"seconds": 0.0, "limits": {}, "means": None, "early": {}}      # newer than CONTENT


@contextlib.contextmanager
def atomic_write(path):
    """A binary file that replaces path once it is completely written, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")   # each writer's own
    try:
        with open(temporary, "xb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def backup_path(path):
    """Where the checkpoint before the one at path is kept."""
    return path.with_stem(f"{path.stem}-previous")


def holds_a_run(folder):
    """Is there a checkpoint in the folder?"""
    return any(Path(folder).glob("ckpt*.pt"))


def require_free_folder(folder, overwrite=False):
    """Calls fail() if a run in the folder would replace another one, or files that no run wrote."""
    with explained(f"--out_dir={folder}: "):
        existing = next(p for p in (Path(folder), *Path(folder).absolute().parents) if p.exists())
        if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
            fail(f"--out_dir={folder}: {existing} is not a folder that can be written to")
        log, runs = Path(folder, "log.csv"), holds_a_run(folder)
        if runs and not overwrite:
            fail(f"{folder} holds a run: continue it with --init_from=resume, "
                 "or add --overwrite or another --out_dir")
        if runs or log.is_file() and log.read_text(errors="replace").startswith("iteration,loss,"):
            return
        others = [path.name for path in Path(folder).glob("*") if re.fullmatch(WRITTEN, path.name)]
        if others:
            fail(f"{folder} holds files that a run would replace, such as {min(others)}: "
                 "choose another --out_dir")


def require_room(folder, needed):
    """Make a folder of data_dir; calls fail() if it is read-only, or has too few bytes free."""
    with explained(f"--data_dir: {Path(folder).resolve()} cannot be written to: ", OSError):
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    free = shutil.disk_usage(folder).free
    if free < needed:
        fail(f"--data_dir: {Path(folder).resolve()} has {free / 1e6:.0f} MB free, but "
             f"{needed / 1e6:.0f} are needed: make room, or choose another --data_dir")


def save_checkpoint(path, **content):
    """Write tensors and plain values, whole or not at all; the older file goes to backup_path()."""
    for name in {"model", "ema", "early"} & content.keys():     # contiguous, as others expect
        content[name] = {key: v.contiguous() if torch.is_tensor(v) else v
                         for key, v in content[name].items()}
    buffer = io.BytesIO()                            # on a full disk torch.save() may abort the run
    torch.save(content, buffer)
    with atomic_write(path) as f:
        f.write(buffer.getbuffer())
        f.flush()
        os.fsync(f.fileno())                         # only now may the older one be replaced
        if path.exists():
            kept = Path(f"{backup_path(path)}.tmp")
            kept.unlink(missing_ok=True)
            try:
                os.link(path, kept)                  # not moved: path must exist at all times
            except OSError:                          # a file system without hard links
                shutil.copyfile(path, kept)
            os.replace(kept, backup_path(path))


def in_half(state):
    """A copy of a state dict on the CPU, with the floating-point tensors in float16 that fit."""
    def half(v):
        if not torch.is_tensor(v):                   # a module's extra state
            return v
        fits = v.is_floating_point() and not (v.abs() > 65504).any()
        return v.to("cpu", torch.float16 if fits else v.dtype, copy=True)

    return {name: half(v) for name, v in state.items()}


def load_checkpoint(path, method=None):
    """
    What save_checkpoint() wrote, on the CPU. Nothing in the file is executed.

    Its limits, in the form that configure() takes, hold for the options of sample.py. Calls fail()
    if it is not a whole checkpoint, or one of another method.
    """
    try:
        with zipfile.ZipFile(path) as file:              # torch.load() verifies no checksums,
            folders = [entry.filename for entry in file.infolist() if entry.external_attr & 0x10]
            if damaged := folders or file.testzip():     # and reads entries marked folders as empty
                raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if type(checkpoint) is not dict or not all(isinstance(checkpoint.get(name), kind)
                                                   for name, kind in CONTENT.items()):
            raise ValueError("it was not written by this program")
    except Exception as e:                           # a damaged file raises almost anything
        reason = " ".join(str(e).split())[:100]
        if isinstance(e, pickle.UnpicklingError):    # torch's message says how to unpickle it
            reason = "it is damaged, or holds more than tensors and plain values"
        message = f"there is no valid checkpoint {path} ({reason})"
        backup = backup_path(path)
        if backup.exists():
            message = f"{message}; to use the previous one: mv {backup} {path}"
        fail(message)
    if method and not checkpoint["model"]:
        fail(f"{path} holds only averaged weights: it can be sampled, not resumed")
    if checkpoint["method"] != (method or checkpoint["method"]):
        fail(f"{path} is a run of {checkpoint['method']}.py: resume it with that, "
             "or choose another --out_dir")
    for name in ("config", "model_args"):
        if "patch" in checkpoint[name]:              # older runs had no such option
            checkpoint[name] = {"norm_groups": 8} | checkpoint[name]
    for name in ("config", "model_args", "data"):
        checkpoint[name] = drop_retired(path, checkpoint[name])
    return LATER | checkpoint


def resume(settings, limits, fixed, checkpoint):
    """
    configure() for a resumed run: its saved options, overridden by those given now.

    Some options hold for one command only. Prints what has changed. Calls fail() if one of
    those in fixed has, or if nothing is left to do.
    """
    once = "init_from", "out_dir", "overwrite", "changed_data", "minutes"
    saved, it = checkpoint["config"], checkpoint["iteration"]
    config = configure(settings, limits, saved={k: v for k, v in saved.items() if k not in once})
    for name, value in config.items():
        before = saved.get(name, value)
        if value != before and name in fixed:
            fail(f"--{name}={value}: the run in {config['out_dir']} has {before}, for good")
        if value != before and name not in once:
            say(f"resuming with {name} = {value}, which was {before}")
    if it >= config["max_iters"] and config["minutes"]:
        settings["max_iters"] = config["max_iters"] = 2 * it     # until the clock sets it
    elif it >= config["max_iters"]:
        fail(f"the run in {config['out_dir']} is complete at iteration {it}: "
             f"to train longer, add --max_iters={2 * it}")
    return config


def require_same_data(checkpoint, dataset, data, model_args, changed_data):
    """Calls fail() if the data do not fit the run's model, or differ without changed_data."""
    changed = data.differences(checkpoint["data"])
    same_classes = checkpoint["data"].get("classes", []) == data.classes   # embeddings are numbered
    if checkpoint["model_args"] != model_args or not same_classes:
        fail(f"--dataset={dataset} does not fit the run's model ({changed or 'other options'}): "
             "give the run's own data, or start a new run in another --out_dir")
    if changed and not changed_data:
        fail(f"--dataset={dataset} is not the data that the run was trained on ({changed}): "
             "give the path to those, or add --changed_data to use these")


def restore(checkpoint, **parts):
    """Load the state of each part, such as model=model, from the checkpoint entry of that name."""
    with explained("the checkpoint is from another version of this program: "):
        for name, part in parts.items():
            if name != "scaler" or checkpoint[name]:  # a scaler's is empty without float16
                part.load_state_dict(checkpoint[name])


def load_start(init_from, method, out_dir, overwrite=False):
    """
    The checkpoint that a run of the method begins with: None for "scratch", its own for "resume".

    Otherwise init_from is the folder of another run. Calls fail() if there is none, or if the new
    run would overwrite that one, or without overwrite any other.
    """
    if init_from == "resume":
        return load_checkpoint(Path(out_dir, "ckpt.pt"), method)
    if init_from == "scratch":
        require_free_folder(out_dir, overwrite)
        return None
    if not holds_a_run(init_from):
        fail(f"--init_from={init_from} is neither scratch nor resume, nor the folder of a run")
    if Path(init_from).resolve() == Path(out_dir).resolve():
        fail(f"--init_from={init_from} is also the --out_dir: choose another --out_dir")
    checkpoint = load_checkpoint(Path(init_from, "ckpt.pt"))
    if checkpoint["method"] != method:
        fail(f"--init_from={init_from} is a run of {checkpoint['method']}.py, not of {method}.py")
    require_free_folder(out_dir, overwrite)
    return checkpoint


def take_weights(model, start, folder, config, names, classes):
    """
    Start from the averaged weights of the run in folder, given its checkpoint.

    A class keeps the label embedding of its name. New classes, and layers that the run lacks, are
    left alone, and listed; so are the run's options among names that differ from config's.
    """
    old = {name: start["config"].get(name, config[name]) for name in names}
    other = [f"--{name}={old[name]}" for name in names if old[name] != config[name]]
    trained = f"; it was trained with {' '.join(other)}" if other else ""
    own, weights, before = model.state_dict(), dict(start["ema"]), start["data"]["classes"]
    labels, table = (state.get("label.weight") for state in (weights, own))
    if classes != before and labels is not None and len(labels) == 1 + len(before):
        if table is None:
            del weights["label.weight"]
        elif table.shape == (1 + len(classes), *labels.shape[1:]):
            weights["label.weight"] = table = table.clone()
            row = {name: i for i, name in enumerate([None, *before])}    # None: without a label
            for i, name in enumerate([None, *classes]):
                if name in row:
                    table[i] = labels[row[name]]
    for name, weight in weights.items():
        if name not in own or own[name].shape != weight.shape:
            here = tuple(own[name].shape) if name in own else "not there"
            fail(f"--init_from={folder} has another architecture or other classes: "
                 f"its {name} is {tuple(weight.shape)}, here it is {here}{trained}")
    new = model.load_state_dict(weights, strict=False).missing_keys
    text = f"starting from the weights of {folder}"
    if new:
        text += f", except {', '.join(new)}"
    if classes != before and classes and before:
        known = ", ".join(name for name in classes if name in before) or "none"
        fresh = ", ".join(name for name in classes if name not in before) or "none"
        text += f"; classes it knows: {known}; new ones: {fresh}"
    say(text + trained)
