"""Train a small Flax transformer on the characters of real English text: the help topics that Python carries.

    python examples/char_lm.py
    python examples/char_lm.py --rule adamw --ema 0.99 --tensorboard
    python examples/char_lm.py --guard --nan-rate 0.01
    python examples/char_lm.py --checkpoint runs/checkpoints             # stopped? the same command with --resume
    python examples/char_lm.py --devices 8 --mesh data=4,model=2 --zero1 --accumulate 2
    python examples/char_lm.py --scale 124m --dtype bfloat16 --remat --mesh data=8 --fsdp      # on accelerators

The text is `pydoc_data.topics`, of which the last tenth is held out; the model is in char_model.py. Writes
metrics.jsonl (a line a step, and one for each evaluation), samples.txt and loss.png into --out.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import math
import pathlib
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from typing import Any, NoReturn

import jax
import numpy as np
import optax
from char_model import PRESETS, Config, Corpus, batch_at, build, corpus, evaluator, sampler, split
from jax.sharding import Mesh
from rich.progress import BarColumn, Progress, TextColumn

import jaxsgd
from jaxsgd.plot import loss_curves, save

RULE, RATE = "muon", 3e-2
"""The default rule, and a learning rate that works for it here."""

SCHEDULES = {
    "constant": lambda rate, steps: rate,
    "cosine": lambda rate, steps: optax.cosine_decay_schedule(rate, steps),
    "linear": lambda rate, steps: optax.linear_schedule(rate, 0.0, steps),
    "warmup_cosine": lambda rate, steps: optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 20), steps),
}


class Log:
    """metrics.jsonl, samples.txt and TensorBoard's events, if asked for; a resumed run keeps those up to ``first``."""

    def __init__(self, out: pathlib.Path, first: int, tensorboard: str | None) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.records: list[dict[str, Any]] = []
        self.metrics, self.samples, self.board = out / "metrics.jsonl", out / "samples.txt", None
        if tensorboard is not None:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise ImportError("--tensorboard needs tensorboardX: pip install 'jaxsgd[examples]'") from None
            self.board = SummaryWriter(tensorboard or str(out / "tensorboard"), purge_step=first + 1 if first else None)
        old = self.metrics.read_text().splitlines() if first and self.metrics.exists() else []
        for file in (self.metrics, self.samples):
            file.write_text("")
        for line in old:
            with contextlib.suppress(ValueError):  # a kill can cut the last line short
                record = json.loads(line)
                if record.get("step", math.inf) <= first:
                    self.put(record)

    def put(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        with self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if "sample" in record:
            with self.samples.open("a") as file:
                file.write(f"=== after {record.get('step', 'all')} steps\n{record['sample']}\n")

    def write(self, records: Iterable[dict[str, Any]]) -> None:
        for record in records:
            self.put(record)
            if self.board is None or "step" not in record:
                continue
            for name, value in record.items():
                if name == "sample":
                    self.board.add_text(name, value, record["step"])
                elif math.isfinite(value):
                    self.board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


class Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Train a Flax transformer on the characters of Python's help topics.")
    add = parser.add_argument
    add("--scale", choices=PRESETS, default="small", help="the sizes, of which the next flags replace some")
    for name in ("layers", "width", "heads", "context", "batch-size"):
        add(f"--{name}", type=int)
    add("--dropout", type=float)
    add("--dtype", choices=("float32", "bfloat16"), help="of the arithmetic")
    add("--param-dtype", choices=("float32", "bfloat16"), help="of the parameters; bfloat16 ones are rounded at random")
    add("--remat", action="store_true", default=None, help="compute activations anew in the backward pass")
    add("--rule", default=RULE, help=f"one of {', '.join(sorted(jaxsgd.RULES))}")
    add("--learning-rate", type=float, help=f"the peak. Default: {RATE:g} for {RULE}, else 3 times the usual rate")
    add("--schedule", choices=sorted(SCHEDULES), help="warmup_cosine; constant for schedule-free rules")
    add("--clip", type=float, default=1.0, help="the largest norm of the gradients")
    add("--steps", type=int, default=600)
    add("--seed", type=int, default=0, help="of weights, batches and samples")
    add("--out", type=pathlib.Path, default=pathlib.Path("runs/char_lm"))
    add("--accumulate", type=int, default=1, help="microbatches that a batch is computed in")
    add("--guard", action="store_true", help="skip the steps whose loss or gradients are not finite")
    add("--nan-rate", type=float, default=0.0, help="the share of batches whose loss is made NaN, to see the guard")
    add("--ema", type=float, help="the decay of an average of the parameters, which is then evaluated")
    add("--mesh", help="data=4,model=2: batches split over data, heads and hidden units over model")
    add("--devices", type=int, help="so many devices of the CPU, to try a mesh without accelerators")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--zero1", action="store_true", help="split the optimizer's state over data")
    parts.add_argument("--fsdp", action="store_true", help="split parameters and state over data")
    add("--checkpoint", type=pathlib.Path, help="a directory for checkpoints; SIGTERM saves and leaves")
    add("--checkpoint-every", type=int, default=100)
    add("--keep", type=int, default=3, help="checkpoints that remain")
    add("--resume", action="store_true", help="go on from the newest checkpoint")
    add("--sample-every", type=int, default=200, help="steps between samples of text with the validation loss")
    add("--sample-length", type=int, default=300)
    add("--temperature", type=float, default=0.7, help="of the samples; 0 takes the likeliest character")
    add("--tensorboard", nargs="?", const="", metavar="DIR", help="write TensorBoard logs, by default in --out")
    return parser.parse_args(argv)


def configure(args: argparse.Namespace, text: Corpus) -> Config:
    """The preset with what the flags replace. Raises ValueError for what does not fit."""
    given = {f.name: getattr(args, f.name, None) for f in fields(Config)}
    config = replace(PRESETS[args.scale], **{name: value for name, value in given.items() if value is not None})
    positive = ("steps", "accumulate", "checkpoint_every", "keep", "sample_every", "sample_length")
    sizes = {name: getattr(args, name) for name in positive} | asdict(config)
    for name, value in sizes.items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: at least 1 is needed")
    if config.width % (2 * config.heads):
        raise ValueError(f"--heads {config.heads}: an even share of --width {config.width} is needed for each")
    if config.context >= len(text.validation):
        raise ValueError(f"--context {config.context}: the text for validation has {len(text.validation)} characters")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"--dropout {config.dropout}: it must lie in [0, 1)")
    if not 0 <= args.nan_rate <= 1 or not args.temperature >= 0:
        raise ValueError(f"--nan-rate {args.nan_rate} must lie in [0, 1], --temperature {args.temperature} from 0 on")
    return config


