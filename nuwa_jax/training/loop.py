"""The whole training run: its stages in order, each from where it was left."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from os import PathLike

import jax
import ml_collections
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, UInt8

from nuwa_jax.data.config import DataConfig
from nuwa_jax.data.device import to_device
from nuwa_jax.data.pipeline import Batches, make_batches
from nuwa_jax.data.tokenizer import tokenizer_of
from nuwa_jax.data.video import write_video
from nuwa_jax.errors import StoppedBySignal, UserError
from nuwa_jax.models.video_ldm import VideoLDM
from nuwa_jax.parallel.agreement import Agreement, check_same, check_same_program
from nuwa_jax.parallel.mesh import (
    MeshConfig,
    batch_arithmetic,
    batch_sharding,
    local_rows,
    make_mesh,
    reading_hosts,
    replicated,
)
from nuwa_jax.parallel.sharding import check_replicated, place, report
from nuwa_jax.training.calibration import calibrate_latents
from nuwa_jax.training.checkpoint import (
    DamagedCheckpoint,
    Meta,
    StageCheckpoints,
    origin,
)
from nuwa_jax.training.curriculum import (
    LATENTS,
    Params,
    Stage,
    overlay,
    partition_for,
    stages_from_config,
)
from nuwa_jax.training.optim import DECAYS, learning_rate, make_optimizer
from nuwa_jax.training.precomputed import check_encoders
from nuwa_jax.training.progress import Progress
from nuwa_jax.training.same_config import check_same_run, plain_config
from nuwa_jax.training.state import TrainState, init_state
from nuwa_jax.training.step import init_key, make_train_step
from nuwa_jax.training.stopping import Stop, Stopped, stop_requested
from nuwa_jax.training.workdir import Workdir
from nuwa_jax.training.writers import MetricsFile
from nuwa_jax.watching.non_finite import NonFinite
from nuwa_jax.watching.watch import RunWatch

# Steps given to the device before the host waits for one. It bounds how late a metric is read, and
# so how far training runs on after something went wrong.
RUN_AHEAD = 2


# (averaged params, stage) -> clips that show what the model can do by now.
SampleFn = Callable[[Params, Stage], UInt8[np.ndarray, "b t h w 3"]]


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended: `signal` is what stopped it early, or None if all stages are done."""

    stage: str
    step: int
    signal: int | None


def train(
    config: ml_collections.ConfigDict,
    workdir: str | PathLike[str],
    sample_fn: SampleFn | None = None,
    initial: Callable[[], Params] | None = None,
) -> Result:
    """Runs the stages of `config.curriculum`, going on where `workdir` was left.

    On one platform, a run that was stopped or killed at any point and started again gives bit for
    bit the numbers of one that was not, but for stages with a time budget, whose length depends
    on the clock. SIGTERM and SIGINT save a checkpoint after the running step and end the run.

    A process alone does not wait then for samples; nor, before a stage's first step is done, for
    reading checkpoints or compiling, as nothing is lost. It does wait for the step, for the
    calibration of latents at the end of an autoencoder's stage, whose last steps are in no
    checkpoint until then, and for writing. Of several processes, the one that is signalled before
    a stage's first step is done ends at once, and the others because it did; later all stop at the
    same step, after samples that are being made.

    Args:
      config: of a file in configs/.
      workdir: where checkpoints, metrics.jsonl, tensorboard/ and samples/ go: a folder or a bucket.
      sample_fn: makes the clips to show every `config.train.sample_every` steps (0: never), for
        instance `nuwa_jax.generation.stage_samples.StageSamples`.
      initial: loads parameters that the first stage starts from in place of random ones; parts of
        the model that they lack start as ever. Called only if the run has no checkpoint yet.

    Raises:
      UserError: the config makes no sense, is not that of the checkpoints in `workdir`, or
        `initial` does not fit the model.
      StoppedBySignal: this is one of several processes, and a signal came before a stage's first
        step was done.
      nuwa_jax.watching.non_finite.NonFiniteError: a step was not finite, or too many in a row,
        as `config.train.non_finite` says.
    """
    stages = stages_from_config(config)
    _check(config, stages)
    check_same_program(plain_config(config), workdir)
    with stop_requested() as stop, closing(Workdir(workdir)) as workdir:
        run = _Run(config, workdir, stages, sample_fn, initial)
        with run.watch:
            return run.run_stages(stop)


