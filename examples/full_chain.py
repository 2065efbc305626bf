"""The whole chain on this machine: from a folder of text to a chat model that others load.

    python examples/full_chain.py
    python examples/full_chain.py --text stories.txt --chat chats.jsonl --minutes 3 --output runs/full-chain

Each stage is one `tessera` command, shown before it runs: train a tokenizer, encode the text, pretrain,
fine-tune on conversations, evaluate, serve over HTTP and ask, write native shards for two ranks and read them
back, export as Llama and load that with plain transformers where Tessera cannot be imported, publish to a Hub
(a stand-in on this machine) and load it back from there. What came of it is in `report.md` and `report.json`
of the output folder. Takes under 10 minutes on two CPU cores; `--quick` takes two, with less training.
"""

import argparse
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from local_hub import LocalHub
from small_corpus import write_corpus

REPO = "someone/first-model"
MARK = ".tessera-chain"  # says that a folder is one of these, and may be replaced

# What somebody else runs who has transformers and no Tessera.
LOAD_WITHOUT_TESSERA = """
import sys
sys.modules["tessera"] = None  # importing it fails, as where it is not installed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
logging.disable_progress_bar()
logging.set_verbosity_error()
source, question, remote = sys.argv[1], sys.argv[2], sys.argv[3] == "remote"
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=remote)
tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=remote)
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
out = model.generate(**inputs, max_new_tokens=60, do_sample=False)
print(type(model).__name__)
print(tokenizer.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""


class Chain:
    """Runs the stages, and keeps what each took and gave."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "true"}
        self.stages: list[dict] = []

    def tessera(self, stage: str, *arguments: str | Path | float, **environment: str) -> str:
        """One `tessera` command; its output goes to the terminal and is returned."""
        words = [str(argument) for argument in arguments]
        return self.run(stage, f"tessera {' '.join(words)}", ["-m", "tessera", *words], **environment)

    def run(self, stage: str, shown: str, arguments: list[str], **environment: str) -> str:
        """One Python process, timed; the chain ends where one fails."""
        print(f"\n\033[1m[{len(self.stages) + 1}] {stage}\033[0m\n$ {shown}", flush=True)
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env={**self.environment, **environment},
        )
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        if process.wait():
            sys.exit(f"the chain ends here: '{stage}' failed with exit code {process.returncode}")
        self.note(stage, shown, time.monotonic() - start)
        return "".join(lines)

    def note(self, stage: str, shown: str, seconds: float) -> None:
        """Enters a stage into the report."""
        self.stages.append({"stage": stage, "command": shown, "seconds": round(seconds, 1)})


