"""Statistics of one layer over one pass: rows or moments, whichever is less, of one rank or of all.

The formulas are `lit_cka.functional`; which rows belong together is decided elsewhere.
"""
