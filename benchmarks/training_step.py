"""Training step: Tessera against transformers' own classes of the same shape, compiled, in one process.

    python benchmarks/training_step.py [--shapes llama-135m llama-1.1b moe-688m] [--profile] [--tiny]

Random tokens, bf16 weights, gradients and fused AdamW; `torch.compile(model, dynamic=False)` except where a
row says eager. Both sides start from the same weights: a first loss that differs by more than 1 % ends the
run. Median of the timed steps, peak memory of those steps. The peers are `LlamaForCausalLM` and
`DeepseekV3ForCausalLM` (experts by grouped_mm) as transformers ships them.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig

from tessera import TesseraConfig

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


def measure(model, compiled: bool, batch: int, length: int, seconds: float, profile: bool) -> dict:
    """Milliseconds of a step, tokens per second, peak GiB, and the first loss."""
    device = model.device
    cuda = device.type == "cuda"
    torch._dynamo.reset()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=cuda
    )
    forward = torch.compile(model, dynamic=False) if compiled else model
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (batch, length), device=device, generator=generator)

    def step() -> torch.Tensor:
        loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    start = time.perf_counter()
    first_loss = step().item()
    first = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(3):
        loss = step()
    loss.item()
    steps = max(4, min(40, round(seconds * 3 / (time.perf_counter() - start))))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = _step_times(step, steps, cuda)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
    median = statistics.median(times)
    row = {
        "ms": 1e3 * median,
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


def _step_times(step: Callable[[], torch.Tensor], steps: int, cuda: bool) -> list[float]:
    """Seconds of each step; on a GPU between events, so that the CPU runs ahead as it does in training."""
    if not cuda:
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        return times
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in zip(events[:-1], events[1:], strict=True)]


def main() -> None:
    """Prints a row for each side of each shape, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--seconds", type=float, default=6.0, help="of timed steps for each row")
    parser.add_argument("--profile", action="store_true", help="kernels of one step of ours")
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}")
    rows = []
    for shape in args.shapes:
        batch, length, fields, with_eager = SHAPES[shape]
        if args.tiny:
            batch, length = 2, 32
            fields = {key: TINY.get(key, value) for key, value in fields.items()}
        peer_config, our_config = configurations(fields)
        torch.manual_seed(0)
        with torch.device(device):
            peer = AutoModelForCausalLM.from_config(peer_config, dtype=torch.bfloat16).train()
        weights = {key: value.to("cpu", copy=True) for key, value in peer.state_dict().items()}
        sides = [("transformers", True), ("tessera", True)]
        if with_eager:
            sides.insert(1, ("transformers", False))
        for side, compiled in sides:
            if side == "transformers" and args.ours_only:
                continue
            model = peer
            if side == "tessera":
                peer = None
                gc.collect()
                if device == "cuda":
                    torch.cuda.empty_cache()
                with torch.device(device):
                    model = AutoModelForCausalLM.from_config(our_config, dtype=torch.bfloat16).train()
            model.load_state_dict(weights)
            row = measure(model, compiled, batch, length, args.seconds, args.profile)
            labels = {"shape": shape, "side": side, "compiled": compiled, "batch": batch, "length": length}
            row = {**labels, **row}
            rows.append(row)
            print(
                f"{shape:12} {side:13} {'compiled' if compiled else 'eager':9} B{batch} T{length} "
                f"{row['ms']:9.1f} ms {row['tokens_per_s']:11,.0f} tokens/s {row['peak_GiB']:7.2f} GiB  "
                f"first {row['first_step_s']:5.1f} s  spread {row['spread']:.3f}  loss {row['loss']:.4f}",
                flush=True,
            )
            del model
            gc.collect()
        ours = rows[-1]
        peers = [row for row in rows if row["shape"] == shape and row["side"] == "transformers"]
        if not peers:
            continue
        if abs(ours["loss"] / peers[0]["loss"] - 1) > 0.01:
            raise SystemExit(f"{shape}: the first losses differ: {ours['loss']} and {peers[0]['loss']}")
        best = max(peers, key=lambda row: row["tokens_per_s"])
        memory = ours["peak_GiB"] / best["peak_GiB"]
        ratio = ours["tokens_per_s"] / best["tokens_per_s"]
        print(f"{shape:12} tessera / best peer: {ratio:.3f}x tokens/s, {memory:.3f}x memory", flush=True)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
