"""What the compiler says of a program for a pod: a dictionary for JSON, and the same in words."""

from __future__ import annotations

import re
import resource
import time
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from nuwa_jax.errors import UserError
from nuwa_jax.parallel import programs
from nuwa_jax.parallel.census import Census, fsdp_minimum, read_hlo, used_parts
from nuwa_jax.parallel.mesh import MeshConfig, batch_arithmetic, make_mesh, use_mesh
from nuwa_jax.parallel.padding import LANES, padding_waste
from nuwa_jax.parallel.sharding import check_replicated, report
from nuwa_jax.parallel.topology import Topology
from nuwa_jax.training.curriculum import Stage, stages_from_config
from nuwa_jax.watching.flops import products

Report = dict[str, Any]
LARGEST = 8  # collectives that are named one by one


def compile_program(
    config: ml_collections.ConfigDict, topology: Topology, what: str, stage_name: str | None
) -> Report:
    """Compiles the step of a stage ("train") or the sampler ("sample"), and reports on it.

    Raises:
      UserError: the stage is unknown, the mesh does not fit the topology, or libtpu is missing.
    """
    stage = find_stage(config, stage_name)
    mesh = make_mesh(MeshConfig.from_config(config.mesh), topology.devices())
    sizes = dict(mesh.shape)
    minimum = None
    if what == "train":
        divided = batch_arithmetic(stage.batch_size, config.train.accumulate, sizes)
        program, args = programs.train_step(config, stage, mesh)
        lies = check_replicated(report(args[0], sizes), sizes)
    else:
        divided, lies = f"{sizes['data'] * sizes['fsdp']} videos at a time", ""
        program, args = programs.sampler(config, mesh)
    start = time.monotonic()
    traced = program.trace(*args)
    if what == "train":
        minimum = _minimum(config, traced, args, mesh)
    flops = _flops(traced, mesh, topology)
    with use_mesh(mesh):
        lowered = traced.lower()
    seconds = {"trace_and_lower": round(time.monotonic() - start, 1)}
    made = {
        "topology": topology.name,
        "devices": mesh.size,
        "mesh": sizes,
        "program": f"{what} {stage.name}" if what == "train" else what,
        "batch": divided,
        "state": lies,
        "flops": flops,
    }
    start = time.monotonic()
    try:
        compiled = lowered.compile(compiler_options=topology.chip.compiler_options)
    except jax.errors.JaxRuntimeError as error:
        made["memory"] = _does_not_fit(error, topology)
        return made
    seconds["compile"] = round(time.monotonic() - start, 1)
    text = compiled.as_text()
    # Of GPUs that are not there XLA makes no such analysis.
    census, cost = read_hlo(text), compiled.cost_analysis() or {}
    if "flops" in cost:
        flops["hardware_per_device"] = cost["flops"]
    return made | {
        "memory": _memory(compiled.memory_analysis(), topology),
        "collectives": _collectives(census, minimum),
        "time": _times(census, cost, flops, topology),
        "compiling": seconds
        | {
            "host_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            "hlo_mib": round(len(text) / 2**20, 1),
        },
    }


def find_stage(config: ml_collections.ConfigDict, name: str | None) -> Stage:
    """The stage of that name, or the last one.

    Raises:
      UserError: the curriculum has none of that name.
    """
    stages = {stage.name: stage for stage in stages_from_config(config)}
    if name is None:
        return list(stages.values())[-1]
    if name not in stages:
        raise UserError(f"--stage={name} is not in the curriculum, which has {', '.join(stages)}")
    return stages[name]


def as_text(made: Report) -> str:
    """The report in words."""
    lines = [
        f"{made['program']} on {made['topology']}: {made['devices']} chips, mesh "
        + " x ".join(f"{axis} {size}" for axis, size in made["mesh"].items()),
        made["batch"],
        made["state"],
        _memory_text(made["memory"]),
        _flops_text(made["flops"], made["devices"]),
    ]
    if "collectives" in made:
        lines += [_collectives_text(made["collectives"]), _time_text(made["time"])]
        took = made["compiling"]
        lines.append(
            f"compiled here in {took['compile']:.0f} s (traced and lowered in "
            f"{took['trace_and_lower']:.0f} s), {took['host_gib']} GiB of the host's memory, "
            f"{took['hlo_mib']} MiB of HLO. All figures are the compiler's; nothing was run."
        )
    return "\n".join(line for line in lines if line)