def mesh_of(args: argparse.Namespace, config: Config) -> Mesh | None:
    """The mesh that the flags ask for, or None. Raises ValueError for one that does not fit."""
    if args.devices is not None:
        with contextlib.suppress(RuntimeError):  # too late to change; counted below
            jax.config.update("jax_num_cpu_devices", args.devices)
    there = jax.devices()
    if len(there) < (args.devices or 1):
        raise ValueError(f"--devices {args.devices}: this process has {len(there)} already")
    if args.mesh is None and (args.zero1 or args.fsdp or args.devices):
        raise ValueError("--devices, --zero1 and --fsdp need --mesh, for example --mesh data=8")
    sizes = {"data": 1}
    for part in [] if args.mesh is None else args.mesh.split(","):
        name, _, size = part.partition("=")
        if name not in ("data", "model") or not size.isdigit() or int(size) < 1:
            raise ValueError(f"--mesh {args.mesh}: {part!r} is not data=NUMBER or model=NUMBER")
        sizes[name] = int(size)
    count = math.prod(sizes.values())
    if count > len(there):
        raise ValueError(f"--mesh {args.mesh}: {count} devices are needed, {len(there)} are there (see --devices)")
    if config.heads % sizes.get("model", 1):
        raise ValueError(f"--mesh {args.mesh}: {config.heads} heads do not divide by model={sizes['model']}")
    parts = sizes["data"] * args.accumulate
    if config.batch_size % parts:
        below = config.batch_size // parts * parts
        near = f"{below} or {below + parts}" if below else str(parts)
        raise ValueError(
            f"--batch-size {config.batch_size}: it does not divide by data={sizes['data']} times "
            f"--accumulate {args.accumulate}; {near} would"
        )
    return None if args.mesh is None else Mesh(np.reshape(there[:count], tuple(sizes.values())), tuple(sizes))


