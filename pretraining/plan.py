"""Compiles the training step of a config for devices that need not be here, and says what it takes.

    python -m pretraining.plan --config=configs/masked_lm.py:large --topology=v5e:4x4 \\
        [--utilisation=0.4] [--json=FILE] [--config.mesh.fsdp=16 ...]

`--topology` is a TPU slice (v2 v3 v4 v5e v5p v6e, then its sides: v5e:16x16, v5p:8x8x8; "v5" is
v5p), which needs libtpu but no TPU; `cpu:8`, so many simulated devices, which need nothing; or
`here`, the devices of this machine. No corpus is read: the vocabulary is the one of
config.tokenizer.model, or a stand-in of config.tokenizer.size.

Printed are, for one device (a chip; of v2 and v3 a core, which is what JAX calls a device there):

- the parameters, their partition, and the rule that decides it;
- memory: parameters, optimizer, moving average and batch by their shapes; what the compiler adds
  (gradients, activations) and the program itself by its own analysis, and whether that fits;
- FLOPs as in pretraining/flops.py (XLA's own count takes the body of a loop once, and is left out);
- collectives, as pretraining/hlo.py counts them, bytes as defined there;
- tokens a day, payload only, at `--utilisation` (default 0.4) of the published peak;
- if it does not fit, what to change, by what takes the memory.

`--json=FILE` stores the same figures, bytes not rounded.
"""

from pretraining import cli

if __name__ == "__main__":  # --help and a mistake need not wait for the imports below
    cli.run(
        "pretraining.plan",
        __doc__,
        topology="v5e:4x4, v5p:8x8x8, ... | cpu:8 (the default) | here",
        utilisation="share of the peak that the step reaches (default 0.4)",
        json="file for the figures",
    )

import contextlib
import json as json_lib
import math
import os
import pathlib
import re
import time
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from pretraining import flops, hlo, sharding
from pretraining import program as program_lib
from pretraining import state as state_lib
from pretraining.data.row import SPECIAL_POSITIONS
from pretraining.errors import UserError

GIB = 2**30
_EXAMPLES = "e.g. v5e:4x4, v5p:8x8x8, v4:4x4x8, cpu:8 or here"


def main(config, topology: str | None, utilisation: str | None, json: str | None) -> int:
    """The command; its status is 0 where the program fits, 1 where it does not."""
    share = _share(utilisation)
    plan = measure(config, topology or "cpu:8", share)
    print(report(plan))
    if json:
        pathlib.Path(json).write_text(json_lib.dumps(plan._asdict(), indent=1) + "\n")
    return 0 if plan.fits else 1


def _share(text: str | None) -> float:
    share = 0.4 if text is None else math.nan
    with contextlib.suppress(ValueError, TypeError):
        share = float(text)
    if not 0 < share <= 1:
        raise UserError(f"--utilisation={text!r}: a share of the peak, above 0 and at most 1")
    return share


class Plan(NamedTuple):
    """What `measure` found; bytes, FLOPs of a peak and collectives are those of one device.

    Attributes:
      topology, kind, devices: the name, jax's device_kind, how many.
      mesh: {axis: size}.
      parameters: how many.
      rules: (names, shape, partition, rule) of the parameters, layers of one form together.
      memory: {what: bytes}, in the order in which it is printed.
      needed: their sum; where the compiler gave up, what it said that it needs.
      capacity: bytes of a device; None where nobody tells.
      fits: whether it compiled and `needed` is not above `capacity`.
      collectives: {kind: hlo.Traffic} of one step.
      step_flops, token_flops: of the global batch, and by payload token.
      compile_s: seconds that the compiler took.
      utilisation: as given.
      tokens_per_day: None where the peak is unknown.
      advice: what to change, the most useful first; nothing where it fits.
    """

    topology: str
    kind: str
    devices: int
    mesh: dict[str, int]
    parameters: int
    rules: list[tuple[str, str, str, str]]
    memory: dict[str, float]
    needed: float
    capacity: float | None
    fits: bool
    collectives: dict[str, hlo.Traffic]
    step_flops: float
    token_flops: float
    compile_s: float
    utilisation: float
    tokens_per_day: float | None
    advice: list[str]


def measure(config, topology: str, utilisation: float) -> Plan:
    """Compiles for a topology (see the module's docstring) and reads the result.

    Raises:
      UserError: a mistake in the config or in the name of the topology, libtpu is missing, or the
        compiler refuses the program for another reason than its memory.
    """
    described = devices(topology)
    config, vocabulary, program = program_lib.rehearse(config, described)
    start = time.perf_counter()
    compiled, complaint = _compile(program, config, topology)
    compile_s = time.perf_counter() - start

    state, chip = program.state, flops.chip(described[0].device_kind)
    memory = _resident(config, program)
    if compiled:
        memory |= _temporary(compiled.memory_analysis(), sum(memory.values()))
    needed = sum(memory.values()) if compiled else needed_by(complaint)
    capacity = _capacity(described[0])
    fits = compiled is not None and (capacity is None or needed <= capacity)
    step_flops = flops.step_flops(config, vocabulary)
    tokens = config.train.batch_size * (config.data.sequence_length - SPECIAL_POSITIONS)
    return Plan(
        topology=topology,
        kind=described[0].device_kind,
        devices=len(described),
        mesh=dict(program.mesh.shape),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        rules=_rules(program),
        memory=memory,
        needed=needed,
        capacity=capacity,
        fits=fits,
        collectives=hlo.collectives(hlo.parse(compiled.as_text())) if compiled else {},
        step_flops=step_flops,
        token_flops=step_flops / tokens,
        compile_s=compile_s,
        utilisation=utilisation,
        tokens_per_day=chip
        and tokens_per_day(tokens, step_flops, chip.peak * len(described), utilisation),
        advice=[] if fits else advice(config, program.mesh, memory, needed, capacity),
    )


