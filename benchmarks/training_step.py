"""Training step: Tessera against its peers' own classes of the same shape, compiled, in one process.

    python benchmarks/training_step.py [--shapes llama-135m llama-1.1b moe-688m]
        [--precisions bf16 amp split] [--nanochat DIR] [--profile] [--tiny]

Random tokens, `torch.compile(model, dynamic=False)` except where a row says eager. Both sides start from the
same weights: a first loss that differs by more than 1 % ends the run. Median of the timed steps, peak memory
of those steps, and the optimizer's step alone.

The peers are `LlamaForCausalLM` and `DeepseekV3ForCausalLM` (experts by grouped_mm) as transformers ships
them, with fused AdamW on both sides. Precisions: `bf16` has bf16 weights, gradients and moments; `amp` fp32
weights under autocast, with fp32 moments; `split` (ours alone, compared with the peer's amp) bf16 weights
whose missing bits the optimizer keeps, with fp32 moments: the same updates, by the package's own optimizer.
The shapes nanochat-d12 and nanochat-d12-windows need a checkout of nanochat: its GPT with the optimizer that
it sets up (fp32 matrices that it casts, bf16 embeddings) against the preset with ours.
"""

import argparse
import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from nanochat_peer import import_nanochat, make_gpt, tessera_weights
from step_times import step_times
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig

from tessera import TesseraConfig
from tessera.training.optimizers import build_optimizer

PRECISIONS = ("bf16", "amp", "split")
# Letters of nanochat's windows: full attention in each layer, and its own default.
NANOCHAT = {"nanochat-d12": "L", "nanochat-d12-windows": "SSSL"}

# Shape: batch, length, fields of the peer's configuration, whether the peer is also timed without compiling.
SHAPES = {
    "llama-135m": (
        32,
        2048,
        {
            "vocab_size": 32768,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
            "max_position_embeddings": 2048,
        },
        False,
    ),
    "llama-1.1b": (
        4,
        4096,
        {
            "vocab_size": 32768,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 4096,
        },
        True,
    ),
    "moe-688m": (
        8,
        2048,
        {
            "vocab_size": 32768,
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "moe_intermediate_size": 512,
            "num_hidden_layers": 12,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "n_shared_experts": 1,
            "n_routed_experts": 32,
            "num_experts_per_tok": 4,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": None,
            "kv_lora_rank": 256,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
            "max_position_embeddings": 4096,
            "routed_scaling_factor": 1.0,
        },
        False,
    ),
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}


def configurations(fields: dict):
    """The peer's configuration and Tessera's for the same model."""
    common = {"tie_word_embeddings": False, "use_cache": False, "bos_token_id": None, "eos_token_id": None}
    if "kv_lora_rank" in fields:
        peer = DeepseekV3Config(**fields, **common, first_k_dense_replace=1, num_nextn_predict_layers=0)
        ours = TesseraConfig(
            **fields,
            **common,
            attention_type="latent",
            rope_interleave=True,
            mlp_layer_types=["dense"] + ["sparse"] * (fields["num_hidden_layers"] - 1),
            scoring_func="sigmoid",
            norm_topk_prob=True,
            router_correction_bias=True,
            rms_norm_eps=peer.rms_norm_eps,
        )
        return peer, ours
    peer = LlamaConfig(**fields, **common)
    return peer, TesseraConfig(**fields, **common, rms_norm_eps=peer.rms_norm_eps)


def adamw(model: nn.Module, precision: str) -> torch.optim.Optimizer:
    """Fused AdamW over all weights; for split weights the package's own."""
    if precision == "split":
        return build_optimizer(model, "adamw", 1e-4, weight_decay=0.1, weights="split")
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)


def compile_model(model: nn.Module):
    """The model compiled; a CPU, which is there to see that it runs, is spared the compiler's last stage."""
    on_gpu = next(model.parameters()).is_cuda
    return torch.compile(model, dynamic=False, backend="inductor" if on_gpu else "aot_eager")