def optimizer(args: argparse.Namespace, config: Config, mesh: Mesh | None) -> optax.GradientTransformationExtraArgs:
    """The rule on its schedule with what the flags put around it. Raises ValueError, KeyError for what does not fit."""
    rule = jaxsgd.RULES[args.rule]
    # A transformer of this size takes three times the rate at which a search begins.
    usual = RATE if args.rule == RULE else 3 * (rule.usual_rate or 1e-3)
    rate = usual if args.learning_rate is None else args.learning_rate
    rule(rate)  # a schedule would hide a bad rate
    # A rule that is evaluated at an average of its iterates needs no decay.
    averages = any(slot.role is not None for slot in rule.slots.values())
    schedule = args.schedule or ("constant" if averages else "warmup_cosine")
    extras: dict[str, Any] = {"rounding": "stochastic"} if config.param_dtype == "bfloat16" else {}
    if mesh is not None and "mesh" in inspect.signature(rule).parameters:
        extras["mesh"] = mesh  # Muon's kind: gather each matrix once
    parts = [jaxsgd.clip_by_global_norm(args.clip), rule(SCHEDULES[schedule](rate, args.steps), **extras)]
    if args.ema is not None:
        parts.append(jaxsgd.params_ema(args.ema))
    tx = optax.chain(*parts)
    return jaxsgd.guard(tx) if args.guard else tx


def open_checkpoints(args: argparse.Namespace) -> Any:
    """The checkpoints, or None. Raises ValueError, OSError, ImportError where they cannot be used as asked."""
    if args.checkpoint is None:
        if args.resume:
            raise ValueError("--resume: say from where, by --checkpoint DIR")
        return None
    try:
        from jaxsgd.checkpoint import Checkpoints
    except ImportError:
        raise ImportError("--checkpoint needs orbax: pip install 'jaxsgd[checkpoint]'") from None
    checkpoints = Checkpoints(args.checkpoint, keep=args.keep, every=args.checkpoint_every)
    if checkpoints.latest is not None and not args.resume:
        raise ValueError(
            f"--checkpoint {args.checkpoint}: it holds step {checkpoints.latest}; --resume, or name another"
        )
    return checkpoints


