"""MongoDB: one module for each collection, moves as compare-and-set, one seam for its errors (`client.py`).

Nothing here decides anything: flow and control say which move, and these functions make it or say that it was refused.
"""