def measure(
    loss_of: Callable[[], torch.Tensor], optimizer, batch: int, length: int, seconds: float, profile: bool
) -> dict:
    """Milliseconds of a step, tokens per second, peak GiB, and the first loss."""
    cuda = torch.cuda.is_available()

    def step() -> torch.Tensor:
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    start = time.perf_counter()
    first_loss = step().item()
    first = time.perf_counter() - start
    for _ in range(2):
        step()
    start = time.perf_counter()
    for _ in range(3):
        loss = step()
    loss.item()
    steps = max(4, min(40, round(seconds * 3 / (time.perf_counter() - start))))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = step_times(step, steps, cuda)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
    loss_of().backward()
    alone = statistics.median(step_times(optimizer.step, 5, cuda))
    optimizer.zero_grad(set_to_none=True)
    median = statistics.median(times)
    row = {
        "ms": 1e3 * median,
        "optimizer_ms": 1e3 * alone,
        "tokens_per_s": batch * length / median,
        "peak_GiB": peak,
        "first_step_s": first,
        "spread": (max(times) - min(times)) / median,
        "loss": first_loss,
    }
    if profile and cuda:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            step()
            torch.cuda.synchronize()
        events = profiler.key_averages()
        print(events.table(sort_by="self_cuda_time_total", row_limit=16, max_name_column_width=60))
    return row


class Table:
    """The rows: measured, printed, and compared shape by shape."""

    def __init__(self, seconds: float, profile: bool):
        self.seconds, self.profile = seconds, profile
        self.rows: list[dict] = []

    def add(
        self, shape: str, side: str, precision: str, compiled: bool, sizes: tuple[int, int], make: Callable
    ) -> None:
        """One row. `make` gives a model, its optimizer and a function from ids [B, T + 1] to the loss."""
        batch, length = sizes
        torch._dynamo.reset()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, optimizer, loss_of = make(compiled)
        vocabulary = model.config.vocab_size
        generator = torch.Generator(device).manual_seed(0)
        ids = torch.randint(0, vocabulary, (batch, length + 1), device=device, generator=generator)
        context = contextlib.nullcontext
        if precision == "amp":

            def context():
                return torch.autocast(device, dtype=torch.bfloat16)

        def loss(of: Callable = loss_of) -> torch.Tensor:
            with context():
                return of(ids)

        row = measure(loss, optimizer, batch, length, self.seconds, self.profile)
        labels = {"shape": shape, "side": side, "precision": precision, "compiled": compiled}
        row = {**labels, "batch": batch, "length": length, **row}
        self.rows.append(row)
        print(
            f"{shape:20} {side:13} {precision:6} {'compiled' if compiled else 'eager':9} B{batch} T{length} "
            f"{row['ms']:9.1f} ms ({row['optimizer_ms']:.1f} optimizer) "
            f"{row['tokens_per_s']:11,.0f} tokens/s {row['peak_GiB']:7.2f} GiB  "
            f"first {row['first_step_s']:5.1f} s  spread {row['spread']:.3f}  "
            f"loss {row['loss']:.4f}",
            flush=True,
        )
        del model, optimizer, loss_of, loss
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()

    def compare(self, shape: str) -> None:
        """Prints the ratios of one shape: each of our rows against the best peer of its kind."""
        rows = [row for row in self.rows if row["shape"] == shape]
        for ours in [row for row in rows if row["side"] == "tessera"]:
            kind = "bf16" if ours["precision"] == "bf16" else "amp"
            peers = [row for row in rows if row["side"] != "tessera"]
            peers = [row for row in peers if row["precision"] in (kind, "own")]
            if not peers:
                continue
            if abs(ours["loss"] / peers[0]["loss"] - 1) > 0.01:
                raise SystemExit(f"{shape}: the first losses differ: {ours['loss']} and {peers[0]['loss']}")
            best = max(peers, key=lambda row: row["tokens_per_s"])
            memory = ours["peak_GiB"] / best["peak_GiB"]
            ratio = ours["tokens_per_s"] / best["tokens_per_s"]
            without = (best["ms"] - best["optimizer_ms"]) / (ours["ms"] - ours["optimizer_ms"])
            print(
                f"{shape:20} tessera {ours['precision']} / best peer ({best['precision']}): "
                f"{ratio:.3f}x tokens/s ({without:.3f}x without the optimizers), {memory:.3f}x memory",
                flush=True,
            )