def tokens_per_day(tokens: int, step_flops: float, peak: float, utilisation: float) -> float:
    """Of steps of `tokens`, at a share of the peak (FLOP/s) of all devices together."""
    return 86_400 * tokens / (step_flops / (utilisation * peak))


def devices(topology: str) -> list:
    """The devices of a topology; unless it is "here", this process never touches an accelerator.

    Raises:
      UserError: no such topology, or libtpu is missing.
    """
    if topology == "here":
        return jax.devices()
    jax.config.update("jax_platforms", "cpu")  # a TPU that is attached belongs to another process
    if match := re.fullmatch(r"cpu:([1-9]\d*)", topology):
        return _simulated(int(match[1]))
    if not re.fullmatch(r"v([2345]|5e|5p|6e):\d+(x\d+)*", topology):
        raise UserError(f"--topology={topology!r} is none that is known: {_EXAMPLES}")
    return _tpu(topology)


def _simulated(count: int) -> list:
    with contextlib.suppress(RuntimeError):  # too late: take of those that are there
        jax.config.update("jax_num_cpu_devices", count)
    found = jax.devices("cpu")
    if len(found) < count:
        raise UserError(f"--topology=cpu:{count}: this process has {len(found)} simulated devices")
    return found[:count]


def _tpu(topology: str) -> list:
    from jax.experimental import topologies
    from jax.experimental.compilation_cache import compilation_cache

    # What was compiled for devices that are not here cannot be read back from a cache.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # the first compilation of a process decides, unless forgotten
    # Else libtpu asks the network what machine this is, which does not matter here.
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),  # no TPU is touched, so others may use it
    ):
        os.environ.setdefault(name, value)
    # The two cores of a v4 chip are one device, as they are where one is attached.
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        return topologies.get_topology_desc(topology, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--topology={topology!r}: {str(error).splitlines()[0]}; {_EXAMPLES}"
        ) from None
    except RuntimeError:
        raise UserError(
            f"--topology={topology!r} needs libtpu, which compiles without a TPU: "
            "pip install -c constraints.txt -e '.[tpu]'"
        ) from None


def _compile(program, config, topology: str):
    """(compiled, "") or (None, the compiler's complaint that the memory is too small)."""
    try:
        return program_lib.compile_update(program, config), ""
    except jax.errors.JaxRuntimeError as error:
        complaint = str(error).splitlines()[0]
        if "RESOURCE_EXHAUSTED" in str(error) or "Ran out of memory" in str(error):
            return None, complaint
        raise UserError(f"--topology={topology!r}: the compiler failed: {complaint}") from error


def needed_by(complaint: str) -> float:
    """The largest size in a complaint such as "... temporaries (31.68G) exceeds ... (15.75G)".

    Sizes of the compiler are binary.
    """
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    sizes = re.findall(r"\b(\d+(?:\.\d+)?)([KMGT])\b", complaint)
    return max((float(amount) * units[unit] for amount, unit in sizes), default=math.nan)


def _capacity(device) -> float | None:
    """Bytes; of a kind of several sizes, and of one that is not known, what the device tells."""
    chip = flops.chip(device.device_kind)
    return (chip and chip.memory) or (device.memory_stats() or {}).get("bytes_limit")


def _resident(config, program) -> dict[str, float]:
    """Bytes of what lives through the step, by the shapes of its shards."""
    state = program.state
    ways = program.mesh.shape["data"] * program.mesh.shape["fsdp"]
    rows = state_lib.empty_rows(config, config.train.batch_size)
    return {
        "parameters": _bytes(state.params),
        "optimizer": _bytes(state.optimizer),
        "moving average": _bytes(state.ema),
        "batch": sum(x.nbytes for x in rows) / ways,
    }


def _bytes(tree: Any) -> float:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _temporary(analysis, resident: float) -> dict[str, float]:
    """Bytes of what the compiler adds to the resident ones."""
    held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    return {
        "temporaries": analysis.temp_size_in_bytes,
        "program": analysis.generated_code_size_in_bytes,
        # Of a batch what the step never reads is no argument of it.
        "counters, metrics, padding": max(held - analysis.alias_size_in_bytes - resident, 0),
    }


