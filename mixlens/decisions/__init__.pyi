from mixlens.decisions.caches import cache as cache
from mixlens.decisions.checkpoint import save as save
from mixlens.decisions.distinct import distinct_experts as distinct_experts
from mixlens.decisions.gate import judge as judge
from mixlens.decisions.judgement import Judgement as Judgement
from mixlens.decisions.pruning import prune as prune
from mixlens.decisions.saliencies import saliency as saliency
from mixlens.decisions.saliencies import strongest as strongest
