"""The README.md of a published model: what it is, how to load it, how it was trained, how good it is.

What belongs here: from a configuration and the files of a run to the page. Only what the files say is on it.
"""

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from tessera.data.hashing import file_sha256
from tessera.modeling.accounting import count_costs
from tessera.modeling.configuration_tessera import TesseraConfig
from tessera.modeling.loading import read_json
from tessera.training.records.curves import draw_curve, draw_measures, read_metrics

from .card_usage import describe_use
from .families import architecture
from .report import REPORT

CURVE = "loss.png"
# What Tessera tells of a tokenizer that it trained.
NOTES = "tokenizer_meta.json"
# Of a recipe: where data and starting weights come from, which of the data may be the Hub's, and what says
# nothing of the result.
_DATA = ("data_file", "data", "dataset")
_DATASETS = ("data", "dataset")
_STARTS = ("model", "ckpt_path")
# Ends a card that was written here, with the hash of what is before it: if that is another, somebody has
# changed it.
_MARK = re.compile(r"\n<!-- written by tessera push, ([0-9a-f]{64}) -->\n\Z")
# Text that is one path, and paths in other text that are no part of an address.
_PATH = re.compile(r"(/|~|\.\.?/|[A-Za-z]:[\\/])(?!.*\s[/~])")
_PATH_IN_TEXT = re.compile(r"(?<![\w./:])(?:~|[A-Za-z]:)?(?:/[\w.@+-]+)+/?")
# Sections of such a card that a later release of the model, without the run, has from an earlier one.
_LASTING = ("Training", "Evaluation", "Conversion")
_LOCAL = ("save_path", "eval_data", "sample_prompt", "sample_tokens", "tokenizer", "resume")
# Of a record.
_NUMBERS = {"step", "tokens", "seconds", "loss", "val_loss", "val_bits_per_byte"}
# What post-training records beside losses by tokens: key in `metrics.jsonl` -> what it is called.
_MEASURES = {
    "loss": "loss",
    "reward_accuracy": "reward accuracy",
    "reward": "reward",
    "mean_reward": "held out reward",
}