def _rules(program) -> list[tuple[str, str, str, str]]:
    """One line for all layers that are alike."""
    found: dict[tuple, int] = {}
    for leaf in sharding.table(program.state.params, program.mesh):
        name = re.sub(r"\blayer_\d+\b", "layer_*", leaf.name)
        axes = ", ".join(axis or "-" for axis in leaf.partition)
        line = name, "x".join(map(str, leaf.shape)), axes, leaf.rule
        found[line] = found.get(line, 0) + 1
    return [(f"{name} ({n})" if n > 1 else name, *rest) for (name, *rest), n in found.items()]


def advice(
    config, mesh: Mesh, memory: dict[str, float], needed: float, capacity: float
) -> list[str]:
    """What to change so that the step fits, the most useful first.

    Parameters, gradients and optimizer shrink by being shared out; what else the step needs, by
    computing it again, or for fewer rows, or positions, at once.
    """
    state = 2 * memory["parameters"] + memory["optimizer"] + memory["moving average"]
    activations = needed - state
    shared = _share_out(config, mesh, state, capacity)
    less = _shrink(config, mesh.shape, activations, max(capacity - state, capacity / 4))
    if state > activations:
        return shared + less
    return less + (shared if state > capacity / 4 else [])


def _share_out(config, mesh: Mesh, state: float, capacity: float) -> list[str]:
    """A mesh of the same devices in which the state takes half of the memory."""
    wanted = math.ceil(2 * state / capacity)
    told = f"parameters, gradients and optimizer take {_gib(state)}"
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    meshes = [(data // n, fsdp * n) for n in range(2, data + 1) if data % n == 0]
    meshes = [sizes for sizes in meshes if _can_be_cut(config, mesh, *sizes)]
    if not meshes:
        return [f"a larger --topology: {told} on each of {mesh.size} devices"]
    data, fsdp = next((sizes for sizes in meshes if sizes[1] >= fsdp * wanted), meshes[-1])
    return [f"config.mesh.data={data} config.mesh.fsdp={fsdp}: {told}"]


def _can_be_cut(config, mesh: Mesh, data: int, fsdp: int) -> bool:
    """Whether the devices of a mesh, which may be wired as a torus, make another one."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.mesh.update(data=data, fsdp=fsdp, tensor=mesh.shape["tensor"])
    try:
        sharding.make_mesh(config, list(mesh.devices.flat))
    except UserError:
        return False
    return True


# The next policy of config.model.remat, by what it keeps for the backward pass.
_LESS_KEPT = {"none": "outputs", "dots": "outputs", "outputs": "full"}


def _shrink(config, mesh, activations: float, room: float) -> list[str]:
    model, batch = config.model, config.train.batch_size
    ways = mesh["data"] * mesh["fsdp"]
    rows = batch // config.train.accumulation // ways
    lines = []
    if model.remat != "full":
        lines.append(f"config.model.remat={_LESS_KEPT[model.remat]}")
    if model.attention == "xla" and config.data.sequence_length >= 1024:
        lines.append("config.model.attention=splash or cudnn (no L x L scores)")
    if rows > 1:
        enough = (n for n in range(2, rows) if rows % n == 0 and n >= activations / room)
        parts = next(enough, rows)
        lines.append(f"config.train.accumulation={config.train.accumulation * parts}")
    if model.logits_chunk > 32:
        lines.append("config.model.logits_chunk=32")
    lines.append(f"a smaller config.train.batch_size (now {batch})")
    lines.append(f"or config.data.sequence_length (now {config.data.sequence_length})")
    lines[0] += f": activations and other temporaries take {_gib(activations)}"
    return lines


def report(plan: Plan) -> str:
    """The plan as text."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    lines = [f"{plan.devices} x {plan.kind} ({plan.topology}), mesh {mesh}", ""]
    lines += _table(("parameter", "shape", "partition", "rule"), plan.rules)
    lines += ["", *_memory_lines(plan), ""]
    lines += _table(
        ("collectives of a step", "count", "GiB per device"),
        [(kind, str(t.count), f"{t.bytes / GIB:.3f}") for kind, t in plan.collectives.items()],
    )
    day = plan.tokens_per_day
    lines += [
        "",
        f"parameters      {plan.parameters:,}",
        f"FLOPs           {plan.step_flops:.3e} per step, {plan.token_flops:.3e} per token",
        f"compile time    {plan.compile_s:.0f} s",
        f"tokens per day  {f'{day:.3e}' if day else 'the peak of this device is not known'}"
        + (f" at {plan.utilisation:.0%} of the peak" if day else ""),
    ]
    if not plan.fits:
        lines += ["", "It does not fit. What to change, the most useful first:"]
        lines += [f"  {line}" for line in plan.advice]
    return "\n".join(lines)


def _memory_lines(plan: Plan) -> list[str]:
    rows = [(what, f"{size / GIB:.3f}") for what, size in plan.memory.items()]
    rows.append(("needed", f"{plan.needed / GIB:.3f}"))
    if plan.capacity is None:
        rows.append(("capacity", "not known"))
    else:
        rows.append(
            ("capacity", f"{plan.capacity / GIB:.3f}: {'fits' if plan.fits else 'TOO BIG'}")
        )
    return _table(("memory of a device", "GiB"), rows)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
