"""Planner: predicted peak memory and tokens per second against the measured training step.

    python benchmarks/planner.py [--only llama-100m nanochat-d12] [--json planner.json] [--tiny]
    python benchmarks/planner.py --again planner.json    # what was measured, against today's predictions

Cases come in waves of three, in the order given: each compiles in a process of its own, side by side, and
when all of a wave are ready or over their time they are measured one by one, with nothing else at work. No
wave starts after `--seconds`. What is measured is the training step of `tessera pretrain` on random tokens:
micro-batches forward and backward under autocast, the norm clipped, the update; compiled except where a row
says eager. Peak memory is what the allocator had handed out at most in a step; tokens per second are of the
median step. Predicted are both from the card's sheet, and from its own probes as `tessera plan --gpu here`
makes them. `--json`, written after each case, also keeps peaks of the step's phases and milliseconds by kind
of kernel, from which the constants in `training/planner/throughput.py` were taken (rows that say "fitted").
"""

import argparse
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
import transformers
from step_times import step_times
from workers import start_workers

from tessera import TesseraConfig, TesseraForCausalLM
from tessera.training.optimizers import build_optimizer
from tessera.training.planner.cards import CARDS
from tessera.training.planner.memory import Setup, estimate_memory, take_inventory
from tessera.training.planner.throughput import estimate_times, rates_here, rates_of
from tessera.training.step import gradient_norm, take_step

WAVE = 3  # cases that compile side by side: a dozen took longer than one after the other, and lost all
MEASURING = 60.0  # seconds after which a case that is being measured is given up


@dataclass(frozen=True)
class Case:
    """A configuration and how it is trained."""

    name: str
    preset: str
    micro: int
    length: int
    optimizer: str = "adamw"
    accumulation: int = 1
    weights: str = "fp32"
    compiled: bool = True
    every: int = 0  # layers are checkpointed; 0 for none
    fields: tuple = ()  # laid over the preset
    used: bool = False  # whether constants were fitted to it


MEDIUM = (("hidden_size", 1024), ("num_hidden_layers", 24), ("num_attention_heads", 16))
LARGE = (("hidden_size", 2048), ("num_hidden_layers", 16), ("num_attention_heads", 32))
LARGE_GROUPS = (("num_key_value_heads", 8), ("intermediate_size", 8192), ("max_position_embeddings", 4096))
SMALL = (("hidden_size", 512), ("num_hidden_layers", 8), ("num_attention_heads", 8))

# Two dialects in three sizes, then what else there is.
CASES = (
    Case(
        "llama-60m",
        "llama-100m",
        32,
        1024,
        fields=(*SMALL, ("num_key_value_heads", 8), ("intermediate_size", 1536)),
    ),
    Case("nanochat-d8", "nanochat-d8", 32, 1024, "muon"),
    Case("llama-100m", "llama-100m", 16, 2048, accumulation=2, used=True),
    Case("nanochat-d12", "nanochat-d12", 16, 2048, "muon", used=True),
    Case(
        "llama-350m",
        "llama-100m",
        8,
        2048,
        "muon",
        fields=(*MEDIUM, ("num_key_value_heads", 16), ("intermediate_size", 2816)),
    ),
    Case("nanochat-d20", "nanochat-d20", 8, 2048, "muon", accumulation=2),
    Case("gpt2-124m", "gpt2-124m", 30, 1024),
    Case("llama-1.1b", "llama-100m", 4, 4096, weights="bf16", fields=LARGE + LARGE_GROUPS),
    Case("bytegpt", "bytegpt", 32, 1024, accumulation=2),
    Case("llama-100m eager", "llama-100m", 16, 2048, compiled=False),
    Case("nanochat-d12 eager", "nanochat-d12", 8, 2048, "muon", compiled=False),
    Case("llama-100m every 2nd", "llama-100m", 16, 2048, every=2),
)


