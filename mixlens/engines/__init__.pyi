from mixlens.engines.vllm_engine import VLLM as VLLM
from mixlens.engines.vllm_engine import vllm as vllm
