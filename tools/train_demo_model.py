"""Train the demo checkpoint from scratch on CPU: a small, real LLaVA-OneVision model.

    python tools/train_demo_model.py --output models/demo

First the SigLIP tower learns what each patch shows (kind, colour, place; four minutes, heads thrown away).
Then the whole model learns to answer, the tower at a fraction of the learning rate; corpus.STAGES says what is
asked when. About seven hours on two cores. Each worker is one single-threaded process; gradients are averaged
with gloo. On a shared machine this is faster than threads: those wait for each other in busy loops, and lose most of
their speed when another program takes a core.

Step n of worker w draws its data from the seed (seed, w, n), so a resumed run sees what an unbroken one
would have seen. Ctrl-C (or SIGTERM) saves and ends; the same command with --resume goes on. The result is
the same on the same machine up to the order of float sums; other workers or hardware give other weights.

A further stage (write it into STEPS, RATE and corpus.STAGES first) begins with the published weights and a new
optimizer:

    python tools/train_demo_model.py --output build/demo-model --start models/demo --at STEP
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VISION_STEPS = 2000
VISION_ROWS = 40
ROWS = 24  # rows per step, over all workers
MICRO_ROWS = 6
LEARNING_RATE = 1.2e-3
VISION_SHARE = (
    0.1  # of the learning rate, for the tower in the second stage; a higher rate at first unlearns the shapes
)
LATE_VISION_SHARE, LATE_STEP = 0.25, 1200
SMALL_VISION_SHARE, SMALL_STEPS = 0.6, range(6400, 7200)
STEPS = 14800
# (step, share of the learning rate), linear in between. It rises again where the last thirteen runs begin.
RATE = (
    *((0, 0.0), (108, 1.0), (1250, 1.0), (1600, 0.62), (2100, 0.29), (2110, 0.6), (2800, 0.0)),
    *((2850, 0.5), (3600, 0.0), (3650, 0.5), (5000, 0.0), (5050, 0.5)),
    *((6400, 0.0), (6440, 0.45), (7200, 0.0), (7240, 0.45), (7900, 0.0)),
    *((7940, 0.5), (9300, 0.0), (9340, 0.45), (10100, 0.0), (10140, 0.45), (10900, 0.0)),
    *((10940, 0.45), (12000, 0.0), (12040, 0.45), (12900, 0.0), (12940, 0.45), (13700, 0.0), (13760, 0.45)),
    (STEPS, 0.0),
)
SAVE_EVERY = 200
PRINT_EVERY = 100


@dataclasses.dataclass(frozen=True)
class Job:
    """One run. start: a checkpoint whose weights it begins with, at step `at`; meeting_point: file through which the
    workers find each other.
    """

    output: Path
    state: Path
    steps: int
    seed: int
    workers: int
    resume: bool
    start: Path | None
    at: int
    meeting_point: str


def learning_rate(step: int, steps: int) -> float:
    """The rate at a step; a run of another length than STEPS goes through the same shape."""
    at = (step + 1) * STEPS / steps
    for (start, low), (end, high) in itertools.pairwise(RATE):
        if at <= end:
            return LEARNING_RATE * (low + (high - low) * (at - start) / (end - start))
    return 0.0


def vision_share(step: int) -> float:
    """Of the learning rate, for the tower."""
    if step in SMALL_STEPS:
        return SMALL_VISION_SHARE
    return LATE_VISION_SHARE if step >= LATE_STEP else VISION_SHARE


class Progress:
    """One line that is rewritten on a terminal; a line now and then elsewhere."""

    def __init__(self, what: str, first: int, total: int, shown: bool) -> None:
        self.what, self.first, self.total, self.shown, self.start = what, first, total, shown, time.monotonic()

    def __call__(self, step: int, note: str) -> None:
        tty = sys.stderr.isatty()
        if not self.shown or not (tty or step % PRINT_EVERY == 0 or step == self.total):
            return
        spent = time.monotonic() - self.start
        left = spent / max(1, step - self.first) * (self.total - step)
        line = f"{self.what} {step}/{self.total}  {note}  {spent / 60:.1f} min, {left / 60:.1f} left"
        print(
            f"\r\x1b[K{line}" if tty else line,
            end="" if tty and step < self.total else "\n",
            file=sys.stderr,
            flush=True,
        )


def keep_memory() -> None:
    """Ask glibc not to hand freed blocks back to the kernel: the same sizes come again every step."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option, value in (
            (-3, 1 << 30),
            (-1, (1 << 31) - 1),
            (-2, 1 << 28),
        ):  # mmap threshold, trim threshold, top pad
            mallopt(option, value)


