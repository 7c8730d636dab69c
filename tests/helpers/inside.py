"""The private parts of mixlens that tests reach, imported in one place."""

from mixlens.bench.decode import Event as Event
from mixlens.bench.drive import Caps as Caps
from mixlens.bench.drive import Driver as Driver
from mixlens.bench.drive import Job as Job
from mixlens.bench.drive import Level as Level
from mixlens.bench.drive import turn_edges as turn_edges
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
from mixlens.kinds import _KINDS as _KINDS
from mixlens.runs import RunWriter as RunWriter
from mixlens.runs import open_run as open_run
from mixlens.runs import plan_at as plan_at
from mixlens.runs import versions as versions
from mixlens.show.analysis import Analysis as Analysis
from mixlens.show.findings import findings as findings
from mixlens.stats.bootstrap import t_quantile as t_quantile
from mixlens.traces.trace import from_parts as from_parts
