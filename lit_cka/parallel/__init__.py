"""Several processes, cores and devices at one job: collectives, agreement between ranks, work shared out.

Nothing here knows what is computed; the strategies of a training are Lightning's.
"""
