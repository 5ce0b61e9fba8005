"""Checkpoints: written by Orbax in the background, then sealed by a manifest.

`<folder>/<step>/` holds the items `params`, `ema`, `optimizer` and `rest` (step, counters, ...),
each readable alone, and `manifest.json`: the size and SHA-256 of every file, the shape of every
array. Orbax restores a flipped byte in silence; here a checkpoint counts only if its manifest,
written last, is there and agrees with what is on disk.

Every method of `Checkpoints` is to be called by all processes; process 0 seals, judges and deletes.
"""

import concurrent.futures
import contextlib
import functools
import logging
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from pretraining import manifest, processes
from pretraining.errors import UserError
from pretraining.manifest import MANIFEST

_log = logging.getLogger(__name__)

_ITEMS = ("params", "ema", "optimizer")  # fields of the state that are stored apart
_REST = "rest"


class Checkpoints:
    """The checkpoints of one run. Others may look at a live run: only `save`, `retire` and
    `discard_after` change its folder.

    Args:
      folder: where the step folders lie; made by the first save.
      keep: newest checkpoints kept, at least 1.
      keep_every: steps divisible by it are kept for ever; 0 = none.
      retires: whether a save deletes what is too old; otherwise `retire` does.

    Raises:
      UserError: `keep` or `keep_every` is out of range.
    """

    def __init__(self, folder, keep: int, keep_every: int = 0, retires: bool = True):
        from etils import epath

        if keep < 1:
            raise UserError(f"config.checkpoint.keep={keep} is out of range: at least 1")
        if keep_every < 0:
            raise UserError(
                f"config.checkpoint.keep_every={keep_every} is out of range: at least 0"
            )
        self._folder, self._keep, self._keep_every = epath.Path(folder), keep, keep_every
        self._retires = retires
        self._orbax = _checkpointer()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "seal_checkpoint")
        self._sealing: concurrent.futures.Future | None = None
        self._verified: set[int] = set()  # known to agree with their manifests
        self._damaged: set[int] = set()  # known not to; moved out of the way by the next save

    def save(self, step: int, state, notes: dict[str, Any] | None = None) -> None:
        """Starts to write `state`, a dataclass of arrays, as the checkpoint of `step`.

        `notes`, of JSON, are what `self.notes` reads again.

        Returns when the arrays are copied off the device, so that they may be donated; writing,
        hashing and the deletion of old checkpoints go on in the background. Waits for the save
        before it, and raises what went wrong in there. A step that is saved and verified already
        stays as it is.
        """
        import orbax.checkpoint as ocp

        self.wait()
        if processes.agree(lambda: self._is_verified(step)):
            return
        arrays = _by_path(state)
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in _items(arrays).items()}
        with self._failures(step):
            if jax.process_index() == 0:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._set_aside(self._damaged | {step})
            self._damaged = set()
            self._orbax.save(self._folder / str(step), args=ocp.args.Composite(**items))
        shapes = {"/".join(path): _shape(leaf) for path, leaf in arrays.items()}
        self._sealing = self._thread.submit(self._seal, step, shapes, notes or {})

    def newest(self, at_most: int | None = None) -> int | None:
        """The newest step whose checkpoint is whole, and not after `at_most`; None = there is none.

        Newer ones that are not are logged, one line each, and left out from now on; the next
        `save` renames them to `<step>.damaged`.
        """
        self.wait()
        step = processes.agree(lambda: self._newest(at_most))
        return None if step < 0 else step

    def notes(self, step: int) -> dict[str, Any]:
        """What `save` was given beside the state, of a checkpoint that is whole."""
        return manifest.read(self._folder / str(step))["notes"]

    def restore(self, step: int, abstract_state):
        """The state of `step`, bit for bit.

        Args:
          step: which; verified first, unless `newest` or `save` has done so.
          abstract_state: the state as jax.ShapeDtypeStruct with shardings, on any mesh.

        Raises:
          UserError: no such checkpoint, a damaged one, or one of other arrays: all are listed.
        """
        import orbax.checkpoint as ocp

        self.wait()
        if not processes.agree(lambda: self._is_verified(step)):
            raise UserError(_refusal(self._folder, step))
        wanted = _by_path(abstract_state)
        _check_shapes(self._folder / str(step), wanted)
        items = {
            name: ocp.args.PyTreeRestore(
                item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree)
            )
            for name, tree in _items(wanted).items()
        }
        restored = self._orbax.restore(self._folder / str(step), args=ocp.args.Composite(**items))
        arrays = _joined({name: restored[name] for name in items})
        return jax.tree.unflatten(
            jax.tree.structure(abstract_state), [arrays[path] for path in wanted]
        )

    def wait(self) -> None:
        """Returns when the last save is verified; raises what went wrong in it."""
        if self._sealing is not None:
            sealing, self._sealing = self._sealing, None
            sealing.result()

    def raise_failure(self) -> None:
        """Raises what went wrong in the last save, if that is known by now."""
        if self._sealing is not None and self._sealing.done():
            self.wait()

    def close(self) -> None:
        """Waits, and stops the threads."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()

    def _seal(self, step: int, shapes: dict[str, str], notes: dict[str, Any]) -> None:
        with self._failures(step):
            self._orbax.wait_until_finished()  # returns on every process after all have written
            if jax.process_index() > 0:
                return
            manifest.write(self._folder / str(step), shapes, notes)
            self._verified.add(step)
        if self._retires:
            self.retire()

    def discard_after(self, step: int) -> None:
        """Waits for the last save, and deletes the checkpoints newer than `step`.

        For a run that goes on from `step` although it holds newer ones: they would be taken for
        those of the updates that it makes now. Those that `newest` found damaged are set aside, as
        a save would do.

        Raises:
          UserError: one cannot be deleted.
        """
        self.wait()
        if jax.process_index() == 0:
            self._set_aside(self._damaged)
            for newer in _steps(self._folder):
                if newer > step:
                    self._delete(self._folder / str(newer), newer)
            if any(newer > step for newer in sealed(self._folder)):
                raise UserError(
                    f"checkpoints after step {step} in {self._folder} cannot be deleted, and would "
                    "be taken for those of the updates that are made now"
                )

    def retire(self) -> None:
        """Deletes what Orbax left half written, and what is older than the newest `keep`.

        No save may be under way.
        """
        try:
            entries, whole = _entries(self._folder), sealed(self._folder)
        except OSError as error:  # what is too old can wait
            _log.warning("%s cannot be read: %s", self._folder, error)
            return
        if not whole:
            return
        oldest = whole[-self._keep :][0]
        for path, step in entries:
            forever = self._keep_every and step % self._keep_every == 0 and step in whole
            if path.name == str(step) and (step >= oldest or forever):
                continue
            if step < oldest or path.name.endswith(_UNWRITTEN):
                self._delete(path, step)

    @contextlib.contextmanager
    def _failures(self, step: int) -> Iterator[None]:
        """What file systems raise becomes one line; what lies half written makes room again."""
        try:
            yield
        except (OSError, ValueError) as error:  # TensorStore says ValueError when a disk is full
            first = (str(error).splitlines() or [type(error).__name__])[0]
            reason = re.sub(r".*: (.*?)( \[os_error_code.*)?$", r"\1", first)
            whole = map(str, sorted(set(sealed(self._folder)) - self._damaged))
            if jax.process_index() == 0:
                self._remove_unwritten(step)
            raise UserError(
                f"checkpoint {self._folder / str(step)} cannot be written: {reason}; whole are "
                f"those of steps {', '.join(whole) or '(none)'}; run the same command again"
            ) from error

    def _remove_unwritten(self, step: int) -> None:
        for path, found in _entries(self._folder):
            if found == step and not (path / MANIFEST).exists():
                path.rmtree(missing_ok=True)

    def _delete(self, path, step: int) -> None:
        self._verified.discard(step)
        try:
            (path / MANIFEST).unlink(missing_ok=True)  # first: half a checkpoint is none
            path.rmtree()
        except OSError as error:  # e.g. of a network file system, while somebody reads in there
            _log.warning("checkpoint %s cannot be deleted: %s", path, error)

    def _newest(self, at_most: int | None) -> int:
        step, damage = _newest(
            self._folder, self._verified, at_most=at_most, known_damaged=self._damaged
        )
        self._damaged |= damage.keys()
        self._verified |= {step} - {-1}
        return step

    def _is_verified(self, step: int) -> bool:
        if step not in self._verified and manifest.damage(self._folder / str(step)) is None:
            self._verified.add(step)
        return step in self._verified

    def _set_aside(self, steps) -> None:
        for step in steps:
            if (self._folder / str(step)).exists():
                aside = self._folder / f"{step}{_DAMAGED}"
                if aside.exists():
                    aside.rmtree()
                (self._folder / str(step)).rename(aside)


def newest(folder, at_most: int | None = None) -> int | None:
    """The newest step whose checkpoint is whole, and not after `at_most`; None = there is none."""
    from etils import epath

    step, _ = _newest(epath.Path(folder), (), at_most=at_most)
    return None if step < 0 else step


def load_parameters(folder, step: int | None = None, ema: bool = False) -> tuple[Any, int]:
    """Parameters for a notebook: read on one CPU, whatever devices wrote them.

    Args:
      folder: the folder that `Checkpoints` wrote.
      step: which checkpoint; None = the newest whole one.
      ema: the moving average instead of the parameters.

    Returns:
      (nested dict of numpy arrays, its step).

    Raises:
      UserError: no such checkpoint, a damaged one, or one without moving average.
    """
    import orbax.checkpoint as ocp
    from etils import epath

    folder, item = epath.Path(folder), "ema" if ema else "params"
    if step is None:
        step, _ = _newest(folder, (), item)
        if step < 0:
            raise UserError(f"{folder} holds no whole checkpoint")
    elif manifest.damage(folder / str(step), item) is not None:
        raise UserError(_refusal(folder, step, item))
    paths = [tuple(name.split("/")) for name in manifest.read(folder / str(step))["arrays"]]
    tree = _items(dict.fromkeys(paths, ocp.RestoreArgs(restore_type=np.ndarray))).get(item)
    if tree is None:
        raise UserError(f"checkpoint {folder / str(step)} holds no {item}")
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    arguments = ocp.args.PyTreeRestore(restore_args=tree)
    return reader.restore(folder / str(step) / item, args=arguments), step


# ------------------------------------------------------------------------------------------ Orbax


def _checkpointer():
    import orbax.checkpoint as ocp

    # What Orbax raises is told in one line by `Checkpoints`; it would also log the stack, and its
    # event loop those of the other arrays that met the same fate.
    logging.getLogger("absl").addFilter(
        lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname
    )
    logging.getLogger("asyncio").addFilter(
        lambda record: "exception was never retrieved" not in record.getMessage()
    )
    _ignore_late_writes()
    # Slicing replicas so that every process writes a part of them pays only where there are several
    # processes: each new shape of slice is compiled, on the training thread.
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=jax.process_count() > 1)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    handlers = {
        name: ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
        for name in (*_ITEMS, _REST)
    }
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers))


@functools.cache
def _ignore_late_writes() -> None:
    """Threads of TensorStore that come to an event loop which a failed save has closed already
    raise where nobody can catch it, and Python prints a stack each."""
    told = sys.unraisablehook

    def tell(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            told(unraisable)

    sys.unraisablehook = tell


def _by_path(state) -> dict[tuple[str, ...], Any]:
    """{("params", "encoder", ...): leaf}, in the order of the leaves."""
    return {
        tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf
        for path, leaf in jax.tree.leaves_with_path(state)
    }


def _items(arrays: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    """{item: nested dict}: the fields that are read alone, and all others together."""
    tree = traverse_util.unflatten_dict(arrays)
    items = {name: tree.pop(name) for name in _ITEMS if name in tree}
    return items | ({_REST: tree} if tree else {})


def _joined(items: dict[str, Any]) -> dict[tuple[str, ...], Any]:
    """The inverse of `_items`."""
    rest = items.get(_REST, {})
    return traverse_util.flatten_dict({n: t for n, t in items.items() if n != _REST} | rest)


def _shape(leaf) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _check_shapes(folder, wanted) -> None:
    saved = manifest.read(folder)["arrays"]
    shapes = {"/".join(path): _shape(leaf) for path, leaf in wanted.items()}
    different = [
        f"  {name}: saved {saved.get(name, 'nothing')}, wanted {shapes.get(name, 'nothing')}"
        for name in sorted(saved | shapes)
        if saved.get(name) != shapes.get(name)
    ]
    if different:
        raise UserError(f"checkpoint {folder} is of another model:\n" + "\n".join(different))


# ----------------------------------------------------------------------------------------- folder

_DAMAGED = ".damaged"
_UNWRITTEN = ".orbax-checkpoint-tmp"


def _entries(folder) -> list[tuple[Any, int]]:
    """(path, step) of the checkpoints, of those set aside and of what Orbax left half written."""
    if not folder.exists():
        return []
    pattern = re.compile(rf"(\d+)({re.escape(_DAMAGED)}|{re.escape(_UNWRITTEN)}.*)?")
    matches = [(path, pattern.fullmatch(path.name)) for path in folder.iterdir()]
    return [(path, int(match[1])) for path, match in matches if match]


def sealed(folder) -> list[int]:
    """The steps whose checkpoint has a manifest, which is not verified, oldest first.

    Args:
      folder: a path that has `iterdir`.
    """
    return [step for step in reversed(_steps(folder)) if (folder / str(step) / MANIFEST).exists()]


def _steps(folder) -> list[int]:
    """The steps that have a folder, newest first, whole or not."""
    return sorted((step for path, step in _entries(folder) if path.name == str(step)), reverse=True)


def _newest(
    folder, verified, item: str = "", at_most: int | None = None, known_damaged=()
) -> tuple[int, dict[int, str]]:
    """The newest whole step, or -1, and {step: damage} of those after it, which are logged."""
    damaged, newest = {}, -1
    for step in _steps(folder):
        if step in known_damaged or (at_most is not None and step > at_most):
            continue
        damage = None if step in verified else manifest.damage(folder / str(step), item)
        if damage is None:
            newest = step
            break
        damaged[step] = damage
    instead = f"step {newest} is used instead" if newest >= 0 else "there is no other"
    for step, damage in damaged.items():
        _log.warning("checkpoint %s is not used: %s; %s", folder / str(step), damage, instead)
    return newest, damaged


def _refusal(folder, step: int, item: str = "") -> str:
    if step in _steps(folder):
        damage = manifest.damage(folder / str(step), item)
        return f"checkpoint {folder / str(step)} cannot be used: {damage}"
    present = ", ".join(map(str, reversed(_steps(folder)))) or "none"
    return f"there is no checkpoint of step {step} in {folder}; there are: {present}"
