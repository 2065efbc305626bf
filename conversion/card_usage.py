"""How a published model is loaded, for its card: only what works with its kind, as code that runs.

What belongs here: the snippets. A model whose code travels with it runs where transformers runs that code;
other programs know a model only by an architecture of transformers' own.
"""

from pathlib import Path

from tessera.modeling.loading import read_json

# Architectures of transformers that vLLM has an implementation of its own for.
_IN_VLLM = frozenset("llama mistral mixtral qwen2 qwen3 qwen3_moe gpt2 deepseek_v2 deepseek_v3".split())


def describe_use(
    repo_id: str, model_type: str, folder: Path, context: int, revision: str | None = None
) -> list[str]:
    """The paragraphs of the section.

    Args:
        repo_id: where the model will be.
        model_type: `tessera`, whose code travels with the weights, or a family of transformers.
        folder: of the release.
        context: positions of the model.
        revision: branch that it will be on, if it is not the main one.
    """
    remote = model_type == "tessera"
    options = f', revision="{revision}"' if revision else ""
    options += ", trust_remote_code=True" if remote else ""
    flag = f" --revision {revision}" if revision else ""
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    has_template = (folder / "chat_template.jinja").is_file()
    parts = [_python(_load(repo_id, options, has_tokenizer, has_template, context))]
    if remote:
        parts.append(
            "The code of the model is in this repository, and `trust_remote_code=True` runs it. Where the "
            "package `tessera-lm` is installed, `import tessera` does instead, and "
            f"`tessera pull {repo_id}{flag}` brings the model to where its other commands take it."
        )
    else:
        parts.append(f"The architecture is `{model_type}` of transformers: no other code is needed.")
    # TRL pads, with the one token or else the other.
    if has_template and has_tokenizer:
        special = read_json(folder / "tokenizer_config.json")
        if special.get("pad_token") or special.get("eos_token"):
            parts += ["Further training with TRL:", _python(_train(repo_id, options))]
    if model_type in _IN_VLLM and has_tokenizer:
        parts += ["As a server, with vLLM:", f"```bash\nvllm serve {repo_id}{flag}\n```"]
    return parts


def _load(repo_id: str, options: str, has_tokenizer: bool, has_template: bool, context: int) -> list[str]:
    lines = [f'model = AutoModelForCausalLM.from_pretrained("{repo_id}"{options})']
    if not has_tokenizer:
        return ["from transformers import AutoModelForCausalLM", "", *lines]
    lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}"{options})')
    if has_template:
        lines += [
            "inputs = tokenizer.apply_chat_template(",
            '    [{"role": "user", "content": "Hello!"}],',
            '    add_generation_prompt=True, return_tensors="pt", return_dict=True,',
            ")",
        ]
    else:
        lines.append('inputs = tokenizer("Once upon a time", return_tensors="pt")')
    lines.append(f"out = model.generate(**inputs, max_new_tokens={max(1, min(100, context // 2))})")
    lines.append("print(tokenizer.decode(out[0]))")
    return ["from transformers import AutoModelForCausalLM, AutoTokenizer", "", *lines]


def _train(repo_id: str, options: str) -> list[str]:
    return [
        "from datasets import Dataset",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "from trl import SFTConfig, SFTTrainer",
        "",
        'turns = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Good day."}]',
        "trainer = SFTTrainer(",
        f'    AutoModelForCausalLM.from_pretrained("{repo_id}"{options}),',
        '    args=SFTConfig("trained", num_train_epochs=1, report_to=[]),',
        '    train_dataset=Dataset.from_list([{"messages": turns}] * 8),',
        f'    processing_class=AutoTokenizer.from_pretrained("{repo_id}"{options}),',
        ")",
        "trainer.train()",
    ]


def _python(lines: list[str]) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"
