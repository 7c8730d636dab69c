"""The private parts of mixlens that tests reach, imported in one place."""

from mixlens.bench.decode import Event as Event
from mixlens.bench.events import Record as Record
from mixlens.evals.answers import PARTIAL as PARTIAL
from mixlens.evals.answers import Answers as Answers
from mixlens.evals.endpoints import EndpointBackend as EndpointBackend
from mixlens.evals.model import _seed as _seed
from mixlens.evals.preflight import _check_prompt as _check_prompt
from mixlens.evals.scoring import near_ties as near_ties
from mixlens.evals.scoring import primary_rows as primary_rows
from mixlens.evals.scoring import score_table as score_table
from mixlens.evals.scoring import wilson as wilson
from mixlens.show.analysis import Analysis as Analysis
from mixlens.show.findings import findings as findings
from mixlens.stats.bootstrap import t_quantile as t_quantile
