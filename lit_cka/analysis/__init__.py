"""Compare models: features of whole datasets, and what they have in common."""