def _minimum(
    config: ml_collections.ConfigDict, traced: jax.stages.Traced, args: tuple[Any, ...], mesh: Mesh
) -> dict[str, Any]:
    """What FSDP cannot do without, of the parameters that loss and gradients depend on."""
    state = args[0]
    outputs = jax.tree.leaves_with_path(traced.out_info)
    wanted = [path[0].idx == 1 for path, _ in outputs]  # the metrics; the state goes on as it is
    used = used_parts(traced.jaxpr, args, wanted)
    used_state = jax.tree.unflatten(jax.tree.structure(args), used)[0]
    frozen = _kept(state.frozen, used_state.frozen)
    train = config.train
    dtypes = dict(
        compute_dtype=config.model.dtype, reduce_dtype=train.get("reduce_dtype", "float32")
    )
    least = fsdp_minimum(
        state.params, frozen, dict(mesh.shape), micro_batches=train.accumulate, **dtypes
    )
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    return dtypes | {
        "traffic": least.traffic,
        "gathers": least.gathers,
        "scatters": least.scatters,
        "copies": least.copies,
        "trained_parameters": count(state.params),
        "frozen_parameters": count(state.frozen),
        "frozen_parameters_used": count(frozen),
    }


def _kept(tree: Any, keep: Any) -> Any:
    """A nested dict without the leaves that are not kept."""
    if not isinstance(tree, dict):
        return tree if keep else None
    out = {key: _kept(part, keep[key]) for key, part in tree.items()}
    return {key: part for key, part in out.items() if part is not None and part != {}}


def _flops(traced: jax.stages.Traced, mesh: Mesh, topology: Topology) -> dict[str, Any]:
    found = list(products(traced.jaxpr.jaxpr))
    model = sum(p.flops * p.times for p in found if not p.recomputed)
    return {
        "model": model,
        "with_recomputation": sum(p.flops * p.times for p in found),
        "model_per_device": model / mesh.size,
        "seconds_at_peak": model / mesh.size / topology.chip.flops,
        "padding": {
            kind: {"flops": waste.flops, "extra": waste.extra, "share": round(waste.share, 4)}
            for kind, waste in padding_waste(found).items()
        },
    }


def _memory(analysis: Any, topology: Topology) -> dict[str, Any]:
    parts = {
        "arguments": analysis.argument_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "output": analysis.output_size_in_bytes,
        "aliased": analysis.alias_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }
    # Output that takes the place of an argument takes none of its own.
    total = sum(parts.values()) - 2 * parts["aliased"]
    memory = topology.chip.memory
    return parts | {"total": total, "chip": memory, "fits": total <= memory}


def _does_not_fit(error: Exception, topology: Topology) -> dict[str, Any]:
    """What the compiler says when it gives up for want of memory."""
    message = str(error)
    if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
        if topology.chip.platform == "cuda":
            raise UserError(
                f"without a GPU its compiler cannot compile this program for {topology.name}, as "
                f"it does some: {message.splitlines()[0]}; run a few steps on one"
            ) from error
        raise error
    used = re.search(r"[Uu]sed ([\d.]+)([KMGT])", message)
    unit = dict(K=2**10, M=2**20, G=2**30, T=2**40)
    total = round(float(used[1]) * unit[used[2]]) if used else None
    first = next((line for line in message.splitlines() if "hbm" in line.lower()), message[:300])
    return {"total": total, "chip": topology.chip.memory, "fits": False, "compiler": first.strip()}


def _collectives(census: Census, minimum: dict[str, Any] | None) -> dict[str, Any]:
    largest = sorted(census.collectives, key=lambda c: -c.traffic)[:LARGEST]
    made = {
        "by_kind": census.by_kind(),
        "traffic": census.traffic,
        "loops_of_unknown_length": census.endless,
        "largest": [
            {"kind": c.kind, "bytes": c.bytes, "group": c.group, "times": c.times, "of": c.source}
            for c in largest
        ],
    }
    if minimum is not None:
        made["minimum"] = minimum
        made["ratio"] = (
            round(census.traffic / minimum["traffic"], 3) if minimum["traffic"] else None
        )
    return made


