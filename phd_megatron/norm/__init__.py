"""The HybridNorm idea: the table of norm schemes and the norm modules."""
