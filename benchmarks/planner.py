"""Planner: predicted peak memory and tokens per second against the measured training step.

    python benchmarks/planner.py [--only llama-100m nanochat-d12] [--json planner.json] [--tiny]

All cases compile side by side, each in a process, and are measured one by one: the training step of `tessera
pretrain` on random tokens, micro-batches forward and backward under autocast, the norm clipped, the update;
compiled except where a row says eager. Peak memory is what the allocator had handed out at most in a step;
tokens per second are of the median step. Predicted are both from the card's sheet, and from its own probes as
`tessera plan --gpu here` makes them. `--json` also keeps peaks of the step's phases and milliseconds by kind
of kernel, from which the constants in `training/planner/throughput.py` were taken (rows that say "fitted").
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
import transformers
from step_times import step_times

from tessera import TesseraConfig, TesseraForCausalLM
from tessera.training.optimizers import build_optimizer
from tessera.training.planner.cards import CARDS
from tessera.training.planner.memory import Setup, estimate_memory, take_inventory
from tessera.training.planner.throughput import estimate_times, rates_here, rates_of


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

# In the order of what they tell.
CASES = (
    Case("llama-100m", "llama-100m", 16, 2048, accumulation=2, used=True),
    Case("nanochat-d12", "nanochat-d12", 16, 2048, "muon", used=True),
    Case("bytegpt", "bytegpt", 32, 1024, accumulation=2),
    Case("gpt2-124m", "gpt2-124m", 30, 1024),
    Case("llama-1.1b", "llama-100m", 4, 4096, weights="bf16", fields=LARGE + LARGE_GROUPS),
    Case("nanochat-d20", "nanochat-d20", 8, 2048, "muon", accumulation=2),
    Case(
        "llama-60m",
        "llama-100m",
        32,
        1024,
        fields=(*SMALL, ("num_key_value_heads", 8), ("intermediate_size", 1536)),
    ),
    Case("nanochat-d8", "nanochat-d8", 32, 1024, "muon"),
    Case(
        "llama-350m",
        "llama-100m",
        8,
        2048,
        "muon",
        fields=(*MEDIUM, ("num_key_value_heads", 16), ("intermediate_size", 2816)),
    ),
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
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._mark(watch, "clip")
        self.optimizer.step()
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


def _wait_and_measure(case: Case, args: argparse.Namespace, device: str) -> None:
    """One case in a process of its own: compiles, says so, measures when it is told to."""
    step = Step(case, device, args.tiny)
    start = time.perf_counter()
    loss = _first_loss(step)
    first = time.perf_counter() - start
    if step.cuda:
        torch.cuda.empty_cache()
    print("READY", flush=True)
    sys.stdin.readline()
    row = measure(step, args.seconds) | {"first_loss": loss, "first_step_s": first}
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


def main() -> None:
    """Prints predicted and measured for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [case.name for case in CASES]
    parser.add_argument("--only", nargs="+", choices=names)
    parser.add_argument("--seconds", type=float, default=2.0, help="of timed steps for each case")
    parser.add_argument("--seconds-budget", type=float, default=1e9, help="what is not compiled then is left")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--json", help="file for the rows")
    parser.add_argument("--case", choices=names, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.case:
        _wait_and_measure(next(case for case in CASES if case.name == args.case), args, device)
        return
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    start, rows = time.perf_counter(), []
    processes = {}
    for case in CASES:
        if args.only and case.name not in args.only:
            continue
        command = [sys.executable, __file__, "--case", case.name, "--seconds", str(args.seconds)]
        processes[case.name] = subprocess.Popen(
            command + ["--tiny"] * args.tiny,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "4"},
        )
    # They compile side by side and are measured one by one, when no other is at work.
    ready = {name: _wait_for(process, "READY") for name, process in processes.items()}
    print(f"compiled after {time.perf_counter() - start:.0f} s", flush=True)
    for name, process in processes.items():
        late = time.perf_counter() - start > args.seconds_budget
        if ready[name] is None or late:
            print(f"{name}: {'no time left' if late else 'failed; see its error above'}", flush=True)
            process.kill()
            continue
        process.stdin.write("go\n")
        process.stdin.flush()
        line = _wait_for(process, "ROW ")
        process.wait()
        if line is None:
            print(f"{name}: failed; see its error above", flush=True)
            continue
        row = json.loads(line.removeprefix("ROW "))
        row["predicted"] = predicted = predict(row, device)
        rows.append(row)
        print(_line(row, predicted), flush=True)
        if args.json:  # after each: a run that is cut short keeps what it has
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump({"torch": torch.__version__, "rows": rows}, file, indent=1)


def _wait_for(process: subprocess.Popen, start: str) -> str | None:
    """The next line of a process that starts so; None if it ends before."""
    for line in process.stdout:
        if line.startswith(start):
            return line
    return None


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
