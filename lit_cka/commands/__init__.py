"""The subcommands of `lit-cka`, one module each: options in, folders of results out.

There is nothing here that a user of the Python API would miss.
"""
