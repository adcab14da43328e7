"""The quickstart's tests reach no network either."""

from tests.datasets.conftest import blocked_network as blocked_network
