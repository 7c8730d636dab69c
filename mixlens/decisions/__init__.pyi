from mixlens.decisions.caches import cache as cache
from mixlens.decisions.distinct import distinct_experts as distinct_experts