def write_model_card(
    folder: Path,
    repo_id: str,
    config: TesseraConfig,
    model_type: str,
    *,
    model: Path | None = None,
    weights: Path | None = None,
    run: Path | None = None,
    step: int | None = None,
    revision: str | None = None,
    license: str | None = None,
    converted: str | None = None,
    notes: list[str] | None = None,
    on_hub: Callable[[str, str], bool] = lambda name, kind: False,
) -> list[str]:
    """Writes `README.md`, and the curve that it shows. A README.md beside the model is taken as it is.

    One that was written here for an earlier release, and that nobody has changed, is written anew; what it
    says of training, evaluation, conversion and license stays.

    Args:
        folder: of the release, with its weights, and its tokenizer if it has one.
        repo_id: where it will be.
        config: of the model, as Tessera has it.
        model_type: `tessera`, whose code travels with the weights, or a family of transformers.
        model: directory that was named: whose scores and README.md are those of this model.
        weights: directory that the weights are in, after a conversion for the release; default: `model`.
        run: run directory with `recipe.yaml`, `metrics.jsonl` and `eval.json`, as far as they are there.
        step: of an unfinished run, whose checkpoint this is.
        revision: branch that it will be on, if it is not the main one.
        license: identifier as the Hub knows it.
        converted: what the weights went through for the release, in words.
        notes: what was left out of them, in sentences.
        on_hub: whether a name that the recipe gives is a `model` or `dataset` there. Paths are not on the
            card: they are of one machine only.

    Returns:
        What to say of the card, in sentences.

    Raises:
        ValueError: if a file of the run or somebody's README.md cannot be read.
    """
    model = model or folder
    places = [place / "README.md" for place in (model, run) if place is not None]
    written = next((card for card in places if card.is_file()), None)
    if written is not None and (written.parent / CURVE).is_file() and not (folder / CURVE).exists():
        shutil.copyfile(written.parent / CURVE, folder / CURVE)
    if written is not None and not _is_ours(written):
        _take_card(written, folder / "README.md", license)
        stays = f"the card is {written} as it is, which says nothing of the conversion"
        return [] if converted is None else [stays]
    earlier, sections_before = _read_own(written)
    recipe = _read_recipe(run)
    records = _read_records(run, step)
    remote = model_type == "tessera"
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=license or earlier.get("license"),
        tags=[
            "tessera",
            *(["custom_code"] if remote else []),
            *(["conversational"] if (folder / "chat_template.jinja").is_file() else []),
        ],
        datasets=[name for name in _named(recipe, _DATASETS, run) if on_hub(name, "dataset")]
        or earlier.get("datasets"),
        base_model=next(
            (name for name in _named(recipe, _STARTS, run) if on_hub(name, "model")),
            earlier.get("base_model"),
        ),
    )
    sections = [
        f"# {repo_id.split('/')[-1]}",
        _introduction(config, model_type, step),
        "## Use",
        *describe_use(repo_id, model_type, folder, config.max_position_embeddings, revision),
        "## Architecture",
        _table({**_describe(config), **_describe_tokenizer(folder)}),
    ]
    tables = _describe_data(recipe), _describe_training(recipe, records)
    training = [_table(rows) for rows in tables if rows]
    if draw(records, folder / CURVE, repo_id):
        training.append(f"![The course of the training]({CURVE})")
    scores = _read_scores(run, model)
    evaluation = [f"```text\n{scores}\n```"] if scores else sections_before.get("Evaluation", [])
    before = "Measured before the conversion of which is told below."
    if evaluation and converted is not None and before not in evaluation:
        evaluation = [before, *evaluation]
    conversion = _describe_conversion(weights or model, converted, notes or [])
    for name, told in (
        ("Training", training or sections_before.get("Training")),
        ("Evaluation", evaluation),
        ("Conversion", [*sections_before.get("Conversion", []), *conversion]),
    ):
        if told:
            sections += [f"## {name}", *told]
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"
    hashed = hashlib.sha256(text.encode()).hexdigest()
    (folder / "README.md").write_bytes(f"{text}\n<!-- written by tessera push, {hashed} -->\n".encode())
    return []


def _is_ours(card: Path) -> bool:
    """Whether a card was written here, and nobody has changed it since."""
    content = card.read_bytes().replace(b"\r\n", b"\n")
    mark = _MARK.search(content.decode("utf-8", errors="replace"))
    return mark is not None and hashlib.sha256(content[: -len(mark[0])]).hexdigest() == mark[1]


def _read_own(card: Path | None) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Of a card that was written here: what heads it, and the sections that last."""
    if card is None:
        return {}, {}
    text = _MARK.sub("", card.read_text(encoding="utf-8"))
    parts = [part.strip().split("\n\n") for part in text.split("\n## ")[1:]]
    sections = {heading: told for heading, *told in parts if heading in _LASTING}
    return ModelCard(text).data.to_dict(), sections


def draw(records: list[dict], path: Path, title: str) -> bool:
    """Draws what a run recorded; whether there was something, and matplotlib to draw it with."""
    losses = [record for record in records if "tokens" in record and {"loss", "val_loss"} & record.keys()]
    measures = {key: name for key, name in _MEASURES.items() if any(key in record for record in records)}
    if measures.keys() - {"loss"}:
        return draw_measures(records, path, title, measures)
    if len(losses) < 2:
        return False
    # Fine-tuning measures no bits per byte.
    if all("val_bits_per_byte" in record for record in losses if "val_loss" in record):
        return draw_curve(losses, path, title)
    return draw_measures(records, path, title, {"loss": "loss", "val_loss": "held out loss"})


def _take_card(source: Path, target: Path, license: str | None) -> None:
    """Somebody's own card; a license that it lacks is put in."""
    try:
        text = source.read_text(encoding="utf-8")
        card = ModelCard(text)
    except (UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{source} is no model card: {' '.join(str(error).split())}") from error
    if license is None or card.data.license == license:
        target.write_text(text, encoding="utf-8")
        return
    if card.data.license is not None:
        raise ValueError(f"{source} names the license {card.data.license}, and --license says {license}")
    card.data.license = license
    card.save(target)


def _introduction(config: TesseraConfig, model_type: str, step: int | None) -> str:
    costs = count_costs(config)
    active = "" if costs.active == costs.parameters else f" ({costs.active:,} of them active for a token)"
    kind = "Tessera" if model_type == "tessera" else f"`{model_type}`"
    unfinished = "" if step is None else f" A checkpoint of step {step:,} of a run that goes on."
    return (
        f"A {kind} decoder of {costs.parameters:,} parameters{active} with a context of "
        f"{config.max_position_embeddings:,} tokens.{unfinished}"
    )


def _describe(config: TesseraConfig) -> dict[str, Any]:
    """The tiles that are laid: sizes, and what is not at its default."""
    plain = architecture(TesseraConfig())
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "attention_type")
    tiles = architecture(config)
    shown = {name: tiles[name] for name in sizes}
    shown |= {name: value for name, value in tiles.items() if value != plain.get(name)}
    return {name: _short(value) for name, value in shown.items() if value is not None}