class Step:
    """A training step of a case, and what it takes."""

    def __init__(self, case: Case, device: str, tiny: bool):
        torch.manual_seed(0)
        torch._dynamo.reset()
        self.case, self.device, self.cuda = case, device, device == "cuda"
        fields = dict(case.fields)
        preset = case.preset
        if tiny:
            preset, fields = f"{case.preset.split('-')[0]}-tiny", {}
        self.micro, self.length = (2, 64) if tiny else (case.micro, case.length)
        config = TesseraConfig.from_preset(preset, **fields)
        dtype = torch.bfloat16 if case.weights == "bf16" else torch.float32
        with torch.device(device):
            self.model = TesseraForCausalLM(config).to(dtype).train()
        if case.every:
            self.model.gradient_checkpointing_enable()
            for layer in self.model.model.layers:
                layer.gradient_checkpointing = layer.layer_idx % case.every == 0
        self.optimizer = build_optimizer(self.model, case.optimizer)
        self.forward = torch.compile(self.model, dynamic=False) if case.compiled else self.model
        shape = (case.accumulation, self.micro, self.length)
        self.ids = torch.randint(0, config.vocab_size, shape, device=device)
        self.tokens = self.ids.numel()
        self.peaks = {}

    def autocast(self):
        if self.case.weights == "bf16":
            return nullcontext()
        return torch.autocast(self.device, torch.bfloat16)

    def __call__(self, watch: bool = False) -> torch.Tensor:
        total = torch.zeros((), device=self.device)
        self._mark(watch, None)
        for i, ids in enumerate(self.ids):
            with self.autocast():
                loss = self.forward(
                    input_ids=ids, labels=ids, use_cache=False, num_items_in_batch=self.tokens
                ).loss
            self._mark(watch, f"forward {i}")
            loss.backward()
            self._mark(watch, f"backward {i}")
            total += loss.detach()
        norm = gradient_norm(self.model.parameters())
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), 1.0, norm)
        self._mark(watch, "clip")
        take_step(self.optimizer, (~torch.isfinite(norm)).float())
        self._mark(watch, "optimizer")
        self.optimizer.zero_grad()
        self._mark(watch, "end")
        return total

    def _mark(self, watch: bool, phase: str | None) -> None:
        """Peak of the phase that ends here and what is left after it, in GiB."""
        if not watch or not self.cuda:
            return
        torch.cuda.synchronize()
        if phase:
            peak, left = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
            self.peaks[phase] = [round(peak / 2**30, 4), round(left / 2**30, 4)]
        else:
            self.peaks["start"] = round(torch.cuda.memory_allocated() / 2**30, 4)
        torch.cuda.reset_peak_memory_stats()


def measure(step: Step, seconds: float) -> dict:
    """Peak memory, tokens per second, and where both go."""
    start = time.perf_counter()
    for _ in range(2):
        step()
    step.optimizer.zero_grad()
    if step.cuda:
        torch.cuda.synchronize()
    each = (time.perf_counter() - start) / 2
    steps = max(3, min(60, round(seconds / each)))
    if step.cuda:
        torch.cuda.reset_peak_memory_stats()
    times = step_times(step, steps, step.cuda)
    row = {
        **asdict(step.case),
        "micro": step.micro,
        "length": step.length,
        "parameters": step.model.num_parameters(),
        "config": step.model.config.to_diff_dict(),
        "step_ms": 1e3 * statistics.median(times),
        "tokens_per_s": step.tokens / statistics.median(times),
    }
    if step.cuda:
        row["peak_GiB"] = torch.cuda.max_memory_allocated() / 2**30
        row["reserved_GiB"] = torch.cuda.max_memory_reserved() / 2**30
        step(watch=True)
        row["phases"] = step.peaks
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            step()
            torch.cuda.synchronize()
        kernels = sorted(
            ((e.key, e.self_device_time_total / 1e3, e.count) for e in profiler.key_averages()),
            key=lambda kernel: -kernel[1],
        )
        row["kernels_ms"] = by_kind(kernels)
        row["top_kernels"] = [(name[:90], round(ms, 3), count) for name, ms, count in kernels[:24]]
    return row


KINDS = (
    ("attention", ("flash", "fmha", "cudnn_generated", "sdpa", "flex_attention", "cunn_SoftMax")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "cublas", "mm_", "matmul", "grouped")),
    ("optimizer", ("adam", "multi_tensor", "foreach", "lerp")),
    ("compiled elementwise", ("triton_",)),
)


def by_kind(kernels: list[tuple[str, float, int]]) -> dict[str, float]:
    """Milliseconds by what a kernel's name says that it does; templates of the compiler go by theirs."""
    found = {}
    for name, ms, _ in kernels:
        low = name.lower()
        kind = next((kind for kind, words in KINDS if any(word.lower() in low for word in words)), "other")
        found[kind] = found.get(kind, 0.0) + ms
    return {kind: round(ms, 3) for kind, ms in found.items()}


def predict(row: dict, device: str) -> dict:
    """What the planner says of a case, from the card's sheet and from its probes."""
    known = {"transformers_version", "model_type", "dtype", "architectures"}
    config = TesseraConfig(**{name: value for name, value in row["config"].items() if name not in known})
    setup = Setup(
        config,
        row["micro"],
        row["micro"] * row["accumulation"],
        row["length"],
        optimizer=row["optimizer"],
        weights=row["weights"],
        compiled=row["compiled"],
        checkpoint_every=row["every"],
        narrow_moments=row["weights"] == "bf16",
    )
    inventory = take_inventory(config)
    memory = estimate_memory(setup, inventory)
    predicted = {"peak_GiB": memory.peak / 2**30, "moments": memory.moments, "parts": memory.parts}
    rates = {"sheet": rates_of(CARDS["h200"], "bf16")}
    if device == "cuda":
        rates["probed"] = rates_here(torch.device("cuda", torch.cuda.current_device()), "bf16", 1e12)
    for name, these in rates.items():
        times = estimate_times(setup, inventory, these)
        predicted[f"seconds_{name}"] = times.parts
        predicted[f"tokens_per_s_{name}"] = setup.tokens * setup.accumulation / times.step
    return predicted


