"""Blocks the network in the tests of the quickstart."""

from tests.datasets.conftest import blocked_network as blocked_network
