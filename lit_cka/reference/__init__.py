"""What a model in training is compared with: the frozen reference, its features kept, its weights in a file.

The statistics of a comparison, and when it is made, are `lit_cka.tracking`.
"""
