"""Many fine-tuned models, each edited in many ways and evaluated on many test sets: what is more than chance, and more
than shrinkage.

The edits themselves are `lit_cka.editing` and `lit_cka.functional.edits`; options and messages are
`lit_cka.commands.study`.
"""
