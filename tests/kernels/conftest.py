import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    """The same random inputs in every run and in any order of the tests."""
    torch.manual_seed(0)
