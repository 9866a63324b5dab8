"""Which samples a batch holds: by their indices or by what they are, in any order, on any number of ranks.

What is computed of the samples is not known here.
"""