def ask_over_http(chain: Chain, model: Path, question: str) -> str:
    """Serves the model, asks one question through the OpenAI protocol, streamed, and stops the server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", "--model", str(model), "--port", str(port)]
    print(
        f"\n\033[1m[{len(chain.stages) + 1}] chat over HTTP\033[0m\n$ tessera {' '.join(words)}", flush=True
    )
    start = time.monotonic()
    server = subprocess.Popen([sys.executable, "-m", "tessera", *words], env=chain.environment)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                if server.poll() is not None or time.monotonic() - start > 120:
                    sys.exit("the chain ends here: the server did not start")
                time.sleep(0.2)
        body = {
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 100,
            "stream": True,
        }
        request = urllib.request.Request(
            f"{address}/v1/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        answer = ""
        print(f"user: {question}\nassistant: ", end="", flush=True)
        with urllib.request.urlopen(request, timeout=120) as stream:
            for line in stream:
                data = line.decode().removeprefix("data: ").strip()
                if not data or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    sys.exit(f"the chain ends here: the server says {event['error']['message']}")
                delta = event["choices"][0]["delta"] if event["choices"] else {}
                piece = delta.get("content") or ""
                # A model that was trained on tools may call one instead of saying anything.
                for call in delta.get("tool_calls") or []:
                    piece += f"{call['function'].get('name') or ''}{call['function'].get('arguments') or ''}"
                print(piece, end="", flush=True)
                answer += piece
        print()
    finally:
        server.terminate()
        server.wait(30)
    if not answer.strip():
        sys.exit("the chain ends here: the server answered nothing")
    chain.note("chat over HTTP", f"tessera {' '.join(words)}", time.monotonic() - start)
    return answer


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of each weights file."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*.safetensors"))
    }


def same_weights(one: Path, other: Path) -> bool:
    """Whether two directories hold the same weights, bit for bit."""
    if hashes(one) != hashes(other) or not hashes(one):
        sys.exit(f"the chain ends here: the weights in {one} and {other} differ")
    return True


def main() -> None:
    """The chain."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", nargs="+", help="text files or folders; default: a small text made here")
    parser.add_argument("--chat", help="JSONL of conversations; default: about that text")
    parser.add_argument(
        "--held-out-chat", help="JSONL of conversations to evaluate on; default: a part of --chat"
    )
    parser.add_argument("--question", help="what the model is asked at the end")
    parser.add_argument(
        "--output", default="runs/full-chain", help="folder; an earlier chain there is replaced"
    )
    parser.add_argument("--vocab-size", type=int, help="default: 2048, and 512 for the text made here")
    parser.add_argument("--config", default="llama-tiny", help="preset to train")
    parser.add_argument("--minutes", type=float, default=2.5, help="minutes of pretraining")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--sft-steps", type=int, default=100)
    parser.add_argument("--sft-length", type=int, default=512, help="tokens in a row of fine-tuning")
    parser.add_argument("--sft-rows", type=int, default=3000, help="conversations to fine-tune on at most")
    parser.add_argument("--workers", type=int, default=2, help="processes that encode the text")
    parser.add_argument("--quick", action="store_true", help="little training: to see that everything works")
    args = parser.parse_args()
    if args.quick:
        args.minutes, args.sft_steps = min(args.minutes, 0.3), min(args.sft_steps, 20)
    folder = Path(args.output)
    if folder.exists() and not folder.is_dir():
        sys.exit(f"{folder} is a file; choose another --output")
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        sys.exit(f"{folder} holds something other than a chain; choose another --output")
    for given in [*(args.text or []), args.chat, args.held_out_chat]:
        if given and folder.resolve() in Path(given).resolve().parents:
            sys.exit(f"{given} is in {folder}, which this replaces; choose another --output")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARK).touch()
    began = time.monotonic()
    chain = Chain(folder)

    text, chat, held_out, question = args.text, args.chat, args.held_out_chat, args.question
    if text is None:
        text = [str(write_corpus(folder / "corpus") / "stories.txt")]
    if chat is None:
        corpus = write_corpus(folder / "corpus")
        chat, held_out = str(corpus / "chats.jsonl"), str(corpus / "held_out_chats.jsonl")
        question = question or "Tell me a story about a fox and a lantern."
    question = question or "Hello, can you help me?"
    texts = [word for path in text for word in ("--data", path)]
    held_out_flags = ["--eval-data", held_out] if held_out else []

    size = str(args.vocab_size or (2048 if args.text else 512))
    chain.tessera(
        "tokenizer", "tokenizer", "train", *texts, "--vocab-size", size, "--output", folder / "tokenizer"
    )
    chain.tessera(
        "data",
        *("data", "prepare", *texts, "--tokenizer", folder / "tokenizer", "--output", folder / "tokens"),
        *("--workers", args.workers),
    )
    base = folder / "base"
    chain.tessera(
        "pretrain",
        *("pretrain", "--config", args.config, "--data", folder / "tokens", "--save-path", base),
        *("--minutes", args.minutes, "--batch-size", args.batch_size),
        *("--sequence-length", args.sequence_length),
    )
    tuned = folder / "chat"
    chain.tessera(
        "sft",
        *("sft", "--model", base, "--data", chat, *held_out_flags, "--save-path", tuned),
        *("--steps", args.sft_steps, "--batch-size", args.batch_size),
        *("--max-seq-len", args.sft_length, "--limit", args.sft_rows),
    )
    for model in (base, tuned):
        chain.tessera(
            f"evaluate {model.name}",
            *("eval", "--model", model, "--data", folder / "tokens", "--metrics", "bpb,perplexity"),
            *("--output", folder / f"eval-{model.name}.json"),
        )
    answer = ask_over_http(chain, tuned, question)

    final = tuned / "final"
    chain.tessera("native shards", "convert", final, folder / "native", "0", "2")
    chain.tessera("and back", "convert", folder / "native", folder / "from-native")
    same_weights(final, folder / "from-native")
    chain.tessera("export", "convert", final, folder / "llama", "--to", "llama")
    plain = chain.run(
        "load the export without Tessera",
        f"python -c '...' {folder / 'llama'}",
        ["-c", LOAD_WITHOUT_TESSERA, str(folder / "llama"), question, "local"],
    )
    with LocalHub(folder / "hub") as hub:
        chain.tessera("publish", "push", tuned, REPO, **hub.environment)
        pulled = chain.run(
            "load it back from the Hub",
            f"python -c '...' {REPO}",
            ["-c", LOAD_WITHOUT_TESSERA, REPO, question, "remote"],
            **{**hub.environment, "HF_HOME": str(folder / "somebody-elses-home")},
        )

    said = [text.split("\n", 1)[1].strip() for text in (plain, pulled)]
    if said[0] != said[1]:
        sys.exit(f"the chain ends here: the same weights answered differently: {said[0]!r} and {said[1]!r}")

    report = {
        "stages": chain.stages,
        "minutes": round((time.monotonic() - began) / 60, 2),
        "evaluation": {
            name: json.loads((folder / f"eval-{name}.json").read_text(encoding="utf-8"))
            for name in ("base", "chat")
        },
        "question": question,
        "answers": {"over HTTP": answer, "Llama export": plain, "from the Hub": pulled},
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    (folder / "report.md").write_text(as_markdown(report), encoding="utf-8")
    print(f"\n{as_markdown(report)}\nwritten to {folder / 'report.md'}")


def as_markdown(report: dict) -> str:
    """The report as a page."""
    lines = [
        f"# The chain, in {report['minutes']} minutes",
        "",
        "| stage | seconds | command |",
        "|---|---|---|",
    ]
    lines += [f"| {row['stage']} | {row['seconds']} | `{row['command']}` |" for row in report["stages"]]
    lines += ["", f"> {report['question']}", ""]
    for place, answer in report["answers"].items():
        lines += [f"**{place}**: {' '.join(answer.split())}", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
