"""Only the builder itself runs under the interpreters of old JetPacks: what makes its graphs does not."""

from __future__ import annotations

import sys

collect_ignore = [] if sys.version_info >= (3, 10) else ["test_decoder.py"]