class _Run:
    """What all stages of a run share."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        workdir: Workdir,
        stages: Sequence[Stage],
        sample_fn: SampleFn | None,
        initial: Callable[[], Params] | None,
    ) -> None:
        self.config, self.workdir, self.stages = config, workdir, stages
        self.sample_fn, self.initial = sample_fn, initial
        self.model = VideoLDM.from_config(config.model)
        self.data = DataConfig.from_config(config.data)
        self.mesh = make_mesh(MeshConfig.from_config(config.get("mesh", {})))
        train, sizes, hosts = config.train, dict(self.mesh.shape), reading_hosts(self.mesh)
        # Of all stages now rather than hours from now.
        self.divided = [
            batch_arithmetic(stage.batch_size, train.accumulate, sizes, hosts) for stage in stages
        ]
        tokenizer_of(config)  # or captions would be read as another encoder's tokens
        self.plain = plain_config(config)
        self.origin = origin(sizes)
        self.main = jax.process_index() == 0
        self.watch = RunWatch(config.train, workdir.local, self._say, write=self.main)
        # Checked once, before the first stage that runs: what it starts from is whole on this host,
        # which placed parameters need not be, and no stage that takes latents trains an encoder.
        self.encoders_checked = False
        self.signal: int | None = None  # by which all processes stop
        # What the next stage starts from; its first reader takes it, as it fills a device's memory.
        self.params: Params | None = None

    def run_stages(self, stop: Stop) -> Result:
        """Trains what is left of the curriculum."""
        config = self.config
        before = None
        for stage in self.stages:
            with self.checkpoints(stage) as checkpoints:
                # Or hosts would wait for each other in collectives that not all of them enter.
                check_same(
                    f"the checkpoints of stage {stage.name}",
                    {"steps": checkpoints.steps()},
                    "wait until all hosts see the same files and start again",
                )
                try:
                    # Between stages a signal is left to what the hosts agree on.
                    call = stop.call if self.params is None else lambda f, *args: f(*args)
                    meta = call(checkpoints.last, config.train.use_previous_checkpoint)
                    if meta is not None:
                        check_same_run(config, meta, self.workdir)
                    if meta is None or not meta.done:
                        if self.params is None:
                            self.params = stop.call(self.params_before, stage)
                            for coming in self.stages[stage.index :]:
                                partition_for(coming, self.params)  # rather than hours from now
                        meta, self.params = self.run_stage(stage, checkpoints, meta, before, stop)
                except Stopped:  # before anything was trained that is not in a checkpoint
                    if jax.process_count() > 1:  # the others may not have had the signal
                        raise StoppedBySignal(
                            stop.signal,
                            f"signal {stop.signal} came before stage {stage.name} went on, so "
                            "nothing is lost: start the job again to go on",
                        ) from None
                    return Result(stage.name, checkpoints.latest() or 0, stop.signal)
                if not meta.done:
                    return Result(stage.name, meta.step, self.signal)
                before = meta
        return Result(stage.name, meta.step, None)

    def params_before(self, stage: Stage) -> Params:
        """What a stage starts from: the averages of the one before it, or initial parameters.

        They are in the host's memory: whole, they may not fit a device beside what trains.
        """
        if stage.index == 0:
            data = self.data
            size = dict(height=data.height, width=data.width, frames=data.frames)
            params = self.model.init(init_key(self.config.seed), **size)
            params = params if self.initial is None else overlay(params, self.initial())
            return jax.device_get(params)
        with self.checkpoints(self.stages[stage.index - 1]) as checkpoints:
            step = checkpoints.latest()
            try:
                return jax.device_get(checkpoints.restore_params(step))
            except DamagedCheckpoint as error:
                if not self.config.train.use_previous_checkpoint or checkpoints.later():
                    raise
                checkpoints.discard(step)
                raise UserError(f"{error}; that is done now: run again to go on") from error

    def checkpoints(self, stage: Stage) -> StageCheckpoints:
        """Opens a stage's checkpoints; each one is reported when it is there for certain."""
        return StageCheckpoints(
            self.workdir.url,
            stage.label,
            self.config.train.keep,
            self.config.train.keep_every,
            before_commit=self.workdir.copy,
            saved=lambda step: self._say(f"{stage.name}: saved step {step}"),
        )

    def run_stage(
        self,
        stage: Stage,
        checkpoints: StageCheckpoints,
        meta: Meta | None,
        before: Meta | None,
        stop: Stop,
    ) -> tuple[Meta, Params]:
        """Trains a stage to its end, or until `stop`; returns its last checkpoint's contents.

        `meta` is of the stage's own last checkpoint, `before` of the stage before it. Takes
        `self.params`, and lets go of them when the stage's own are placed and checked.

        Raises:
          Stopped: before the first step was done.
        """
        params, self.params = self.params, None
        position = before.position if before else 0
        last = meta or before
        begin = last and (last.index, last.step)
        watch = self.watch.stage(stage.name, stage.label, self.mesh, begin)
        config, train = self.config, self.config.train
        sizes = dict(self.mesh.shape)
        # Placed twice: made from parameters that are split, the whole state never lies on a device.
        state = init_state(place(params, self.mesh), stage, make_optimizer(train))
        state = place(state, self.mesh)
        replicated = check_replicated(report(state, sizes), sizes)
        if meta is None:
            meta = Meta(self.plain, stage.name, stage.index, 0, position, 0.0, False, [])
            if stage.index == 0 and self.main:
                self.workdir.local.mkdir(parents=True, exist_ok=True)
                text = json.dumps(self.plain, indent=2) + "\n"
                (self.workdir.local / "config.json").write_text(text)
        else:
            with watch.phase("checkpoint"):
                state = stop.call(checkpoints.restore, meta.step, state, stage)
            self._say(f"{stage.name}: going on at step {meta.step} of {stage.steps}")
        if meta.step == 0:
            self._say(f"{stage.name}: {_count(state.params)} of {_count(params)} parameters train")
        if self.mesh.size > 1:
            self._say(f"{stage.name}: {self.divided[stage.index]}; state: {replicated}")
        step_fn = make_train_step(self.model, config, stage, self.mesh)
        progress = Progress(
            self.workdir.local,
            self.stages,
            stage,
            log_every=train.log_every,
            first_step=meta.step,
            elapsed=meta.elapsed,
            window=meta.window,
            watch=watch,
            write=self.main,
        )
        # Where schedules would be if all batches had had this one's size.
        schedule_start = meta.position - meta.step * stage.batch_size
        batches = self._batches(stage, meta.position, schedule_start)
        changed = last is not None and batches.fingerprint != last.clips
        if changed and not self.data.allow_changed_clips:
            batches.close()
            folders = ", ".join(s.path for s in self.data.mixed_sources() if s.path) or "none"
            raise UserError(
                f"the prepared clips ({folders}) are not those that {self.workdir} was "
                "trained on, so its data position means nothing in them: put those clips back, "
                "give another --workdir, or go on in the new ones with "
                "--config.data.allow_changed_clips=true"
            )
        if batches.encoders and not self.encoders_checked:
            check_encoders(params, batches.encoders)
            self.encoders_checked = True
        del params
        meta = dataclasses.replace(meta, clips=batches.fingerprint)
        check_same(
            f"what stage {stage.name} starts from",
            {"step": meta.step, "data position": meta.position, "prepared clips": meta.clips},
            "copy the same clips to all hosts",
        )
        agreement = Agreement(meta.elapsed, stop.signal)
        bad_steps = MetricsFile(self.workdir.local / "non_finite.jsonl")
        if self.main:
            earlier = [each.name for each in self.stages if each.index < stage.index]
            bad_steps.cut(earlier, stage.name, meta.step)
        non_finite = NonFinite(
            stage.name,
            policy=train.non_finite,
            max_skipped=train.max_skipped,
            batch_size=stage.batch_size,
            names=batches.names,
            write=bad_steps.write if self.main else lambda row: None,
        )
        # Steps on the device: number, position of the batch in the data, learning rate, metrics.
        in_flight: deque[tuple[int, int, float, dict[str, Array]]] = deque()

        def finish_steps(ahead: int) -> None:
            """Reads metrics until at most `ahead` steps are under way."""
            while len(in_flight) > ahead:
                at, first, rate, metrics = in_flight.popleft()
                metrics = agreement.take(watch.fetch(metrics)) | {"learning_rate": rate}
                watch.finished(at)
                told = non_finite.look(at, first, metrics, meta.step or None)
                if told:
                    self._say(told)
                if progress.step(at, metrics):
                    watch.logged(at)

        with closing(progress), closing(batches), watch.loop():
            step, saved = meta.step, True
            # The first step compiles: nothing is lost then that is not in a checkpoint.
            call = functools.partial(stop.call, watch.call)
            self.signal, elapsed = agreement.settled(stop.signal, meta.elapsed)
            share = _share(stage, meta.step, elapsed)
            while share < 1 and self.signal is None:
                with watch.waiting(in_flight[-1][-1] if in_flight else None):
                    batch = next(batches)
                rate = learning_rate(stage, train, step, share)
                state, metrics = call(step_fn, step, state, batch, *self._on_devices(rate, share))
                call = watch.call
                first = batches.next_index - stage.batch_size
                step, saved = step + 1, False
                votes = agreement.cast(stop.signal, progress.elapsed)
                in_flight.append((step, first, rate, metrics | votes))
                finish_steps(RUN_AHEAD)
                checkpoints.check()
                if train.sample_every and step % train.sample_every == 0:
                    with watch.phase("evaluation"):
                        self._sample(state, stage, step, progress, stop)
                # Read once: a checkpoint that is not the stage's last must not seem so later.
                self.signal, elapsed = agreement.settled(stop.signal, progress.elapsed)
                share = _share(stage, step, elapsed)
                due = step % train.checkpoint_every == 0 or self.signal is not None
                saved = due and share < 1
                if saved:
                    finish_steps(0)
                    meta = self._meta(meta, step, batches.next_index, elapsed, progress.window)
                    with watch.saving((stage.index, step)):
                        checkpoints.save(state, meta)
            finish_steps(0)
            if not saved:
                if share >= 1 and stage.objective == "reconstruct":
                    with watch.phase("evaluation"):
                        state = self._calibrate(state, stage)
                meta = self._meta(meta, step, batches.next_index, elapsed, progress.window)
                meta = dataclasses.replace(meta, done=share >= 1)
                with watch.saving((stage.index, step)):
                    checkpoints.save(state, meta)
        return meta, state.all_ema()

    def _batches(self, stage: Stage, position: int, stage_start: int) -> Batches:
        model, sharding = self.model, batch_sharding(self.mesh)
        return make_batches(
            self.data,
            seed=self.config.seed,
            batch_size=stage.batch_size,
            start_index=position,
            rows=local_rows(sharding, stage.batch_size),
            with_flow=stage.needs_flow,
            schedule_start=stage_start,
            with_picture=bool(model.image_encoder or model.augmentation),
            transfer=functools.partial(to_device, sharding=sharding, batch_size=stage.batch_size),
        )

    def _on_devices(self, *values: float) -> list[Float[Array, ""]]:
        """Numbers that are the same on every host, on all devices; hosts exchange nothing."""
        everywhere = replicated(self.mesh)
        with jax.transfer_guard_host_to_device("allow"):  # which JAX does not take for explicit
            return [
                jax.make_array_from_callback((), everywhere, lambda _, v=value: np.float32(v))
                for value in values
            ]

    def _calibrate(self, state: TrainState, stage: Stage) -> TrainState:
        """Gives latents zero mean and unit deviation per channel, over the data's first batches."""
        with closing(self._batches(stage, 0, 0)) as batches:
            videos = [next(batches).video for _ in range(self.config.train.calibration_batches)]
        latents = calibrate_latents(self.model, state.all_ema(), videos)
        return state._replace(frozen={**state.frozen, LATENTS: place(latents, self.mesh)})

    def _sample(
        self, state: TrainState, stage: Stage, step: int, progress: Progress, stop: Stop
    ) -> None:
        if self.sample_fn is None:
            return
        if jax.process_count() > 1:  # all together, or those who go on would wait for ever
            video = self.sample_fn(state.all_ema(), stage)
        else:
            try:
                video = stop.call(self.sample_fn, state.all_ema(), stage)
            except Stopped:
                return
        progress.video("samples", video, self.data.fps, step)
        if self.main:
            folder = self.workdir.local / "samples"
            folder.mkdir(exist_ok=True)
            side_by_side = rearrange(video, "b t h w c -> t h (b w) c")
            write_video(folder / f"{stage.label}_{step:07d}.mp4", side_by_side, self.data.fps)

    def _meta(
        self, meta: Meta, step: int, position: int, elapsed: float, window: Sequence[float]
    ) -> Meta:
        return dataclasses.replace(
            meta,
            config=self.plain,
            step=step,
            position=position,
            elapsed=elapsed,
            window=list(window),
            **self.origin,
        )

    def _say(self, text: str) -> None:
        if self.main:
            print(text, flush=True)


