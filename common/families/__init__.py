"""What every process may know about a model family without torch, one file per family.

The stages have tables of their own: `services/preprocess/families`, `services/vision/families` and
`services/llm/families`.
"""

from common.families.family import BadCheckpoint, Family, ModelSizes
from common.families.qwen2_5_vl import Qwen25VL
from common.families.qwen_vl import QwenVL
from common.families.vlmo import Vlmo
from common.families.wemm import Wemm

__all__ = ["FAMILIES", "BadCheckpoint", "Family", "ModelSizes"]

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (Qwen25VL(), QwenVL(), Wemm(), Vlmo())
}
"""The families that can be served, by the `model_type` in config.json."""
