"""Next-token prediction over JSON lines; samples as `lm`."""

from __future__ import annotations

from typing import ClassVar

from tencentpretrain.data.processors.lm import LmProcessor
from tencentpretrain.data.records import RecordFormat
from tencentpretrain.registry import PROCESSORS


@PROCESSORS.register("llm_pretrain")
class LlmPretrainProcessor(LmProcessor):
    """One JSON object with the key "text" per line."""

    record_format: ClassVar[RecordFormat] = "json_lines"
