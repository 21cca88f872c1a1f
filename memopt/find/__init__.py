"""From a graph to chains: what can be recomputed, and the reason wherever something cannot."""

from memopt.find.chains import Chain, Found, Rejected, find_chains

__all__ = ["Chain", "Found", "Rejected", "find_chains"]
