"""Edits that choose what trains; one file a method."""

from fettle.peft.adalora import AdaLoRA as AdaLoRA
from fettle.peft.bitfit import BitFit as BitFit
from fettle.peft.bottleneck import Adapter as Adapter
from fettle.peft.freeze import Freeze as Freeze
from fettle.peft.full import Full as Full
from fettle.peft.head import TaskHead as TaskHead
from fettle.peft.hybrid_prompt import HybridPrompt as HybridPrompt
from fettle.peft.ia3 import IA3 as IA3
from fettle.peft.lora import LoRA as LoRA
from fettle.peft.new_tokens import NewTokens as NewTokens
from fettle.peft.norms import Norms as Norms
from fettle.peft.prefix_tuning import PrefixTuning as PrefixTuning
from fettle.peft.prompt_tuning import PromptTuning as PromptTuning
from fettle.peft.ptuning import PTuning as PTuning
from fettle.peft.ptuning_v2 import PTuningV2 as PTuningV2
from fettle.peft.tinytl import TinyTL as TinyTL
