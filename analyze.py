"""Look into trained models: `python analyze.py monosoup --config configs/monosoup_digits.yaml`.

The same as `lit-cka`, without an installed command.
"""

from lit_cka.__main__ import main

if __name__ == "__main__":
    main()
