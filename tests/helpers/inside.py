"""The private parts of mixlens that tests reach, imported in one place."""

from mixlens.bench.events import Record as Record
from mixlens.bench.load_generator import Caps as Caps
from mixlens.bench.load_generator import Driver as Driver
from mixlens.bench.load_generator import Job as Job
from mixlens.bench.load_generator import Level as Level
from mixlens.bench.load_generator import turn_edges as turn_edges
from mixlens.core.files import write_file as write_file
from mixlens.core.run_dir import RunWriter as RunWriter
from mixlens.core.run_dir import open_run as open_run
from mixlens.core.run_dir import plan_at as plan_at
from mixlens.core.run_dir import versions as versions
from mixlens.endpoints.protocols import Event as Event
from mixlens.evals.endpoints import EndpointBackend as EndpointBackend
from mixlens.evals.model import _seed as _seed
from mixlens.evals.preflight import _check_prompt as _check_prompt
from mixlens.evals.response_cache import PARTIAL as PARTIAL
from mixlens.evals.response_cache import Answers as Answers
from mixlens.evals.scoring import near_ties as near_ties
from mixlens.evals.scoring import primary_rows as primary_rows
from mixlens.evals.scoring import score_table as score_table
from mixlens.evals.scoring import wilson as wilson
from mixlens.registry import _KINDS as _KINDS
from mixlens.reports.analysis import Analysis as Analysis
from mixlens.reports.findings import findings as findings
from mixlens.stats.multiplicity import p_against as p_against
from mixlens.trace.trace import from_parts as from_parts