def _describe_tokenizer(folder: Path) -> dict[str, str]:
    file = folder / "tokenizer.json"
    if not file.is_file():
        return {}
    values = read_json(file)
    model = values.get("model") or {}
    vocabulary = model.get("vocab") or ()
    tokens = len(vocabulary) + sum(
        token.get("content") not in vocabulary for token in values.get("added_tokens") or []
    )
    told = f"{model.get('type') or 'a tokenizer'}, {tokens:,} tokens"
    notes = read_json(folder / NOTES) if (folder / NOTES).is_file() else {}
    if isinstance(measured := notes.get("bytes_per_token"), float):
        told += f", {measured:.2f} bytes each"
    return {"tokenizer": told}


def _describe_data(recipe: dict[str, Any]) -> dict[str, str]:
    """What the folders of tokens that a run read say of themselves, where they are still there."""
    rows = {}
    for key in _DATA:
        given = recipe.get(key) or []
        for name in given if isinstance(given, list) else [given]:
            folder = Path(str(name).rpartition(":")[0] or str(name))
            folder = folder if folder.is_dir() else Path(str(name))
            if not (folder / "data_meta.json").is_file():
                continue
            meta = read_json(folder / "data_meta.json")
            counts = [
                f"{count:,} {unit} for {use}"
                for split, use in (("train", "training"), ("val", "validation"))
                for unit in ("tokens", "documents")
                if isinstance(count := (meta.get(split) or {}).get(unit), int)
            ]
            sources = [_without_folders(str(source.get("source"))) for source in meta.get("sources") or []]
            rows[f"data in {folder.name}"] = "; ".join([*counts, *sources])
    return {name: text for name, text in rows.items() if text}


def _describe_training(recipe: dict[str, Any], records: list[dict]) -> dict[str, Any]:
    """The recipe without paths, and what the run came to."""
    rows = {
        key: _without_folders(value)
        for key, value in recipe.items()
        if value is not None and key not in _LOCAL
    }
    if records:
        last = records[-1]
        rows["steps done"] = f"{last['step']:,}"
        if last.get("tokens"):
            rows["tokens seen"] = f"{last['tokens']:,}"
        if last.get("seconds"):
            rows["time"] = f"{last['seconds'] / 60:,.1f} minutes"
        for key, name in (
            ("val_loss", "validation loss at the end, nats per token"),
            ("val_bits_per_byte", "validation at the end, bits per byte"),
        ):
            if found := [record[key] for record in records if key in record]:
                rows[name] = float(found[-1])
    return rows


