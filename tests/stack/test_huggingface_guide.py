"""Every block of docs/huggingface.md. Python is run section by section, with stand-ins for what it names.

What needs several GPUs is marked `python gpus` there: it is compiled, and its imports are run. Commands and
YAML are parsed by the programs that they are for.
"""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from helpers.chats import COLOURS, turn, write_rows
from helpers.trainers import plain_chats, stack_model
from trl.scripts import dpo, sft

GUIDE = Path(__file__).parents[2] / "docs" / "huggingface.md"


def blocks() -> list[tuple[str, str, str]]:
    """Section, fence info and text of each block."""
    found, section, lines = [], "", iter(GUIDE.read_text(encoding="utf-8").splitlines())
    for line in lines:
        if line.startswith("## "):
            section = line.removeprefix("## ")
        if line.startswith("```"):
            body = []
            while (inner := next(lines)) != "```":
                body.append(inner)
            found.append((section, line.removeprefix("```"), "\n".join(body) + "\n"))
    return found


BLOCKS = blocks()
RUN = list(dict.fromkeys(section for section, info, _ in BLOCKS if info == "python"))


def test_no_block_is_of_a_kind_that_nothing_here_reads():
    counts = {info: sum(kind == info for _, kind, _ in BLOCKS) for info in {kind for _, kind, _ in BLOCKS}}
    assert counts == {"python": 10, "python gpus": 1, "bash": 2, "yaml": 1}
    assert len(RUN) == 9


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A folder with the models and data that the guide names, in which it runs."""
    sizes = {"hidden_size": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 32}
    stack_model(tmp_path / "runs" / "chat", "bytegpt-tiny", **sizes)
    pairs = [(turn(f"Colour of {k}?", v), turn(f"Colour of {k}?", "None.")) for k, v in COLOURS.items()]
    write_rows(tmp_path / "chats.jsonl", plain_chats(8))
    write_rows(tmp_path / "texts.jsonl", [{"text": f"The colour of {k} is {v}."} for k, v in COLOURS.items()])
    rows = [{"prompt": a[:1], "chosen": a[1:], "rejected": b[1:]} for a, b in pairs]
    write_rows(tmp_path / "preferences.jsonl", rows)
    write_rows(tmp_path / "problems.jsonl", [{"prompt": a[:1], "answer": a[1]["content"]} for a, _ in pairs])
    monkeypatch.chdir(tmp_path)
    compiled = torch.compile
    # Traced as ever; the code generator behind it would take a minute here.
    monkeypatch.setattr(torch, "compile", lambda model, **given: compiled(model, backend="eager", **given))
    return tmp_path


WRITTEN = {
    "Trainer": ["runs/hf/final"],
    "Supervised fine-tuning": ["runs/trl-sft"],
    "Preferences and rewards": ["runs/reward"],
    "Adapters": ["runs/merged"],
    "Quantised": ["runs/int8"],
}


@pytest.mark.parametrize("section", RUN)
def test_a_section_runs_as_it_is_written(section, workplace):
    if section == "Quantised":
        pytest.importorskip("bitsandbytes")
        pytest.importorskip("torchao")
    namespace = {"__name__": "guide"}
    for place, info, code in BLOCKS:
        if place == section and info == "python":
            exec(compile(code, f"{GUIDE.name}, {section}", "exec"), namespace)
    for folder in WRITTEN.get(section, []):
        config = json.loads((workplace / folder / "config.json").read_text())
        assert config["model_type"] == "tessera" and (workplace / folder / "model.safetensors").is_file()


def test_blocks_for_several_gpus_compile_and_import_what_there_is():
    for _, info, code in BLOCKS:
        if info == "python gpus":
            tree = ast.parse(code)
            imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
            exec(compile(ast.Module(imports, []), GUIDE.name, "exec"), {})
            assert len(tree.body) > len(imports)


def test_commands_have_the_options_of_their_programs():
    commands = [line for _, info, text in BLOCKS if info == "bash" for line in text.splitlines()]
    assert len(commands) == 4
    parsers = {
        "accelerate launch": launch_command_parser(),
        "trl sft": sft.make_parser(),
        "trl dpo": dpo.make_parser(),
    }
    for command in commands:
        program, words = " ".join(shlex.split(command)[:2]), shlex.split(command)[2:]
        parsed, unknown = parsers[program].parse_known_args(words)
        assert not [word for word in unknown if word.startswith("-")], (command, unknown)


def test_the_fsdp_file_is_one_that_accelerate_reads(tmp_path, monkeypatch):
    (text,) = [text for _, info, text in BLOCKS if info == "yaml"]
    (tmp_path / "fsdp.yaml").write_text(text)
    config = ClusterConfig.from_yaml_file(str(tmp_path / "fsdp.yaml"))
    assert config.distributed_type == "FSDP" and config.num_processes == 8
    # The launcher hands these on as environment variables, which the plugin reads.
    for key, value in yaml.safe_load(text)["fsdp_config"].items():
        monkeypatch.setenv(key.upper(), str(value))
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is False
    assert re.search("FULL_STATE_DICT", str(plugin.state_dict_type))
