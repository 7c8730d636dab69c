"""The private parts of mixlens that tests reach, imported in one place."""

from mixlens.show.analysis import Analysis as Analysis
from mixlens.show.findings import findings as findings
from mixlens.stats.bootstrap import t_quantile as t_quantile
