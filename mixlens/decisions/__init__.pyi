from mixlens.decisions.distinct import distinct_experts as distinct_experts
