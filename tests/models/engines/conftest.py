"""Our converters write the decoders for TensorRT, and need a newer Python than the engines that run them."""

from __future__ import annotations

import sys

collect_ignore = [] if sys.version_info >= (3, 10) else ["test_tensorrt_generation.py"]