def _times(
    census: Census, cost: dict[str, float], flops: dict[str, Any], topology: Topology
) -> dict[str, Any]:
    chip, arithmetic = topology.chip, flops["seconds_at_peak"]
    compiler = cost.get("optimal_seconds", -1.0)
    made = {
        "arithmetic": arithmetic,
        # The sum over operations, where -1 stands for one without an estimate: of small programs
        # it may be negative, which means nothing.
        "compiler": compiler if compiler > 0 else None,
        "fusions": census.cycles / chip.clock,
        "memory": cost.get("bytes accessed", 0.0) / chip.memory_bandwidth,
        "collectives": census.traffic / chip.link_bandwidth,
    }
    made["ratio"] = round(compiler / arithmetic, 3) if compiler > 0 and arithmetic else None
    return made


def _memory_text(memory: dict[str, Any]) -> str:
    gib = lambda n: f"{n / 2**30:.2f} GiB"  # noqa: E731
    verdict = "it fits" if memory["fits"] else "it does NOT fit"
    if "arguments" not in memory:
        total = "more" if memory["total"] is None else gib(memory["total"])
        return f"memory per chip: {total} of {gib(memory['chip'])}: {verdict}. {memory['compiler']}"
    return (
        f"memory per chip: arguments {gib(memory['arguments'])}, temporaries "
        f"{gib(memory['temporaries'])}, output {gib(memory['output'])} of which "
        f"{gib(memory['aliased'])} in place of arguments, code {gib(memory['code'])}: "
        f"{gib(memory['total'])} of {gib(memory['chip'])}: {verdict}"
    )


def _flops_text(flops: dict[str, Any], devices: int) -> str:
    tera = lambda n: f"{n / 1e12:,.3g} TFLOP"  # noqa: E731
    told = (
        f"arithmetic per step: model {tera(flops['model'])} ({tera(flops['model_per_device'])} per "
        f"chip), with what is computed again {tera(flops['with_recomputation'] / devices)} per chip"
    )
    if "hardware_per_device" in flops:
        told += f", as compiled {tera(flops['hardware_per_device'])} (without Pallas kernels)"
    padding = flops["padding"]
    return told + (
        f"\npadding of widths to {LANES}: {padding['weights']['share']:+.1%} on products with "
        f"weights, {padding['attention']['share']:+.1%} on batched products"
    )


def _collectives_text(collectives: dict[str, Any]) -> str:
    mib = lambda n: f"{n / 2**20:,.0f} MiB"  # noqa: E731
    kinds = [
        f"{row['count']} {kind} ({mib(row['traffic'])})"
        for kind, row in collectives["by_kind"].items()
    ]
    told = (
        f"collectives, sent per chip and step: {', '.join(kinds) or 'none'}; "
        f"{mib(collectives['traffic'])}"
    )
    if collectives["loops_of_unknown_length"]:
        told += (
            f"; in {collectives['loops_of_unknown_length']} loops of unknown length each is "
            "counted once"
        )
    least = collectives.get("minimum")
    if least is None:
        return told
    ratio = "" if collectives["ratio"] is None else f": {collectives['ratio']} x as much"
    return told + (
        f"\nFSDP needs {mib(least['traffic'])}{ratio}. That is: gathers in "
        f"{least['compute_dtype']} {mib(least['gathers'])} ({least['trained_parameters']:,} "
        f"trained parameters twice, of {least['frozen_parameters_used']:,} frozen ones in use "
        "those of the U-Net twice and others once), gradients scattered in "
        f"{least['reduce_dtype']} {mib(least['scatters'])}, and added over copies "
        f"{mib(least['copies'])}"
    )


def _time_text(times: dict[str, Any]) -> str:
    ms = lambda s: f"{s * 1e3:,.1f} ms"  # noqa: E731
    compiler = "none" if times["compiler"] is None else ms(times["compiler"])
    ratio = "" if times["ratio"] is None else f" ({times['ratio']} x the arithmetic)"
    return (
        f"time per step, estimates: model arithmetic at the chip's peak {ms(times['arithmetic'])}; "
        f"compiler's estimate {compiler}{ratio}; sum of its fusions {ms(times['fusions'])}; memory "
        f"traffic {ms(times['memory'])}; collectives over the links {ms(times['collectives'])}"
    )
