"""The tab "CKA" of TensorBoard, which a plain `tensorboard --logdir` finds: `CKAPlugin`.

What is logged comes from `lit_cka.tracking`; all that is known here are scalars, and texts of what was done to layers.
Torch is not imported, nor matplotlib.
"""
