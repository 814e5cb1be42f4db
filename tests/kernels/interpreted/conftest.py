"""These tests are for `../test_interpreted.py` to run: without TRITON_INTERPRET=1 they are not even collected."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
