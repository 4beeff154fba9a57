"""Edits that hold weights in fewer bits; one file a method, over the grids of grid.py."""

from fettle.quantize.activations import Activations as Activations
from fettle.quantize.awq import AWQ as AWQ
from fettle.quantize.bitdelta import BitDelta as BitDelta
from fettle.quantize.checkpoint import AsLoaded as AsLoaded
from fettle.quantize.gptq import GPTQ as GPTQ
from fettle.quantize.grid import Grid as Grid
from fettle.quantize.hqq import HQQ as HQQ
from fettle.quantize.inputs import RoundInputs as RoundInputs
from fettle.quantize.kv_cache import KVCache as KVCache
from fettle.quantize.llm_int8 import LLMInt8 as LLMInt8
from fettle.quantize.loftq import LoftQ as LoftQ
from fettle.quantize.lsq import LSQ as LSQ
from fettle.quantize.nf4 import NF4 as NF4
from fettle.quantize.outliers import Outliers as Outliers
from fettle.quantize.qat import QAT as QAT
from fettle.quantize.rtn import RTN as RTN
from fettle.quantize.smoothquant import SmoothQuant as SmoothQuant
from fettle.quantize.zeroquant import LayerDistill as LayerDistill
from fettle.quantize.zeroquant import ZeroQuant as ZeroQuant
