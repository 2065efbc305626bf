"""What a conversion did and what was compared: the report that is stored beside the weights.

What belongs here: the checks' form, the two files of the report, and what is read of an older one: the hashes
by which a damaged file is told from the one that was written. The comparisons are in `verify.py`.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tessera.data.hashing import file_sha256
from tessera.modeling.loading import read_json

REPORT = "conversion_report.json"
TABLE = "conversion_report.md"


@dataclass(frozen=True)
class Check:
    """One comparison of source and result.

    Attributes:
        name: what was compared.
        passed: whether they are equal, or near enough.
        found: the figure that came out, or a word.
        allowed: what it may be at most; empty where only equality passes.
    """

    name: str
    passed: bool
    found: str
    allowed: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.found}" + (f" (allowed: {self.allowed})" if self.allowed else "")


@dataclass
class Report:
    """A conversion, told.

    Attributes:
        source, target: name and kind.
        files: name -> bytes and sha256, of the weights.
        parameters: numbers in the tensors written, ranks counted once.
        dtype: of the weights.
        checks: what was compared.
        notes: what was left out, in sentences.
        seconds: by stage.
        versions: of the packages that took part.
    """

    source: dict[str, str]
    target: dict[str, str]
    parameters: int
    dtype: str
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Writes `conversion_report.json` and `conversion_report.md` into a directory."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (folder / REPORT).write_text(text + "\n", encoding="utf-8")
        (folder / TABLE).write_text(self.as_markdown(), encoding="utf-8")

    def as_markdown(self) -> str:
        """The report for a reader."""
        rows = [
            ("source", f"{self.source['name']} ({self.source['kind']})"),
            ("result", f"{self.target['name']} ({self.target['kind']})"),
            ("parameters", f"{self.parameters:,}"),
            ("dtype", self.dtype),
            ("seconds", ", ".join(f"{stage} {count:.1f}" for stage, count in self.seconds.items())),
            ("versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())),
        ]
        lines = ["# Conversion report", "", *_table(("", ""), rows), ""]
        checks = [(c.name, c.found, c.allowed, "passed" if c.passed else "failed") for c in self.checks]
        lines += [*_table(("check", "found", "allowed", "verdict"), checks), ""]
        files = [(name, f"{entry['bytes']:,}", entry["sha256"]) for name, entry in self.files.items()]
        lines += [*_table(("file", "bytes", "sha256"), files), ""]
        if self.notes:
            lines += [*(f"- {note}" for note in self.notes), ""]
        return "\n".join(lines)


def hash_files(files: list[Path]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of files, and of safetensors the sha256 of the header too; two files at a time."""
    with ThreadPoolExecutor(2) as pool:
        digests = list(pool.map(_hash, files))
    return {file.name: digest for file, digest in zip(files, digests, strict=True)}


def check_against_report(folder: Path) -> None:
    """Compares weights with the hashes in the report that was stored when they were written, if there is one.

    A file with another header or size was written since, by something that knows nothing of the report; it
    is not compared.

    Raises:
        ValueError: naming a file in which other numbers are at the places of those that were written.
    """
    if not (folder / REPORT).is_file():
        return
    files = read_json(folder / REPORT).get("files")
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise ValueError(f"{folder / REPORT} does not list the files that were written; restore or delete it")
    there = [folder / name for name in files if Path(name).name == name and (folder / name).is_file()]
    for name, found in hash_files(there).items():
        told = files[name]
        same_form = all(told.get(key) == found[key] for key in found if key != "sha256")
        if same_form and told.get("sha256") != found["sha256"]:
            raise ValueError(
                f"{folder / name} is damaged: {REPORT} has another sha256 of what was written; fetch it "
                f"again, or delete {REPORT} if the weights were changed on purpose"
            )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *cells)]


def _hash(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"bytes": file.stat().st_size}
    if file.suffix == ".safetensors":
        with file.open("rb") as stream:
            start = stream.read(8)
            head = start + stream.read(min(int.from_bytes(start, "little"), found["bytes"]))
        found["header_sha256"] = hashlib.sha256(head).hexdigest()
    return found | {"sha256": file_sha256(file)}
