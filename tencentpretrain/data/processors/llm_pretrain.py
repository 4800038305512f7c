"""Next-token prediction over JSON lines; samples as `lm`."""

from __future__ import annotations

from tencentpretrain.data.processors.lm import LmProcessor
from tencentpretrain.registry import PROCESSORS


@PROCESSORS.register("llm_pretrain")
class LlmPretrainProcessor(LmProcessor):
    """One JSON object with the key "text" per line."""

    record_format = "json_lines"