def _describe_conversion(weights: Path, converted: str | None, notes: list[str]) -> list[str]:
    """What was done to the weights and compared, as far as it is known."""
    file = weights / REPORT
    report = read_json(file) if file.is_file() else {}
    if not _is_of(weights, report.get("files")):
        report = {}
    checks = [
        (check.get("name"), check.get("found"), check.get("allowed"))
        for check in report.get("checks") or []
        if check.get("passed")
    ]
    if converted is None and checks:
        kinds = [(report.get(end) or {}).get("kind", "?") for end in ("source", "target")]
        converted = f"{kinds[0]} to {kinds[1]}"
    lines = [] if converted is None else [f"From {converted}." + (" Compared were:" if checks else "")]
    if checks:
        rows = {name: f"{found}" + (f" (allowed: {most})" if most else "") for name, found, most in checks}
        lines.append(_table(rows))
    # Those of the checkpoint itself, and those of its conversion now or earlier.
    told = dict.fromkeys([*notes, *(report.get("notes") or [])])
    return [*lines, *(f"{note[0].upper()}{note[1:]}." for note in told if note)]


def _is_of(weights: Path, files: Any) -> bool:
    """Whether what a report says is of these very files."""
    if not isinstance(files, dict) or not files or not all(isinstance(told, dict) for told in files.values()):
        return False
    there = all((weights / name).is_file() for name in files)
    return there and all(file_sha256(weights / name) == told.get("sha256") for name, told in files.items())


def _short(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return ", ".join(f"{value.count(kind)} x {kind}" for kind in dict.fromkeys(value))


def _table(rows: dict[str, Any]) -> str:
    lines = ["| | |", "|---|---|"]
    for name, value in rows.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        lines.append(f"| {name} | {' '.join(shown.split()).replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def _read_recipe(run: Path | None) -> dict[str, Any]:
    file = None if run is None else run / "recipe.yaml"
    if file is None or not file.is_file():
        return {}
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    return values if isinstance(values, dict) else {}


def _read_records(run: Path | None, step: int | None) -> list[dict]:
    """What the run recorded up to these weights."""
    file = None if run is None else run / "metrics.jsonl"
    if file is None or not file.is_file():
        return []
    records = [record for record in read_metrics(file) if isinstance(record, dict) and "step" in record]
    for record in records:
        for key in record.keys() & _NUMBERS:
            if not isinstance(value := record[key], int | float):
                raise ValueError(f"{file} has a record whose {key} is {value!r}, which is no number")
    return [record for record in records if step is None or record["step"] <= step]


def _read_scores(run: Path | None, model: Path) -> str | None:
    """The table of `eval.json`, if it is of these very weights."""
    from tessera.evaluation.report import format_table

    file = None if run is None else run / "eval.json"
    if file is None or not file.is_file():
        return None
    report = read_json(file)
    measured = (report.get("model") or {}).get("sha256") or {}
    if not _is_of(model, {name: {"sha256": sha} for name, sha in measured.items()}):
        return None
    try:
        return format_table(report)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no report of `tessera eval`: it lacks {error}; measure again") from error


def names_only(value: Any, relative: bool = False) -> Any:
    """A value of a recipe or of notes, with names where it has paths; other text stays as it is.

    Args:
        value: of JSON or YAML.
        relative: whether `a/b` alone is a path too, and no name on the Hub.
    """
    if isinstance(value, dict):
        return {names_only(key, relative): names_only(part, relative) for key, part in value.items()}
    if isinstance(value, list):
        return [names_only(part, relative) for part in value]
    if not isinstance(value, str):
        return value
    if _PATH.match(value) or (relative and re.fullmatch(r"[^\s:/]+/\S*", value)):
        return re.split(r"[\\/]", value.rstrip("/\\"))[-1]
    return _PATH_IN_TEXT.sub(lambda found: found[0].rstrip("/").rpartition("/")[2], value)


def _without_folders(value: Any) -> Any:
    if isinstance(value, list):
        return ", ".join(str(_without_folders(part)) for part in value)
    return names_only(value, relative=True)


def _named(recipe: dict[str, Any], keys: tuple[str, ...], run: Path | None) -> list[str]:
    """Values that have the form of a name on the Hub, and are no path here or where the run was started."""
    values = [value for key in keys if isinstance(value := recipe.get(key), str)]
    name = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
    folders = [Path(), *([] if run is None else [run, *run.absolute().parents])]
    return [
        value
        for value in values
        if name.fullmatch(value) and not any((folder / value).exists() for folder in folders)
    ]
