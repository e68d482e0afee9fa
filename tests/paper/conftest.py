import pytest
from paper_builders import rows_at, table


@pytest.fixture(scope="session")
def experiments():
    """Table 1 in one size, run at scale=toy only."""
    return [table(*rows_at(scale), scale=scale, evaluation_batches=727, tokens=2.2e9) for scale in ("paper", "toy")]
