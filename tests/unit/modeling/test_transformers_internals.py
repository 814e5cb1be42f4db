"""What reaches into transformers: in one file only."""

import re
from pathlib import Path

import quailora

PRIVATE = re.compile(
    r"transformers\.(core_model_loading|conversion_mapping|initialization|modeling_utils|quantizers)\b|masking_utils|"
    r"_get_dtype_plan|all_tied_weights_keys"
)


def test_only_one_file_reaches_into_private_parts_of_transformers() -> None:
    package = Path(quailora.__file__).parent
    found = {file.name for file in package.rglob("*.py") if PRIVATE.search(file.read_text())}
    assert found == {"transformers_internals.py"}