class Gradients:
    """Averages the gradients of all workers, and tells all of them whether one was asked to stop."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.asked = False
        self.stop = False

    def average(self, parameters: Sequence[Any]) -> None:
        import torch
        import torch.distributed as dist

        own = [p for p in parameters if p.grad is not None]
        flag = torch.tensor([float(self.asked)])
        if self.workers == 1:
            self.stop = self.asked
            return
        flat = torch.cat([p.grad.flatten() for p in own] + [flag])
        dist.all_reduce(flat)
        self.stop = flat[-1].item() > 0
        for p, grad in zip(own, flat[:-1].div_(self.workers).split([p.numel() for p in own]), strict=True):
            p.grad.copy_(grad.view_as(p))


def train_vision(model: Any, job: Job, rank: int, gradients: Gradients) -> bool:
    """First stage: what does each patch show, and where is it? False: it was interrupted."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from demo_world.corpus import vision_scene
    from demo_world.scenes import COLOURS, KINDS, patch_labels, render
    from demo_world.tiling import SIDE, patch_centres, tiles

    tower = model.model.vision_tower
    width = model.config.vision_config.hidden_size
    torch.manual_seed(job.seed + 1)
    kind_head, colour_head, place_head = (
        torch.nn.Linear(width, n) for n in (len(KINDS) + 1, len(COLOURS) + 1, SIDE * SIDE)
    )
    smooth = (0.0, 0.0)
    parameters = [p for module in (tower, kind_head, colour_head, place_head) for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, weight_decay=0.01)
    empty_counts_less = torch.tensor([0.3] + [1.0] * len(KINDS))
    progress = Progress("vision", 0, VISION_STEPS, rank == 0)
    for step in range(VISION_STEPS):
        rng = random.Random(f"vision {job.seed} {rank} {step}")
        scenes = [vision_scene(rng) for _ in range(VISION_ROWS // job.workers)]
        pixels = torch.from_numpy(np.concatenate([tiles(render(s)) for s in scenes]))
        shown = np.concatenate([patch_labels(s, *patch_centres(s.height, s.width)) for s in scenes])
        labels = torch.from_numpy(shown).flatten(0, 1)
        with torch.autocast("cpu", torch.bfloat16):
            features = tower(pixels, output_hidden_states=True).hidden_states[-1].flatten(0, 1)
            kinds, colours, places = kind_head(features), colour_head(features), place_head(features)
        own_place = torch.arange(SIDE * SIDE).repeat(len(pixels))
        loss = F.cross_entropy(kinds.float(), labels[:, 0], empty_counts_less) + F.cross_entropy(
            colours.float(), labels[:, 1]
        )
        loss = loss + 0.3 * F.cross_entropy(places.float(), own_place)
        optimizer.zero_grad()
        loss.backward()
        gradients.average(parameters)
        if gradients.stop:
            return False
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 40) * (1 - step / VISION_STEPS) + 1e-6
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        filled = labels[:, 0] > 0
        now = (
            (kinds.argmax(-1) == labels[:, 0])[filled].float().mean().item(),
            (colours.argmax(-1) == labels[:, 1])[filled].float().mean().item(),
        )
        smooth = now if step == 0 else (0.95 * smooth[0] + 0.05 * now[0], 0.95 * smooth[1] + 0.05 * now[1])
        progress(step + 1, f"loss {loss.item():.3f}, patch kind {smooth[0]:.3f}, colour {smooth[1]:.3f}")
    return True


def make_optimizer(model: Any) -> Any:
    import torch

    tower = list(model.model.vision_tower.parameters())
    in_tower = set(map(id, tower))
    others = [p for p in model.parameters() if id(p) not in in_tower]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": 0.05, "tower": False},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0, "tower": False},
        {"params": tower, "weight_decay": 0.01, "tower": True},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))


def answer_loss(model: Any, batch: Any) -> tuple[Any, int, int]:
    """(summed cross-entropy over answer tokens, right ones, all of them)."""
    import torch
    import torch.nn.functional as F

    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            pixel_values=batch.pixel_values,
            pixel_values_videos=batch.pixel_values_videos,
            image_sizes=batch.image_sizes,
            batch_num_images=batch.batch_num_images,
            use_cache=False,
        ).last_hidden_state[batch.learn]
        logits = model.lm_head(hidden).float()
    targets = batch.input_ids.roll(-1, 1)[batch.learn]
    return F.cross_entropy(logits, targets, reduction="sum"), (logits.argmax(-1) == targets).sum().item(), len(targets)


