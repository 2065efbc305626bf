"""What is left out of transformers' common tests is what docs/contract.md says."""

import re

from contract.left_out import LEFT_OUT, LEFT_OUT_BEFORE_5_23
from contract.upstream import REPOSITORY


def test_the_documented_list_is_the_list_in_code():
    text = (REPOSITORY / "docs" / "contract.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(test_\w+)` \| ([\w, ]+) \| (.+) \|$", text, flags=re.MULTILINE)
    listed = [(name, ", ".join(models), reason) for name, models, reason in LEFT_OUT + LEFT_OUT_BEFORE_5_23]
    assert rows == listed
