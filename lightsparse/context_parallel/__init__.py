"""One sequence over several ranks: who holds which tokens, and the exchange of the key blocks that rows read."""