def save_state(job: Job, model: Any, optimizer: Any, step: int) -> None:
    import torch

    beside = job.state.with_suffix(".part")
    torch.save(
        {"step": step, "seed": job.seed, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, beside
    )
    beside.replace(job.state)


def work(rank: int, job: Job) -> None:
    """One worker, from the first step to the last."""
    keep_memory()
    import torch
    import torch.distributed as dist
    import transformers
    from demo_world.checkpoint import build_model, build_processor, build_tokenizer
    from demo_world.corpus import batch_kinds, make_row
    from demo_world.packing import Packer

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    gradients = Gradients(job.workers)
    if rank == 0:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: setattr(gradients, "asked", True))
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # worker 0 tells this one; if worker 0 dies, all_reduce raises
    if job.workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{job.meeting_point}", rank=rank, world_size=job.workers)

    tokenizer = build_tokenizer()
    model = build_model(tokenizer, job.seed)
    model.train()
    optimizer = make_optimizer(model)
    first = 0
    if job.resume:
        state = torch.load(job.state, weights_only=True)
        if state["seed"] != job.seed:
            raise SystemExit(f"{job.state}: was started with --seed {state['seed']}; resume it with that seed")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    elif job.start:
        published = transformers.AutoModelForImageTextToText.from_pretrained(job.start, dtype=torch.float32)
        model.load_state_dict(published.state_dict())
        first = job.at
    elif not train_vision(model, job, rank, gradients):
        return
    elif rank == 0:
        save_state(job, model, optimizer, 0)

    packer = Packer(tokenizer)
    parameters = list(model.parameters())
    progress = Progress("answers", first, job.steps, rank == 0)
    smooth = 0.0
    for step in range(first, job.steps):
        kinds = batch_kinds(random.Random(f"kinds {job.seed} {step}"), ROWS, step)[rank :: job.workers]
        rng = random.Random(f"rows {job.seed} {rank} {step}")
        rows = sorted((make_row(rng, kind, step) for kind in kinds), key=lambda r: (not r.pictures, packer.length(r)))
        optimizer.zero_grad()
        loss_sum, right, count = 0.0, 0, 0
        for start in range(0, len(rows), MICRO_ROWS):  # similar lengths together: little padding
            loss, good, tokens = answer_loss(model, packer.batch(rows[start : start + MICRO_ROWS]))
            (loss / (40 * len(rows))).backward()
            loss_sum, right, count = loss_sum + loss.item(), right + good, count + tokens
        gradients.average(parameters)
        for group in optimizer.param_groups:
            share = vision_share(step) if group["tower"] else 1.0
            group["lr"] = learning_rate(step, job.steps) * share
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        smooth = right / count if step == first else 0.98 * smooth + 0.02 * right / count
        progress(step + 1, f"loss {loss_sum / count:.3f}, token accuracy {smooth:.4f}")
        done = step + 1
        if rank == 0 and (gradients.stop or done % SAVE_EVERY == 0 or done == job.steps):
            save_state(job, model, optimizer, done)
        if gradients.stop and done < job.steps:
            if rank == 0:
                print(f"\nstopped after step {done}; go on with --resume", file=sys.stderr)
            return
    if rank == 0:
        save_checkpoint(model, build_processor(tokenizer), job.output)
        print(f"wrote {job.output}", file=sys.stderr)


def save_checkpoint(model: Any, processor: Any, output: Path) -> None:
    """Write the Hugging Face folder (float16), beside the target first so that a half-written one is never seen."""
    with tempfile.TemporaryDirectory(dir=output.parent) as beside:
        model.eval().half().save_pretrained(beside)
        processor.save_pretrained(beside)
        output.mkdir(exist_ok=True)
        for file in Path(beside).iterdir():
            file.chmod(0o644)
            shutil.move(file, output / file.name)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for the checkpoint; other files in it are kept"
    )
    parser.add_argument("--state", type=Path, help="training state for --resume (default: OUTPUT.training.pt)")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the second stage (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers", type=int, default=2, help="single-threaded processes, one per core (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the training state")
    parser.add_argument(
        "--start", type=Path, metavar="CHECKPOINT", help="begin with its weights and a new optimizer, at step --at"
    )
    parser.add_argument("--at", type=int, default=0, help="the first step with --start")
    args = parser.parse_args(argv)
    state = args.state or args.output.with_name(args.output.name + ".training.pt")
    if args.resume and not state.is_file():
        parser.error(f"{state}: no training state to resume; start without --resume")
    if args.start and not args.start.is_dir():
        parser.error(f"--start {args.start}: no such folder")
    if bool(args.start) != bool(args.at) or not 0 <= args.at < args.steps:
        parser.error(f"--at {args.at}: with --start, the first step, below {args.steps}")
    if args.workers < 1 or ROWS % args.workers or VISION_ROWS % args.workers:
        parser.error(f"--workers {args.workers}: must divide {ROWS} and {VISION_ROWS}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            args.output,
            state,
            args.steps,
            args.seed,
            args.workers,
            args.resume,
            args.start,
            args.at,
            meeting_point=f"{folder}/meeting-point",
        )
        spawn = multiprocessing.get_context("spawn")
        others = [spawn.Process(target=work, args=(rank, job), daemon=True) for rank in range(1, args.workers)]
        for process in others:
            process.start()
        try:
            work(0, job)
        finally:
            for process in others:
                process.join(timeout=20)
                if process.is_alive():
                    process.terminate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
