import pytest

import mixlens as ml


@pytest.fixture(scope="session")
def demo():
    return ml.load("demo", dtype="float32", verbose=False)