def add_transformers_shape(
    table: Table, shape: str, precisions: list[str], ours_only: bool, tiny: bool
) -> None:
    """The rows of a shape that transformers has a class for."""
    batch, length, fields, with_eager = SHAPES[shape]
    if tiny:
        batch, length = 2, 32
        fields = {key: TINY.get(key, value) for key, value in fields.items()}
    peer_config, our_config = configurations(fields)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        start = AutoModelForCausalLM.from_config(peer_config, dtype=torch.bfloat16).state_dict()
    start = {name: tensor.cpu() for name, tensor in start.items()}

    def make(config, precision):
        def build(compiled):
            with torch.device(device):
                dtype = torch.bfloat16 if precision == "bf16" else torch.float32
                model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
            model.load_state_dict(start)
            optimizer = adamw(model, precision)
            forward = compile_model(model) if compiled else model

            def loss_of(ids):
                ids = ids[:, :-1]
                return forward(input_ids=ids, labels=ids, use_cache=False).loss

            return model, optimizer, loss_of

        return build

    sizes = batch, length
    for precision in precisions:
        if precision != "split" and not ours_only:
            table.add(shape, "transformers", precision, True, sizes, make(peer_config, precision))
            if with_eager and precision == "bf16":
                table.add(shape, "transformers", precision, False, sizes, make(peer_config, precision))
        table.add(shape, "tessera", precision, True, sizes, make(our_config, precision))
    table.compare(shape)


def add_nanochat_shape(
    table: Table, shape: str, precisions: list[str], checkout: str, ours_only: bool, tiny: bool
) -> None:
    """The rows of nanochat's d12."""
    batch, length = (2, 128) if tiny else (32, 2048)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {"n_layer": 2, "n_embd": 128, "n_head": 1, "n_kv_head": 1, "vocab_size": 512} if tiny else {}
    gpt = import_nanochat(checkout)
    peer = make_gpt(gpt, NANOCHAT[shape], length, device, sizes)
    start = {name: tensor.to("cpu", copy=True) for name, tensor in peer.state_dict().items()}
    config, weights = tessera_weights(start, peer.config)
    del peer

    def make_peer(compiled):
        model = make_gpt(gpt, NANOCHAT[shape], length, device, sizes)
        model.load_state_dict(start)
        forward = compile_model(model)

        def loss_of(ids):
            return forward(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

        optimizer = model.setup_optimizer()
        optimizer.zero_grad = lambda set_to_none: model.zero_grad(set_to_none=True)
        return model, optimizer, loss_of

    def make(precision):
        def build(compiled):
            with torch.device(device):
                dtype = torch.bfloat16 if precision == "bf16" else torch.float32
                model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
            model.load_state_dict(weights)
            kept = "split" if precision == "split" else "fp32"
            optimizer = build_optimizer(model, "muon", weights=kept)
            forward = compile_model(model)

            def loss_of(ids):
                shifted = ids[:, 1:].contiguous()
                return forward(
                    input_ids=ids[:, :-1].contiguous(), labels=shifted, shift_labels=shifted, use_cache=False
                ).loss

            return model, optimizer, loss_of

        return build

    if not ours_only:
        table.add(shape, "nanochat", "own", True, (batch, length), make_peer)
    for precision in precisions:
        table.add(shape, "tessera", precision, True, (batch, length), make(precision))
    table.compare(shape)


def main() -> None:
    """Prints a row for each side of each shape, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shapes", nargs="+", choices=[*SHAPES, *NANOCHAT], help="default: all it has peers for"
    )
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["bf16"])
    parser.add_argument("--nanochat", metavar="DIR", help="a checkout of nanochat, for its shapes")
    parser.add_argument("--seconds", type=float, default=6.0, help="of timed steps for each row")
    parser.add_argument("--profile", action="store_true", help="kernels of one step of each row")
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args()
    shapes = args.shapes or [*SHAPES, *(NANOCHAT if args.nanochat else ())]
    if not args.nanochat and any(shape in NANOCHAT for shape in shapes):
        parser.error("the shapes of nanochat need --nanochat DIR, a checkout of it")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}")
    table = Table(args.seconds, args.profile)
    for shape in shapes:
        if shape in NANOCHAT:
            add_nanochat_shape(table, shape, args.precisions, args.nanochat, args.ours_only, args.tiny)
        else:
            add_transformers_shape(table, shape, args.precisions, args.ours_only, args.tiny)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(table.rows, file, indent=1)


if __name__ == "__main__":
    main()