def compile_and_measure(case: Case, args: argparse.Namespace, device: str) -> None:
    """One case in a process of its own: compiles, says so, measures when it is told to."""
    step = Step(case, device, args.tiny)
    start = time.perf_counter()
    loss = _first_loss(step)
    first = time.perf_counter() - start
    if step.cuda:
        torch.cuda.empty_cache()
    print("READY", flush=True)
    if sys.stdin.readline():  # else whoever asked is gone
        row = measure(step, args.timed) | {"first_loss": loss, "first_step_s": first}
        print("ROW " + json.dumps(row), flush=True)


def _first_loss(step: Step) -> float:
    """Compiles; waits while the first steps of others take the memory."""
    for _ in range(20):
        try:
            return step().item()
        except torch.OutOfMemoryError:
            step.optimizer.zero_grad()
            torch.cuda.empty_cache()
            time.sleep(3)
    raise SystemExit(f"{step.case.name}: there is not enough memory beside the other cases")


def measure_wave(cases: list[Case], args: argparse.Namespace) -> Iterator[dict]:
    """The rows of cases that compile side by side and are measured one by one."""
    threads = max(1, (os.cpu_count() or 1) // len(cases))
    more = ["--timed", str(args.timed)] + ["--tiny"] * args.tiny
    commands = {case.name: [sys.executable, __file__, "--case", case.name, *more] for case in cases}
    with start_workers(commands, TORCHINDUCTOR_COMPILE_THREADS=str(threads)) as workers:
        ready = [w for w in workers if w.wait_for("READY", args.limit - w.age) is not None]
        print(f"{len(ready)} of {len(cases)} compiled after {workers[0].age:.0f} s", flush=True)
        for worker in ready:
            worker.say("go")
            row = worker.wait_for("ROW ", MEASURING)
            worker.end()  # its memory is the next one's
            if row is not None:
                yield json.loads(row)


def main() -> None:
    """Prints predicted and measured for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    by_name = {case.name: case for case in CASES}
    parser.add_argument("--only", nargs="+", choices=by_name, help="these, in this order")
    parser.add_argument("--seconds", type=float, default=200.0, help="after which no case starts [200]")
    parser.add_argument("--limit", type=float, default=100.0, help="seconds for a case to compile [100]")
    parser.add_argument("--wave", type=int, default=WAVE, help=f"cases that compile side by side [{WAVE}]")
    parser.add_argument("--timed", type=float, default=1.5, help="seconds of steps for each case [1.5]")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--json", help="file for the rows")
    parser.add_argument("--again", metavar="FILE", help="rows of an earlier call, predicted anew")
    parser.add_argument("--case", choices=by_name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.case:
        compile_and_measure(by_name[args.case], args, device)
        return
    if args.again:
        with open(args.again, encoding="utf-8") as file:
            for row in json.load(file)["rows"]:
                print(_line(row, predict(row, "cpu")))
        return
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    # A call that is cut short ends its processes too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    start, rows = time.perf_counter(), []
    cases = [by_name[name] for name in args.only] if args.only else list(CASES)
    while cases and time.perf_counter() - start < args.seconds:
        wave, cases = cases[: args.wave], cases[args.wave :]
        for row in measure_wave(wave, args):
            row["predicted"] = predict(row, device)
            rows.append(row)
            print(_line(row, row["predicted"]), flush=True)
            if args.json:
                with open(args.json, "w", encoding="utf-8") as file:
                    json.dump({"torch": torch.__version__, "rows": rows}, file, indent=1)
    print(f"{len(rows)} cases in {time.perf_counter() - start:.0f} s", flush=True)
    if cases:
        print(f"no time left for {', '.join(case.name for case in cases)}", flush=True)


def _line(row: dict, predicted: dict) -> str:
    peak, speed = row.get("peak_GiB", float("nan")), row["tokens_per_s"]
    text = (
        f"{row['name']:22} {row['parameters'] / 1e6:7.1f}M {'fitted' if row['used'] else 'unseen'}  "
        f"GiB {predicted['peak_GiB']:6.2f} / {peak:6.2f} = {predicted['peak_GiB'] / peak:.3f}  tokens/s "
    )
    for name in ("sheet", "probed"):
        if f"tokens_per_s_{name}" in predicted:
            guess = predicted[f"tokens_per_s_{name}"]
            text += f" {name} {guess:9,.0f} / {speed:9,.0f} = {guess / speed:.3f}"
    return f"{text}  {row['step_ms']:.1f} ms  {row.get('kernels_ms', '')} {row.get('phases', '')}"


if __name__ == "__main__":
    main()