def _check(config: ml_collections.ConfigDict, stages: Sequence[Stage]) -> None:
    train = config.train
    for key in ("log_every", "checkpoint_every", "keep", "accumulate", "calibration_batches"):
        if train[key] < 1:
            raise UserError(f"train.{key} must be at least 1, got {train[key]}")
    if train.keep_every < 0:
        raise UserError(f"train.keep_every must be 0 (none) or more, got {train.keep_every}")
    if train.decay not in DECAYS:
        raise UserError(f"train.decay must be one of {DECAYS}, got {train.decay!r}")
    for stage in stages:
        if config.data.get("format", "video") == "latents" and stage.objective == "reconstruct":
            raise UserError(
                f"stages.{stage.name} trains the autoencoder, which takes pictures: leave it out "
                'of curriculum, or set data.format="video"'
            )
        if stage.batch_size % train.accumulate:
            raise UserError(
                f"stages.{stage.name}.batch_size={stage.batch_size} must be a multiple of "
                f"train.accumulate={train.accumulate}"
            )


def _share(stage: Stage, step: int, elapsed: float) -> float:
    """Share of the stage that is done; a function of the step alone if there is no time budget."""
    share = step / stage.steps
    if stage.time_budget_minutes:
        share = max(share, elapsed / (60 * stage.time_budget_minutes))
    return min(1.0, share)


def _count(params: Params) -> str:
    return f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,}"
