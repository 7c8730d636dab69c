from mixlens.endpoints.prices import cost as cost
from mixlens.endpoints.prices import prices as prices
from mixlens.pricing.providers import listed_prices as listed_prices
from mixlens.pricing.providers import provider_table as provider_table
from mixlens.pricing.tradeoff import Candidate as Candidate
from mixlens.pricing.tradeoff import candidates as candidates
from mixlens.pricing.tradeoff import frontier as frontier
