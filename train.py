"""Fine-tune a model and watch its representations: `python train.py fit --config configs/digits.yaml`.

The same as `lit-cka`, without an installed command.
"""

from lit_cka.__main__ import main

if __name__ == "__main__":
    main()