def plan_inputs(argv: list[str], mesh: Mesh) -> dict[str, Any]:
    """What ``jaxsgd plan examples/char_lm.py`` plans."""
    args = parse(argv)
    config = configure(args, corpus())
    built = build(config)
    # What may be tried where it does not fit.
    more = {} if config.remat else {"remat": {"step_or_loss": build(replace(config, remat=True)).loss_fn}}
    return {
        "step_or_loss": built.loss_fn, "params": built.init, "tx": optimizer(args, config, mesh), "batch": built.batch,
        "specs": split(mesh, args.fsdp), "zero1": "data" if args.zero1 else None, "accumulate": args.accumulate,
        "variants": more,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> float:
    """Train, write the files, and return the validation loss in nats per character."""
    args = parse(argv)
    text = corpus()
    try:
        config = configure(args, text)
        mesh = mesh_of(args, config)
        tx = optimizer(args, config, mesh)
        built = build(config)
        specs, zero1 = (None if mesh is None else split(mesh, args.fsdp)), ("data" if args.zero1 else None)
        checkpoints = open_checkpoints(args)
        state = jaxsgd.TrainState.create(jax.jit(built.init), tx, key=args.seed, mesh=mesh, specs=specs, zero1=zero1)
        drawn, first = {"seed": args.seed, "batch_size": config.batch_size, "context": config.context}, 0
        if checkpoints is not None and checkpoints.latest is not None:
            state, found, first, _ = checkpoints.restore(state)
            for name, value in drawn.items():
                if found[name] != value:
                    raise ValueError(f"--resume: the checkpoint was made with {name}={found[name]}, now it is {value}")
        step = jaxsgd.make_step(built.loss_fn, tx, mesh=mesh, accumulate=args.accumulate)
        jax.eval_shape(step.fn, state, built.batch)  # a rule that needs more than this loop gives it says so here
        log = Log(args.out, first, args.tensorboard)
    except (ImportError, KeyError, OSError, ValueError) as error:
        print(f"char_lm: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)

    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(f"{args.rule}, {count:,} parameters, steps {first} to {args.steps}, {len(text.train):,} characters")
    evaluate = evaluator(config, text.validation, mesh)
    sample = sampler(config, len(text.characters), args.sample_length, args.temperature)
    recorder = jaxsgd.Recorder(every=20)
    columns = (
        TextColumn("step {task.completed}/{task.total}"), BarColumn(bar_width=16),
        TextColumn("loss {task.fields[loss]:.3f} {task.fields[bits_per_char]:.2f} bits/char"),
        TextColumn("lr {task.fields[learning_rate]:.1e} {task.fields[speed]:,.0f} tokens/s{task.fields[note]}"),
    )  # fmt: skip
    shown = dict.fromkeys(("loss", "bits_per_char", "learning_rate", "speed"), math.nan)

    def judge(done: int) -> dict[str, Any]:
        params = state.eval_params
        loss = evaluate(params)
        new = sample(params, text.validation[: config.context], jax.random.fold_in(jax.random.key(args.seed), done))
        return {"validation_loss": loss, "validation_bits_per_char": loss / math.log(2), "sample": text.text(new)}

    with contextlib.ExitStack() as stack:
        stack.callback(log.close)
        if checkpoints is not None:
            stack.enter_context(checkpoints)
        stack.callback(lambda: log.write(recorder.flush()))  # whatever ends the loop
        bar = stack.enter_context(Progress(*columns))
        task = bar.add_task("", total=args.steps, completed=first, note="", **shown)
        begin = then = time.perf_counter()
        compile_seconds = 0.0

        def tell(records: Iterable[dict[str, Any]]) -> None:
            nonlocal then
            records = list(records)
            log.write(records)
            if records:
                now, last = time.perf_counter(), records[-1]
                shown.update({name: last[name] for name in shown if name in last})
                shown["speed"] = len(records) * config.batch_size * config.context / (now - then)
                note = f" skipped {last['skipped']:.0f}" if args.guard else ""
                bar.update(task, completed=last["step"], note=note, **shown)
                then = now

        for done in range(first + 1, args.steps + 1):
            state, metrics = step(state, batch_at(done - 1, text.train, config, args.seed, args.nan_rate))
            if not compile_seconds:
                jax.block_until_ready(state)
                compile_seconds = time.perf_counter() - begin
                then = time.perf_counter()
            tell(recorder.add(metrics))
            if done % args.sample_every == 0 and done < args.steps:
                tell(recorder.flush())
                record = {"step": done, **judge(done)}
                log.write([record])
                words = f"after {done} steps, validation loss {record['validation_loss']:.3f}:\n{record['sample']}\n"
                bar.console.print(words, markup=False, highlight=False)
                then = time.perf_counter()
            if checkpoints is not None:
                if done % args.checkpoint_every == 0:
                    tell(recorder.flush())  # before the checkpoint: what it holds the resumed run does not record
                position = {"batch": done, **drawn}
                checkpoints.after(done, state, data=position)
                if done == args.steps and done % args.checkpoint_every:
                    checkpoints.save(state, data=position, step=done)
        tell(recorder.flush())
        train_seconds = time.perf_counter() - begin - compile_seconds
        summary = {**judge(args.steps), "steps": args.steps, "compile_s": compile_seconds, "train_s": train_seconds}
        log.write([summary])

    loss = summary["validation_loss"]
    losses = np.array([(r["step"], r["loss"]) for r in log.records if math.isfinite(r.get("loss", math.nan))])
    judged = np.array([(r.get("step", args.steps), r["validation_loss"]) for r in log.records if "sample" in r])
    means = [part.mean(0) for part in np.array_split(losses, max(1, min(len(losses), 100))) if len(part)]
    curves: Any = {f"training loss, {args.rule}": np.reshape(means, (-1, 2)).T, "validation loss": judged.T}
    curves = {name: tuple(curve) for name, curve in curves.items() if curve.size}
    title = f"Characters of Python's help: {args.rule}, validation {loss:.3f} nats = {loss / math.log(2):.3f} bits"
    picture = save(loss_curves(curves, title=title, ylabel="nats per character", log=False), args.out / "loss.png")
    print(f"{summary['sample']}\n")
    if args.guard:
        print(f"guard: {jaxsgd.guard_report(state.opt_state)['verdict']}")
    print(f"validation loss {loss:.4f} nats, {loss / math.log(2):.4f} bits per character")
    print(f"compile {compile_seconds:.1f} s, train {train_seconds:.1f} s")
    print(f"wrote {picture}, {args.out / 'metrics.jsonl'} and {args.out / 'samples.txt'}")
    return loss


if __name__ == "__main__":
    main()
